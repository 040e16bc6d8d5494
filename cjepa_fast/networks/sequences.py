from cjepa_fast.networks.vit import Layout, Selection, take_rows  # noqa: F401
