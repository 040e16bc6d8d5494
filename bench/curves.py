"""Draws the curves of several runs side by side:  python -m bench.curves LABEL=RUN [LABEL=RUN ...] --out FILE.svg

One panel per health figure of RUN/metrics.jsonl; the untrained encoder's k-NN accuracy is the point at step 0. Needs
matplotlib (`pip install 'cjepa-fast[plots]'`).
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

PANELS = {
    "loss_prediction": "prediction loss",
    "feature_std": "feature_std (0: collapsed, 1: spread)",
    "rankme": "RankMe of the mean embeddings",
    "cosine_gap": "cosine gap",
    "knn_top1": "20-NN top-1",
}


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("runs", nargs="+", metavar="LABEL=RUN")
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args(argv)
    try:
        from matplotlib.figure import Figure  # pyright: ignore[reportMissingImports]
    except ImportError:
        print("error: matplotlib is not installed; pip install 'cjepa-fast[plots]'", file=sys.stderr)
        return 2

    figure = Figure(figsize=(4 * len(PANELS), 3.2), layout="constrained")
    axes = dict(zip(PANELS, figure.subplots(1, len(PANELS)), strict=True))
    for argument in arguments.runs:
        label, _, run = argument.partition("=")
        try:
            lines = [json.loads(line) for line in (Path(run) / "metrics.jsonl").read_text().splitlines()]
            untrained = json.loads((Path(run) / "run_state.json").read_text())["untrained"]
        except (OSError, ValueError, KeyError) as error:
            print(f"error: {run}: not a run directory ({error})", file=sys.stderr)
            return 2
        for key, axis in axes.items():
            points = [(line["step"], line[key]) for line in lines if line.get(key) is not None]
            if key == "knn_top1" and untrained is not None:
                points.insert(0, (0, untrained))
            axis.plot(*zip(*points, strict=True), label=label, marker="o" if key == "knn_top1" else None)
    for key, axis in axes.items():
        axis.set_title(PANELS[key], fontsize=10)
        axis.set_xlabel("step")
    axes["loss_prediction"].legend()
    figure.savefig(arguments.out)
    return 0


if __name__ == "__main__":
    sys.exit(main())
