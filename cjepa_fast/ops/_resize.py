"""Images resized to squares on a CPU, by the C++ library or by torch."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from torch.nn.functional import interpolate

from cjepa_fast.native import host as native
from cjepa_fast.ops._choice import announce


def resize_images(images: Sequence[np.ndarray], size: int, threads: int = 1) -> np.ndarray:
    """Return images of any sizes, C-contiguous uint8 [h, w, 3], as squares: uint8 [n, size, size, 3].

    Bilinear with antialias and Pillow's arithmetic: columns, then rows, each rounded to eight bits. Without the C++
    library torch resizes, in threads of its own; its pixels differ by at most one level, and the log gives the reason.
    """
    reason = native.why_unavailable()
    if reason is None:
        return native.resize(images, size, threads)
    announce("resize", "torch", reason)
    out = np.empty((len(images), size, size, 3), dtype=np.uint8)
    for image, square in zip(images, out, strict=True):
        # [1, 3, h, w] with channels last: torch has a fast path for this layout and keeps the layout
        channels_first = torch.from_numpy(image)[None].permute(0, 3, 1, 2)
        resized = interpolate(channels_first, size=(size, size), mode="bilinear", antialias=True)
        square[:] = resized[0].permute(1, 2, 0).numpy()
    return out
