"""The table and the plot of a measurement, from its CSV: ``python -m benchmarks.report``."""

import csv
from pathlib import Path
from typing import Any, Dict, List, Optional

from benchmarks.workloads import BASELINE, CRITERIA
from fairseq_skd.commands import pictures

ROOT = Path(__file__).resolve().parents[1]
CSV = ROOT / "docs" / "benchmarks.csv"

Row = Dict[str, Any]


def write(rows: List[Row], path: Path) -> None:
    """Write one line a figure; each says where it was measured."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def read(path: Path = CSV) -> List[Row]:
    """Read what `write` has written; figures are text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(rows: List[Row]) -> str:
    """Return the medians as Markdown, a table a kind of measurement."""
    lines: List[str] = []
    for what in dict.fromkeys(row["what"] for row in rows):
        cells = {(_place(row), row["name"]): row for row in rows if row["what"] == what}
        shapes = dict.fromkeys(shape for shape, _ in cells)
        # Not every shape has every criterion.
        order = {name: place for place, name in enumerate(CRITERIA)}
        names = sorted(
            dict.fromkeys(name for _, name in cells), key=lambda name: order.get(name, len(order))
        )
        lines += ["", f"| {what} | {' | '.join(names)} |", "|---" * (len(names) + 1) + "|"]
        for shape in shapes:
            figures = [_cell(cells.get((shape, name)), name == names[0]) for name in names]
            lines.append(f"| {shape} | {' | '.join(figures)} |")
    return "\n".join(lines[1:])


def summary(rows: List[Row]) -> str:
    """Return steps and their memory as one table of Markdown, in parts of label smoothing's."""
    kinds = ("training step (forward, backward, Adam)", "memory added by a training step")
    found = {(row["what"], _place(row), row["name"]): row for row in rows}
    shapes = dict.fromkeys(_place(row) for row in rows if row["what"] in kinds)
    # Only what somebody measured.
    names = {
        kind: [name for name in CRITERIA if any((kind, shape, name) in found for shape in shapes)]
        for kind in kinds
    }
    heads = [f"{name}{' (memory)' * (kind == kinds[1])}" for kind in kinds for name in names[kind]]
    lines = [f"| | {' | '.join(heads)} |", "|---" * (len(heads) + 1) + "|"]
    for shape in shapes:
        cells = [
            _short(found.get((kind, shape, name)), name == BASELINE)
            for kind in kinds
            for name in names[kind]
        ]
        lines.append(f"| {shape} | {' | '.join(cells)} |")
    return "\n".join(lines)


def _short(row: Optional[Row], base: bool) -> str:
    if row is None:
        return ""
    return _cell(row, True) if base else f"x {float(row['ratio']):.2f}"


def _place(row: Row) -> str:
    """Return the shape, and the type of the model if it is not the usual one."""
    return row["shape"] if row["dtype"] == "float32" else f"{row['shape']}, {row['dtype']}"


def _cell(row: Optional[Row], base: bool) -> str:
    if row is None:
        return ""
    figure = f"{float(row['median']):.{0 if row['unit'] == 'MiB' else 2}f} {row['unit']}"
    return figure if base else f"{figure}, x {float(row['ratio']):.2f}"


def plot(rows: List[Row], path: Path) -> None:
    """Draw the training step of every criterion as a part of that of label smoothing (SVG)."""
    pyplot = pictures.pyplot()
    steps = [row for row in rows if row["what"].startswith("training step")]
    shapes = list(dict.fromkeys(map(_place, steps)))
    names = list(dict.fromkeys(row["name"] for row in steps if row["name"] != BASELINE))
    figure, axes = pyplot.subplots(figsize=(8, 0.6 + 0.75 * len(shapes)))
    for offset, name in enumerate(names):
        bars = {_place(row): row for row in steps if row["name"] == name}
        height = 0.8 / len(names)
        middle = (len(names) - 1) / 2
        places = [i + height * (offset - middle) for i, shape in enumerate(shapes) if shape in bars]
        ratios = [float(bars[shape]["ratio"]) for shape in shapes if shape in bars]
        shade = {"color": str(0.15 + 0.7 * offset / max(1, len(names) - 1)), "edgecolor": "black"}
        axes.barh(places, ratios, 0.9 * height, label=name, linewidth=0.4, **shade)
        for place, ratio in zip(places, ratios):
            # In a column beside the axes: not on the line, nor in a bar that is cut off.
            shown = f"{ratio:.2f}" if ratio <= 2 else f"{ratio:.2f}, cut off"
            axes.annotate(shown, (2.04, place), va="center", fontsize=6, annotation_clip=False)
    axes.axvline(1, color="black", linewidth=0.8, label=BASELINE)
    axes.set_xlim(0, 2)
    axes.set_yticks(range(len(shapes)), shapes)
    axes.invert_yaxis()
    axes.set_xlabel(f"seconds of a training step, {BASELINE} = 1 (less is better)")
    axes.legend(loc="lower right", bbox_to_anchor=(1, 1), ncols=3, fontsize=7)
    pictures.save_plot(figure, path)


if __name__ == "__main__":
    print(table(read()))
