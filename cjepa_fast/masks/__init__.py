"""Multi-block masks: which patches the context encoder sees and which the predictor must predict."""

from cjepa_fast.masks.sampler import MODES, Masks, MultiBlockSampler

__all__ = ["MODES", "Masks", "MultiBlockSampler"]
