"""The one door to the fused kernels and the C++ library: each operation's public face and its implementation.

Every fused operation takes impl = "auto", "triton" or "eager". "auto" takes the Triton kernel for CUDA tensors if
Triton is installed and the kernel supports the arguments, else plain torch; asking for "triton" where it cannot run is
an error. The choice and its reason are logged once. All implementations compute the same function and gradients.
One file per operation; nothing outside this package imports `cjepa_fast.kernels`, `cjepa_fast.native` or triton.
"""

from cjepa_fast.ops._choice import require
from cjepa_fast.ops._masks import mask_sampler, sample_masks
from cjepa_fast.ops._prediction_loss import prediction_loss

__all__ = ["mask_sampler", "prediction_loss", "require", "sample_masks"]
