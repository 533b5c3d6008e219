"""Tables of the results, as Markdown, and their plots: ``python -m experiments.figures.tables``.

For every experiment the mean and the sample standard deviation over seeds of every figure; "(2 of
3)" where not all seeds have it. What was translated is also compared, seed by seed, with the
baseline: the difference of BLEU and chrF2 and its p (`experiments.figures.compare`). Where there
are several seeds, the last table has each seed's difference to the baseline, with all texts
together, and its mean: what all seeds have in common. All of it comes from the CSV files that
``python -m experiments`` writes, so it needs none of the runs' folders. The plots are written
beside them; the pages there, ``.md``, get their tables between the lines
``<!-- tables of NAME -->`` and ``<!-- end of NAME -->``.
"""

import argparse
import re
import statistics
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence, Tuple

from experiments.figures import collect, plots
from experiments.figures.compare import REACHED
from experiments.runner.plan import ROOT, PlanError, read

COMMAND = "python -m experiments.figures.tables"
TRAINING = "training"
CHOICE = "length penalty"
Rows = Sequence[Dict[str, str]]


def main() -> None:
    """Print the tables of all figures, put them into the pages, and draw the plots."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=ROOT / "experiments" / "plan.yaml")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "results" / "results.csv")
    args = parser.parse_args()
    try:
        order = declared_order(args.plan)
        names = ("curves", "compared")
        paths = [args.csv, *(collect.beside(args.csv, name) for name in names)]
        found, curves, compared = (sort(collect.read(path), order) for path in paths)
    except FileNotFoundError as error:
        sys.exit(f"{COMMAND}: no {error.filename}; first: python -m experiments")
    except (PlanError, OSError) as error:
        sys.exit(f"{COMMAND}: {error}")
    pages = {page: page.read_text(encoding="utf-8") for page in args.csv.parent.glob("*.md")}
    for name in dict.fromkeys(row["experiment"] for row in found):
        rows, points, others = (
            [row for row in some if row["experiment"] == name] for some in (found, curves, compared)
        )
        made = "".join(f"{part}\n" for part in tables(rows, others))
        print(f"## {name}: {rows[0]['task']}\n\n{made}", end="")
        pages = {page: placed(text, name, made) for page, text in pages.items()}
        plots.arms(values(rows), args.csv.with_name(f"{args.csv.stem}-{name}.svg"))
        plots.curves(_curves(points), args.csv.with_name(f"{args.csv.stem}-{name}-curves.svg"))
    for page, text in pages.items():
        page.write_text(text, encoding="utf-8")


def declared_order(path: Path) -> List[Tuple[str, str]]:
    """Return experiments and arms of a plan, as they are declared."""
    return list(dict.fromkeys((run.experiment, run.arm) for run in read(path, ROOT / "runs")))


def sort(rows: Rows, order: Sequence[Tuple[str, str]]) -> Rows:
    """Return the rows in the order of the plan, seed by seed; what it does not have comes last."""
    places = {which: place for place, which in enumerate(order)}

    def place(row: Dict[str, str]) -> Tuple[int, int]:
        return places.get((row["experiment"], row["arm"]), len(places)), int(row["seed"])

    return sorted(rows, key=place)


def placed(page: str, name: str, made: str) -> str:
    """Return a page with the tables of an experiment in their place, if it has one for them."""
    begin, end = f"<!-- tables of {name} -->\n", f"<!-- end of {name} -->\n"
    region = re.compile(f"(?<={re.escape(begin)}).*?(?={re.escape(end)})", re.DOTALL)
    return region.sub(lambda _: f"\n{made}", page)


def tables(rows: Rows, compared: Rows) -> Iterator[str]:
    """Yield the tables of one experiment, each below what it is about.

    Parameters
    ----------
    rows, compared : sequence of dict
        The figures of its runs, and those that need the baseline.
    """
    found = values([*rows, *(row for row in compared if row["measure"] == REACHED)])
    measures = list(dict.fromkeys(name for figures in found.values() for name in figures))
    for group in dict.fromkeys(_group(name) for name in measures):
        names = [name for name in measures if _group(name) == group]
        heads = [name if group == TRAINING else name[len(group) + 1 :] for name in names]
        lines = [["arm", "seeds", *heads]]
        for arm, figures in found.items():
            seeds = len({row["seed"] for row in rows if row["arm"] == arm})
            cells = (_cell(name, figures.get(name, []), seeds) for name in names)
            lines.append([arm, str(seeds), *cells])
        yield f"{group}\n\n{table(lines)}\n"
        differences = [row for row in compared if _group(row["measure"]) == group != TRAINING]
        if differences:
            baseline = differences[0]["baseline"]
            yield f"{group}, difference to {baseline} (p)\n\n{_differences(differences)}\n"
    pairs = _seed_by_seed(rows)
    if pairs:
        yield f"difference to {rows[0]['arm']}, seed by seed\n\n{pairs}\n"


def _seed_by_seed(rows: Rows) -> str:
    """Return one row an arm: each seed's difference to the first arm, and their mean with its ±.

    BLEU and chrF2 are averaged over the texts; perplexity is in % of the first arm's.
    """
    found = {(row["arm"], row["seed"], row["measure"]): float(row["value"]) for row in rows}
    first, *others = dict.fromkeys(row["arm"] for row in rows)
    seeds = list(dict.fromkeys(seed for arm, seed, _ in found if arm == first))
    columns: Dict[str, List[str]] = {}
    for measure in dict.fromkeys(row["measure"] for row in rows):
        text, _, score = measure.rpartition(" ")
        if score in ("BLEU", "chrF2") and " " not in text:  # not that of a length penalty
            columns.setdefault(score, []).append(measure)
        elif score == "perplexity" and _group(measure) != TRAINING:
            columns[f"{measure}, %"] = [measure]
    if len(seeds) < 2 or not columns or not others:
        return ""

    def difference(arm: str, seed: str, column: str) -> Optional[float]:
        each = []
        for measure in columns[column]:
            before, after = (found.get((which, seed, measure)) for which in (first, arm))
            if before is None or after is None:
                return None
            each.append(100 * (after / before - 1) if column.endswith("%") else after - before)
        return statistics.fmean(each)

    heads = [*(f"seed {seed}" for seed in seeds), "mean"]
    lines = [["arm", *(f"{column}, {head}" for column in columns for head in heads)]]
    for arm in others:
        cells = []
        for column in columns:
            each = [difference(arm, seed, column) for seed in seeds]
            known = [value for value in each if value is not None]
            cells += ["" if value is None else f"{value:+.2f}" for value in each]
            spread = f" ± {statistics.stdev(known):.2f}" if len(known) > 1 else ""
            cells.append(f"{statistics.fmean(known):+.2f}{spread}" if known else "")
        lines.append([arm, *cells])
    return table(lines)


def _group(measure: str) -> str:
    group = measure.split()[0]
    return TRAINING if group in ("validation", "updates", "seconds", "minutes") else group


def values(rows: Rows) -> Dict[str, Dict[str, List[float]]]:
    """Return the figures of all seeds, by arm and measure."""
    found: Dict[str, Dict[str, List[float]]] = {}
    for row in rows:
        measures = found.setdefault(row["arm"], {})
        measures.setdefault(row["measure"], []).append(float(row["value"]))
    return found


def _curves(rows: Rows) -> Dict[str, List[collect.Curve]]:
    """Return the curves of all seeds, by arm."""
    found: Dict[str, Dict[str, collect.Curve]] = {}
    for row in rows:
        curve = found.setdefault(row["arm"], {}).setdefault(row["seed"], [])
        curve.append((int(row["updates"]), float(row["perplexity"])))
    return {arm: list(curves.values()) for arm, curves in found.items()}


def _differences(rows: Rows) -> str:
    """Return one row an arm: for each seed the differences to the baseline, and their p."""
    found = {(row["arm"], row["seed"], row["measure"]): row for row in rows}
    seeds = sorted({row["seed"] for row in rows}, key=int)
    measures = list(dict.fromkeys(row["measure"] for row in rows))
    heads = (f"{name.split()[-1]}, seed {seed}" for seed in seeds for name in measures)
    lines = [["arm", *heads]]
    for arm in dict.fromkeys(row["arm"] for row in rows):
        cells = (found.get((arm, seed, name)) for seed in seeds for name in measures)
        lines.append([arm, *("" if cell is None else _difference(cell) for cell in cells)])
    return table(lines)


def _difference(row: Dict[str, str]) -> str:
    sure = f" (p = {float(row['p']):.3f})" if row["p"] else ""
    return f"{float(row['value']):+.1f}{sure}"


def _cell(measure: str, found: Sequence[float], seeds: int) -> str:
    if not found:
        return ""
    if measure == CHOICE:  # one of few, of which no seed may have chosen the mean
        return ", ".join(f"{value:g}" for value in found)
    mean = _four_digits(statistics.fmean(found))
    if len(found) > 1:
        mean += f" ± {statistics.stdev(found):.2g}"
    return mean if len(found) == seeds else f"{mean} ({len(found)} of {seeds})"


def _four_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10_000 else f"{value:.4g}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as a Markdown table; the first line is its head."""
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


if __name__ == "__main__":
    main()
