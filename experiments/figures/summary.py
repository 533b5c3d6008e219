"""The page of results, in a table and a plot: ``python -m experiments.figures.summary``.

A row is an arm of an experiment with several seeds, under a name that says what it is, and its
differences to the baseline of the same experiment, paired by seed: perplexity in per cent, BLEU and
chrF2 averaged over the test sets. Everything comes from the CSV files in ``docs/results``.
"""

import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Sequence

from experiments.figures import collect
from experiments.figures.tables import placed, table
from experiments.runner.plan import ROOT
from fairseq_skd.commands import pictures
from fairseq_skd.commands.compare import student_interval

RESULTS = ROOT / "docs" / "results"


class Line(NamedTuple):
    """What is shown: a task, an arm, and where both stand in the CSV files."""

    task: str
    name: str
    csv: str
    experiment: str
    arm: str
    page: str = ""  # if it is not called like the experiment


# Of translation, and of language models (cross-entropy, by our loss or by fairseq's).
BASELINES = ("label_smoothing", "weight=0", "cross_entropy")
FAR = 50  # per cent of perplexity
DEFAULTS = "cosine,sigma_scale=0.5,weight=0.5"
LINES = [
    Line("WikiText-2, 33,000 words", "neighbours, from the end of the warm-up",
         "results", "recipe_wikitext2", f"{DEFAULTS},start=500"),
    Line("WikiText-2, 10,000 words", "neighbours, from the end of the warm-up",
         "results", "comparison_wikitext2", f"{DEFAULTS},start=500"),
    Line("WikiText-2, 10,000 words", "neighbours, from a quarter on",
         "results", "comparison_wikitext2", DEFAULTS),
    Line("WikiText-2, 10,000 words", "the model's prediction",
         "results", "comparison_wikitext2", "cosine,prediction,sigma_scale=0.5,weight=0.5"),
    Line("WikiText-2, 10,000 words", "both",
         "results", "comparison_wikitext2", "cosine,both,sigma_scale=0.5,weight=0.5"),
    Line("WikiText-2, 10,000 words", "control: all words alike",
         "results", "comparison_wikitext2", "uniform,weight=0.5,max_mass=0.05"),
    Line("the same, six passes instead of three", "neighbours, from a quarter on",
         "wikitext2-long", "comparison_wikitext2_long", "defaults", "comparison_wikitext2"),
    Line("Multi30k, 10,000 pairs, 40 passes", "past, the default",
         "low-resource-past", "low_resource_past", "past,trusted=0.5", "low_resource"),
    Line("Multi30k, 10,000 pairs, 40 passes", "past, averaged over the epochs, weight 1",
         "low-resource-past", "low_resource_averaged", "past_averaged=1", "low_resource"),
    Line("Multi30k, 10,000 pairs, 40 passes", "past, believed everywhere alike",
         "low-resource", "low_resource", "past=0.5"),
    Line("Multi30k, 6 passes", "neighbours, light", "results", "comparison", DEFAULTS),
    Line("Multi30k, 6 passes", "neighbours, heavy", "results", "comparison", "cosine,weight=0.4"),
    Line("Multi30k, 6 passes", "control: all words alike",
         "results", "comparison", "uniform,weight=0.4"),
    Line("Multi30k, 6 passes", "R-Drop (twice the time)", "results", "comparison", "r_drop"),
    Line("Multi30k, 6 passes", "R-Drop, equal time",
         "results", "comparison", "r_drop,equal_time"),
    Line("Multi30k, 12 passes", "neighbours, heavy",
         "results", "comparison_long", "cosine,weight=0.4"),
    Line("Multi30k, 12 passes", "the model's prediction",
         "results", "comparison_long", "cosine,prediction,weight=0.4"),
]  # fmt: skip


