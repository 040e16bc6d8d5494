from cjepa_fast.networks.vit import hold_copies  # noqa: F401
