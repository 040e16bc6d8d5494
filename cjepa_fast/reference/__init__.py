"""The truth: the method (`method`) and the masks (`masks`) in plain PyTorch and NumPy."""

from cjepa_fast.reference.method import *  # noqa: F403
