"""The encoder, the predictor and their parts."""

from cjepa_fast.networks.vit import Encoder, Impl, Predictor, build_encoder, build_predictor
