"""The masks of one batch as tensors."""

from __future__ import annotations

from typing import NamedTuple

import torch

_LENGTHS = 32  # of trimmed lists: a 64th of a list is padding then, on average


class Masks(NamedTuple):
    """Masks of B images with M targets of Kt patches each, on a grid of N patches: int16 unless noted.

    Patches are numbered row by row. A slot is a position in the image's own list. Lists and slots ascend. A field is
    None if the caller did not ask for it or the mode has no such list.
    """

    context: torch.Tensor  # [B, Kc]; packed: [cap], image after image, then -1
    target: torch.Tensor  # [B, M, Kt]
    offsets: torch.Tensor | None = None  # packed: int32 [B + 1], where each image's context begins, and the end
    image_of: torch.Tensor | None = None  # packed: int32 [cap], the image of each token, -1 after the last
    inverse: torch.Tensor | None = None  # [B, N], slot of each patch in its image's context, else -1
    union: torch.Tensor | None = None  # [union_cap], patches of any target, image after image, then -1
    union_offsets: torch.Tensor | None = None  # int32 [B + 1], where each image's union begins, and the end
    target_slot: torch.Tensor | None = None  # [B, M, Kt], slot of each target patch in the union

    def to(self, device: torch.device) -> Masks:
        """Return the masks on `device`, copied to a GPU from pinned memory: the host waits for any other copy."""

        def copy(tensor: torch.Tensor) -> torch.Tensor:
            if device.type == "cpu" or tensor.device == device:
                return tensor
            return tensor.pin_memory().to(device, non_blocking=True)

        return self._make(None if tensor is None else copy(tensor) for tensor in self)

    def trimmed(self) -> Masks:
        """Return views of the packed lists without most of their padding; reads the offsets on the host.

        The views have one of `_LENGTHS` lengths instead of the exact one, because oneDNN keeps up to a megabyte for
        every number of tokens that it has multiplied.
        """

        def cut(entries: torch.Tensor | None, offsets: torch.Tensor | None) -> torch.Tensor | None:
            if entries is None or offsets is None:
                return entries
            unit = -(-len(entries) // _LENGTHS)
            return entries[: -(-int(offsets[-1]) // unit) * unit]

        return self._replace(
            context=cut(self.context, self.offsets), image_of=cut(self.image_of, self.offsets),
            union=cut(self.union, self.union_offsets),
        )  # fmt: skip

    def placed(self, device: torch.device, *, keep_shapes: bool) -> Masks:
        """Return the masks on `device`; on a CPU `trimmed`, unless `keep_shapes` because each shape is compiled."""
        masks = self.to(device)
        return masks if keep_shapes or device.type != "cpu" else masks.trimmed()
