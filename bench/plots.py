"""matplotlib for the benchmarks' figures: one message where it is missing, and drawings that repeat byte for byte."""

from __future__ import annotations

import io
import typing

from cjepa_fast.errors import UserError

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure


def new(width: float, height: float) -> Figure:
    """Return an empty figure of this size in inches. Raises UserError without matplotlib."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise UserError("matplotlib is not installed; pip install 'cjepa-fast[plots]'") from None
    return Figure(figsize=(width, height), layout="constrained")


def svg(figure: Figure) -> str:
    """Return a figure as SVG: text stays text, ids and metadata do not change from run to run."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "cjepa-fast", "svg.fonttype": "none"}):
        figure.savefig(text, format="svg", metadata={"Date": None, "Creator": None})
    return "\n".join(line.rstrip() for line in text.getvalue().splitlines()) + "\n"
