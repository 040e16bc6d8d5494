"""The objectives that can be trained: one file each, and a line in `METHODS`."""

from __future__ import annotations

from collections.abc import Callable

from cjepa_fast.config import Config
from cjepa_fast.methods import jepa, two_view
from cjepa_fast.methods.protocol import Forward, Loss, Method

METHODS: dict[str, Callable[[Config], Method]] = {"cjepa": jepa.build, "ijepa": jepa.build, "vicreg": two_view.build}


def build_method(c: Config) -> Method:
    """Build the method of a configuration on the CPU, its weights drawn from torch's global generator."""
    return METHODS[c.method](c)
