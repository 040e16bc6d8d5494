"""Multi-block masks: the patches that the context encoder sees and the patches that the predictor must predict."""

from cjepa_fast.masks.batch import Masks
from cjepa_fast.masks.sampler import MODES, MultiBlockSampler
