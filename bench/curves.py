"""Draws the curves of several runs side by side:  python -m bench.curves LABEL=RUN [LABEL=RUN ...] --out FILE.svg

One panel per health figure of RUN/metrics.jsonl. The point at step 0 is the untrained encoder's k-NN accuracy.
"""

from __future__ import annotations

import argparse
import json
import sys
import typing
from pathlib import Path

from bench import plots, records
from cjepa_fast.errors import UserError

if typing.TYPE_CHECKING:
    from matplotlib.figure import Figure

PANELS = {
    "loss_prediction": "prediction loss",
    "feature_std": "feature_std (0: collapsed, 1: spread)",
    "rankme": "RankMe of the mean embeddings",
    "cosine_gap": "cosine gap",
    "knn_top1": "20-NN top-1",
}


def figure(runs: dict[str, Path]) -> Figure:
    """Draw a line for each run in each panel. Raises UserError for a folder that is no run directory."""
    drawing = plots.new(4 * len(PANELS), 3.2)
    axes = dict(zip(PANELS, drawing.subplots(1, len(PANELS)), strict=True))
    for label, run in runs.items():
        try:
            lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
            untrained = json.loads((run / "run_state.json").read_text())["untrained"]
        except (OSError, ValueError, KeyError) as error:
            raise UserError(f"{run}: not a run directory ({error})") from error
        for key, axis in axes.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if key == "knn_top1" and untrained is not None:
                points.insert(0, (0, untrained))
            steps, values = zip(*points, strict=True) if points else ((), ())
            axis.plot(steps, values, label=label, marker="o" if key == "knn_top1" else None)
    for key, axis in axes.items():
        axis.set_title(PANELS[key], fontsize=10)
        axis.set_xlabel("step")
    axes["loss_prediction"].legend()
    return drawing


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        runs = {label: Path(run) for label, _, run in (argument.partition("=") for argument in arguments.runs)}
        records.write(arguments.out, plots.svg(figure(runs)))
    except UserError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main())
