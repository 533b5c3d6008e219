"""Plots of an experiment: what every arm reached, and how its validation perplexity fell."""

import statistics
from pathlib import Path
from typing import Dict, List

from experiments.figures.collect import Curve
from fairseq_skd.commands import pictures

# From the left; those that an experiment has none of are left out.
MEASURES = [
    *("valid BLEU", "test2016 BLEU", "test2017 BLEU", "coco BLEU"),
    *("test perplexity", "validation perplexity"),
]


def arms(values: Dict[str, Dict[str, List[float]]], path: Path) -> None:
    """Draw one row an arm and one panel a measure (SVG).

    A grey dot is a seed, a black line their mean; the long vertical line is the mean of the first
    arm, the baseline.

    Parameters
    ----------
    values : dict
        For each arm and measure the figures of all seeds.
    path : Path
        Of the SVG.
    """
    pyplot = pictures.pyplot()
    names = list(values)
    measures = [name for name in MEASURES if any(name in found for found in values.values())]
    figure, axes = pyplot.subplots(
        *(1, len(measures)),
        figsize=(2.5 + 2.2 * len(measures), 0.9 + 0.22 * len(names)),
        sharey=True,
        squeeze=False,
    )
    for axis, measure in zip(axes[0], measures):
        for place, name in enumerate(names):
            found = values[name].get(measure)
            if found:
                axis.scatter(found, [place] * len(found), s=12, color="0.6", zorder=2)
                mean = statistics.fmean(found)
                axis.scatter([mean], [place], s=60, marker="|", color="black", zorder=3)
        if measure in values[names[0]]:
            mean = statistics.fmean(values[names[0]][measure])
            axis.axvline(mean, color="black", linewidth=0.8)
        axis.set_xlabel(measure)
    axes[0][0].set_title(f"long line: {names[0]}", fontsize=8, loc="left")
    axes[0][0].set_yticks(range(len(names)), names)
    axes[0][0].invert_yaxis()
    pictures.save_plot(figure, path)


def curves(values: Dict[str, List[Curve]], path: Path) -> None:
    """Draw the validation perplexity after every so many updates, one line a run (SVG).

    Seeds of an arm share a colour. The axis shows what the last two thirds of the measurements
    need; the first ones are many times higher.

    Parameters
    ----------
    values : dict
        For each arm the curves of all seeds.
    path : Path
        Of the SVG.
    """
    pyplot = pictures.pyplot()
    figure, axis = pyplot.subplots(figsize=(8, 4.5))
    lines = ["-", "--", ":", "-."]  # beside colours, for print in grey
    shown = []
    for number, (name, runs) in enumerate(values.items()):
        for run, curve in enumerate(runs):
            style = {"color": f"C{number % 10}", "linestyle": lines[number % len(lines)]}
            axis.plot(*zip(*curve), **style, linewidth=1, label=name if run == 0 else None)
            shown += [perplexity for _, perplexity in curve[max(1, len(curve) // 3) :]]
    if shown:
        axis.set_ylim(min(shown) * 0.98, max(shown) * 1.02)
    axis.set_xlabel("updates")
    axis.set_ylabel("validation perplexity")
    axis.legend(fontsize=7, ncols=2)
    pictures.save_plot(figure, path)
