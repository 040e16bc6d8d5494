"""I-JEPA's prediction loss."""

from __future__ import annotations

from torch import Tensor

from cjepa_fast import ops
from cjepa_fast.errors import UserError


def prediction_loss(
    predictions: Tensor, targets: Tensor, target_indices: Tensor, kind: str = "smooth_l1", *,
    offsets: Tensor | None = None, impl: str = "auto",
) -> Tensor:  # fmt: skip
    """Compute I-JEPA's loss between predicted and actual embeddings of the target patches.

    Targets are layer-normed over D without affine (eps 1e-5) before they are gathered.

    Args:
        predictions: [B, M, K, D], any float dtype.
        targets: [B, N, D], the target encoder's output for all patches. Constants: no gradient reaches them. Packed
            [T, D]: the output for the union of each image's target patches, image after image, then padding.
        target_indices: integer [B, M, K], row-major patch numbers in [0, N); packed: slots in the image's union.
        kind: "smooth_l1" (beta 1, mean over everything: what the published runs minimise) or "l2" (the paper's text,
            I-JEPA section 3: sum over patches and dimensions of a block, mean over blocks and images).
        offsets: int32 [B + 1], packed: the start of each image's targets, and the end of the last.
        impl: see `cjepa_fast.ops`.

    Returns a scalar, fp32 (fp64 for fp64 input).

    Raises UserError for another kind, or an implementation that cannot run.
    """
    if kind not in ("smooth_l1", "l2"):
        raise UserError(f"unknown prediction loss {kind!r}; known: smooth_l1, l2")
    return ops.prediction_loss(predictions, targets, target_indices, kind, offsets=offsets, impl=impl)
