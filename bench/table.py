"""The README's table of speeds and the figures of bench/results:  python -m bench.table [--check | --figures]

The table holds every record of bench.step (step-*.json) and every row of bench.data (data-*.jsonl), between the
README's marks. `--check` changes nothing and exits with 1 if the table differs from the results. `--figures` draws the
figure of each record of bench.step and bench.scale (step-*.svg, scale-*.svg) again.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path

from bench import plots, records
from bench.records import ROOT, Row
from bench.scale import command as scale
from bench.step import report as step
from cjepa_fast.errors import UserError

BEGIN, END = "<!-- made by python -m bench.table -->\n", "<!-- end -->\n"


def table(results: Path) -> str:
    """Return the text between the marks."""
    stepped = [json.loads(path.read_text()) for path in sorted(results.glob("step-*.json"))]
    rows = [json.loads(line) for path in sorted(results.glob("data-*.jsonl")) for line in path.read_text().splitlines()]
    parts = [*map(steps, stepped), feeds([row for row in rows if row["status"] == "ok" and "images_per_cpu_s" in row])]
    if not any(row["gpu"] for row in (*rows, *(record["environment"] for record in stepped))):
        parts.append("Not yet run on a GPU.\n")
    return "\n".join(parts)


def steps(record: Row) -> str:
    where = record["environment"]
    device = where["gpu"] or f"{where['cpu']} CPU, {where['threads']} threads"
    models, masks = (" ".join(dict.fromkeys(row[key] for row in record["rows"])) for key in ("model", "masks"))
    command = f"python -m bench.step --models {models} --batch {record['batch']}"
    command += "" if masks == "fixed" else f" --masks {masks}"
    head = (
        f"A training step, {device}, {record['precision']}, batch {record['batch']}, torch {where['torch']}, commit "
        f"{where['commit']} (`{command}`):\n\n"
    )
    lines = []
    for row in record["rows"]:
        if row["rival"] == "ours" and row["status"] == "ok":
            faster = [f"{row['speedup'][base]:.2f}" for base in ("eager", "tuned")]
            model = row["model"] if row["masks"] == "fixed" else f"{row['model']}, packed"
            lines.append([model, f"{row['images_s']:,.4g}", *faster, f"{row['mfu']:.0%}"])
    columns = "ViT|>ours, images/s|>x `eager`|>x `tuned`|>of the best matrix product's rate"
    return head + "\n".join(records.table(columns, lines)) + "\n"


def feeds(rows: list[Row]) -> str:
    commits = ", ".join(dict.fromkeys(row["commit"] for row in rows))
    lines = []
    for case in dict.fromkeys(row["case"] for row in rows):
        here = [row for row in rows if row["case"] == case]
        ours = {"shards" in row["variant"]: row["images_per_cpu_s"] for row in here if row["role"] == "ours"}
        best = max((row for row in here if row["role"] == "rival"), key=lambda row: row["images_per_cpu_s"])
        cells = [f"{ours[key]:,.0f} ({ours[key] / best['images_per_cpu_s']:.2f}x)" for key in (False, True)]
        lines.append([case, *cells, f"{best['variant']}: {best['images_per_cpu_s']:,.0f}"])
    head = f"The feed, images/s per core, commit {commits} (`python -m bench.data`):\n\n"
    return head + "\n".join(records.table("images|>ours from files|>ours from shards|best rival", lines)) + "\n"


def draw(results: Path) -> None:
    """Draw the figure of each record beside it."""
    for pattern, figure in (("step-*.json", step.figure), ("scale-*.json", scale.figure)):
        for path in results.glob(pattern):
            records.write(path.with_suffix(".svg"), plots.svg(figure(json.loads(path.read_text()))))


def replaced(readme: str, text: str) -> str:
    """Return the README with `text` between its marks. Raises ValueError without marks."""
    before, _, rest = readme.partition(BEGIN)
    _, mark, after = rest.partition(END)
    if not mark:
        raise ValueError(f"README.md lacks the marks {BEGIN.strip()} and {END.strip()}")
    return before + BEGIN + text + END + after


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="only compare")
    parser.add_argument("--figures", action="store_true", help="draw the figures instead")
    arguments = parser.parse_args(argv)
    if arguments.figures:
        try:
            draw(ROOT / "bench/results")
        except UserError as error:
            print(f"error: {error}", file=sys.stderr)
            return 2
        return 0
    path = ROOT / "README.md"
    old = path.read_text()
    new = replaced(old, table(ROOT / "bench/results"))
    if arguments.check:
        if new != old:
            print("README.md: the table of speeds differs from bench/results: run python -m bench.table")
        return int(new != old)
    path.write_text(new)
    return 0


if __name__ == "__main__":
    sys.exit(main())
