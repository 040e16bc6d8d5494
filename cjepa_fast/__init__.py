"""cjepa-fast: C-JEPA (Contrastive-JEPA, Mo & Tong, NeurIPS 2024) pretraining of vision transformers."""

__version__ = "0.1.0"
