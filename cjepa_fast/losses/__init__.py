"""The losses, functions of embeddings; batch statistics are those of all ranks."""

from cjepa_fast.losses.prediction import prediction_loss
from cjepa_fast.losses.second_moment import block_vicreg, context_target_vicreg, vicreg
