"""The losses, functions of embeddings; batch statistics are those of the global batch."""

from cjepa_fast.losses.second_moment import (
    GlobalBatchNorm,
    Projector,
    block_vicreg,
    context_target_vicreg,
    prediction_loss,
)  # fmt: skip

__all__ = ["GlobalBatchNorm", "Projector", "block_vicreg", "context_target_vicreg", "prediction_loss"]


def vicreg(x, y, *, impl="auto"):
    import torch

    return block_vicreg(torch.stack([x, y], 1), impl=impl)