def main() -> None:
    """Put the table into the page and draw the plot."""
    found = {name: collect.read(RESULTS / f"{name}.csv") for name in {line.csv for line in LINES}}
    page = RESULTS.parent / "results.md"
    text = page.read_text(encoding="utf-8")
    page.write_text(placed(text, "summary", summary(found)), encoding="utf-8")
    draw(found, RESULTS / "summary.svg")
    print(summary(found), end="")


def summary(found: Dict[str, List[Dict[str, str]]]) -> str:
    """Return the table as Markdown."""
    lines = [["task", "self-KD", "seeds", "perplexity", "BLEU", "chrF2"]]
    task = ""
    for line in LINES:
        differences = {
            kind: paired(found[line.csv], line, kind) for kind in ("perplexity", "BLEU", "chrF2")
        }
        seeds = len(differences["perplexity"])
        page = line.page or line.experiment
        shown = f"[{line.task}](results/{page}.md)" if line.task != task else ""
        task = line.task
        cells = (_cell(values, kind) for kind, values in differences.items())
        lines.append([shown, line.name, str(seeds), *cells])
    return f"{table(lines)}\n"


def paired(rows: Sequence[Dict[str, str]], line: Line, kind: str) -> List[float]:
    """Return the difference to the baseline of each seed: perplexity in per cent, or score."""
    ours = [row for row in rows if row["experiment"] == line.experiment]
    baseline = next(arm for arm in BASELINES if any(row["arm"] == arm for row in ours))
    test = any(row["measure"] == "test perplexity" for row in ours)
    differences = []
    for seed in dict.fromkeys(row["seed"] for row in ours):
        values: Dict[str, List[float]] = {baseline: [], line.arm: []}
        for row in ours:
            text, _, score = row["measure"].rpartition(" ")
            if kind == "perplexity":
                wanted = row["measure"] == f"{'test' if test else 'validation'} perplexity"
            else:
                wanted = score == kind and " " not in text
            if wanted and row["seed"] == seed and row["arm"] in values:
                values[row["arm"]].append(float(row["value"]))
        if not all(values.values()):
            continue
        base, other = (statistics.fmean(values[arm]) for arm in (baseline, line.arm))
        differences.append(100 * (other / base - 1) if kind == "perplexity" else other - base)
    return differences


def _cell(values: Sequence[float], kind: str) -> str:
    if not values:
        return ""
    unit = " %" if kind == "perplexity" else ""
    low, high = student_interval(values)
    mean = statistics.fmean(values)
    digits = 1 if kind == "perplexity" else 2
    text = f"{mean:+.{digits}f}{unit} ({low:+.{digits}f} to {high:+.{digits}f})"
    sure = low > 0 or high < 0
    return f"**{text}**" if sure else text


def draw(found: Dict[str, List[Dict[str, str]]], path: Path) -> None:
    """Draw a line an arm: every seed's difference, and their mean (SVG).

    Without arms that are so far away that nothing could be told of the others.
    """
    lines = [
        line
        for line in LINES
        if abs(statistics.fmean(paired(found[line.csv], line, "perplexity"))) < FAR
    ]
    pyplot = pictures.pyplot()
    figure, axes = pyplot.subplots(1, 2, figsize=(9.5, 0.9 + 0.27 * len(lines)), sharey=True)
    titles = {"perplexity": "perplexity, % (less is better)", "BLEU": "BLEU (more is better)"}
    for axis, (kind, title) in zip(axes, titles.items()):
        for place, line in enumerate(lines):
            values = paired(found[line.csv], line, kind)
            axis.scatter(values, [place] * len(values), s=10, color="0.6", zorder=2)
            if values:
                mean = statistics.fmean(values)
                axis.scatter([mean], [place], s=40, marker="|", color="black", zorder=3)
        axis.axvline(0, color="black", linewidth=0.8)
        axis.set_xlabel(title)
    names = [f"{line.task}: {line.name}" for line in lines]
    axes[0].set_yticks(range(len(lines)), names, fontsize=8)
    axes[0].invert_yaxis()
    pictures.save_plot(figure, path)


if __name__ == "__main__":
    main()
