"""Philox4x32-10, the counter-based random generator of the feed and of the mask sampler.

Source: Salmon, Moraes, Dror, Shaw, "Parallel random numbers: as easy as 1, 2, 3", SC 2011.
A counter-based generator has no state to save: a resumed run needs only its step, and any worker can compute any draw.
NumPy's Philox cannot serve: it is 4x64, and its distributions may change between versions.
"""

from __future__ import annotations

import numpy as np

_M0, _M1 = np.uint64(0xD2511F53), np.uint64(0xCD9E8D57)
_W0, _W1 = 0x9E3779B9, 0xBB67AE85
_LOW, _SHIFT = np.uint64(0xFFFFFFFF), np.uint64(32)


def philox4x32(counter: np.ndarray, key: tuple[int, int]) -> np.ndarray:
    """Return uint32 words [..., 4] for uint32 counters [..., 4] and a key (low, high word), after ten rounds."""
    assert counter.dtype == np.uint32 and counter.shape[-1] == 4, (counter.dtype, counter.shape)
    # 32 x 32 -> 64 bit products need uint64 lanes; every lane stays below 2**32 between rounds.
    c0, c1, c2, c3 = (counter[..., i].astype(np.uint64) for i in range(4))
    k0, k1 = key
    assert 0 <= k0 < 2**32 and 0 <= k1 < 2**32, key
    for _ in range(10):
        p0, p1 = c0 * _M0, c2 * _M1
        c0, c1, c2, c3 = (
            (p1 >> _SHIFT) ^ c1 ^ np.uint64(k0),
            p1 & _LOW,
            (p0 >> _SHIFT) ^ c3 ^ np.uint64(k1),
            p0 & _LOW,
        )
        k0, k1 = (k0 + _W0) & 0xFFFFFFFF, (k1 + _W1) & 0xFFFFFFFF
    return np.stack([c0, c1, c2, c3], axis=-1).astype(np.uint32)
