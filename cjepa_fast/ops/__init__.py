"""The one door to the fused kernels and the C++ library: one file per operation.

Every fused operation takes impl = "auto", "triton" or "eager"; `attention` has back-ends of its own. "auto" runs the
Triton kernel for CUDA tensors if Triton is installed and the kernel supports the arguments, else plain torch. A request
for "triton" that cannot run is an error. The choice and its reason are logged once. All implementations compute the
same function and gradients. Nothing outside this package imports `cjepa_fast.kernels`, `cjepa_fast.native` or triton.
"""

from cjepa_fast.ops._adamw_ema import adamw_ema
from cjepa_fast.ops._attention import attention
from cjepa_fast.ops._attention_choice import require_attention
from cjepa_fast.ops._choice import choose, require
from cjepa_fast.ops._float8 import float8_linear, quantise_rows, require_float8
from cjepa_fast.ops._linear import linear
from cjepa_fast.ops._masks import mask_sampler, mask_workspace, sample_masks, sample_masks_on_gpu
from cjepa_fast.ops._patch_embed import patch_embed
from cjepa_fast.ops._prediction_loss import prediction_loss
from cjepa_fast.ops._predictor_rows import predictor_rows, sequence_offsets
from cjepa_fast.ops._resize import resize_images
from cjepa_fast.ops._variance_covariance import variance_covariance, variance_covariance_form
