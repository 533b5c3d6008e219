"""The figures of runs, in one CSV, and the table of docs/results.md that is made from it.

A row of the table is an arm of an experiment, with its differences to the experiment's baseline,
paired by seed: perplexity in per cent, BLEU and chrF2 averaged over the test sets.
"""

import csv
import re
import statistics
from pathlib import Path
from typing import Dict, Iterator, List, NamedTuple, Sequence, Tuple

from experiments.plan import ROOT, Run
from fairseq_skd.commands.compare import student_interval
from fairseq_skd.commands.logs import read_log

Row = Dict[str, str]
CSV = ROOT / "docs" / "results" / "results.csv"
PAGE = ROOT / "docs" / "results.md"
FIELDS = ["experiment", "task", "arm", "seed", "measure", "value", "machine"]
WHICH = ("experiment", "task", "arm", "seed")

# What sacrebleu and `perplexity` of the recipes print.
_SCORE = re.compile(r"^ *(BLEU|chrF2)\|\S+ = ([\d.]+)")
_PERPLEXITY = re.compile(r"^(valid|test): perplexity ([\d.]+) a word")


class Line(NamedTuple):
    """A row of the table: a task and an arm as people call them, and where the figures stand."""

    task: str
    page: str
    name: str
    experiment: str
    arm: str
    baseline: str = "label_smoothing"


QUICK = "quickstart_translation"
LINES = [
    Line("Multi30k, 10,000 pairs", "translation#the-same-size",
         "taught by four of its own size", "same_size", "taught_by_four"),
    Line("the same", "translation#the-same-size", "taught by two", "generations", "taught_by_two"),
    Line("the same", "translation#the-second-generation", "taught by its own first training",
         "generations", "taught_by_one"),
    Line("the same", "translation#the-second-generation", "third generation, taught by that",
         "generations", "third_generation"),
    Line("the same", "translation#training-twice-as-long", "not taught, but trained twice as long",
         "longer", "label_smoothing,longer"),
    Line("the same, twice as many updates, with and without", "translation#training-twice-as-long",
         "taught by four of its own size", "longer", "taught_by_four,longer",
         "label_smoothing,longer"),
    Line("Multi30k, 10,000 pairs, a quarter of the parameters",
         "translation#a-quarter-of-the-parameters",
         "taught by four full-size models", "small", "taught_by_four"),
    Line("the same", "translation#a-quarter-of-the-parameters", "taught by two", "small",
         "taught_by_two"),
    Line("the same, another processor", "translation#a-quarter-of-the-parameters",
         "taught by four full-size models", "sequence", "taught_by_four"),
    Line("the same", "translation#the-second-generation", "taught by its own first training",
         "past_teacher", "taught_by_a_small_one"),
    Line("the same, twice as many updates, with and without", "translation#training-twice-as-long",
         "taught by four full-size models", "small_longer", "taught_by_four,longer",
         "label_smoothing,longer"),
    Line("the same, trained on translations of the four",
         "translation#translations-instead-of-probabilities",
         "taught by four full-size models", "sequence", "sequence_level,taught_by_four"),
    Line("quick start, 29 % of the parameters, 11 passes", "translation#the-quick-start",
         "taught by one full-size model", "quickstart_taught", "taught_by_one"),
    Line("Multi30k, 10,000 pairs", "translation#the-default", "`neighbors`, the default",
         "default", "self_kd"),
    Line("Multi30k, 10,000 pairs", "translation#past", "`past`", "past", "past"),
    Line("quick start, translation, 11 passes", "translation#the-default",
         "`neighbors`, the default", QUICK, "self_kd"),
    Line("quick start, translation, 11 passes", "translation#past", "`past`", "quickstart_past",
         "past"),
    Line("WikiText-2, 33,000 words, three passes", "language_models#wikitext-2",
         "`neighbors` from the end of the warm-up", "wikitext2", "self_kd", "cross_entropy"),
    Line("WikiText-2, 10,000 words, six passes", "language_models#wikitext-2", "`neighbors`",
         "wikitext2_long", "neighbors", "cross_entropy"),
    Line("quick start, language model, 7 passes", "language_models#a-small-text", "`neighbors`",
         "quickstart_lm", "self_kd"),
    Line("quick start, language model, 7 passes", "language_models#taught-by-finished-models",
         "taught by four of its own size", "quickstart_lm_taught", "taught_by_four,sampled"),
    Line("the same", "language_models#taught-by-finished-models",
         "taught by its own first training", "quickstart_lm_taught", "taught_by_one,sampled"),
    Line("the same", "language_models#taught-by-finished-models",
         "taught by four, no words sampled", "quickstart_lm_taught", "taught_by_four"),
]  # fmt: skip


def rows(run: Run) -> List[Row]:
    """Return a row for each figure of a run that is trained and scored."""
    which = dict(zip(WHICH, (run.experiment, run.task, run.arm, str(run.seed))))
    log = read_log(run.folder / "train.log")
    best = min(reversed(log.valid), key=lambda fields: fields["loss"])  # of equal ones the last
    perplexity = best["ppl"]
    found: List[Tuple[str, float]] = [("validation perplexity", round(perplexity, 2))]
    seconds = log.seconds_an_update()
    if seconds is not None:
        found.append(("seconds an update", round(seconds, 3)))
    found += scores(run.evaluation.read_text(encoding="utf-8"))
    machine = run.machine.read_text(encoding="utf-8")
    figures = ({"measure": name, "value": str(value)} for name, value in found)
    return [{**which, **figure, "machine": machine} for figure in figures]


def scores(evaluation: str) -> Iterator[Tuple[str, float]]:
    """Yield what an evaluation has found: scores of detokenised text, and perplexities."""
    text = ""
    for line in evaluation.splitlines():
        if ", detokenised text" in line:
            text = line.split(",")[0]
        elif ", tokenised text" in line:
            text = ""
        score, perplexity = _SCORE.match(line), _PERPLEXITY.match(line)
        if score and text:
            yield f"{text} {score[1]}", float(score[2])
        elif perplexity:
            yield f"{perplexity[1]} perplexity", float(perplexity[2])


def write(found: Sequence[Row], path: Path) -> None:
    """Write rows, whole or not at all; those of other runs stay."""
    ours = {tuple(row[name] for name in WHICH) for row in found}
    old = read(path) if path.exists() else []
    kept = [row for row in old if tuple(row[name] for name in WHICH) not in ours]
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, FIELDS, lineterminator="\n")
        writer.writeheader()
        writer.writerows([*kept, *found])
    partial.replace(path)


def read(path: Path) -> List[Row]:
    """Return the rows that `write` has written."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def table(found: Sequence[Row], shown: Sequence[Line] = LINES) -> str:
    """Return the table as Markdown, without lines that have no figures yet."""
    lines = ["| task | self-KD | seeds | perplexity | BLEU | chrF2 |", "|---|---|---|---|---|---|"]
    for line in shown:
        differences = [paired(found, line, kind) for kind in ("perplexity", "BLEU", "chrF2")]
        if differences[0]:
            link = f"[{line.task}](results/{line.page.replace('#', '.md#')})"
            cells = (_cell(values, i == 0) for i, values in enumerate(differences))
            row = [link, line.name, str(len(differences[0])), *cells]
            lines.append(f"| {' | '.join(row)} |")
    return "".join(f"{line}\n" for line in lines)


def paired(found: Sequence[Row], line: Line, kind: str) -> List[float]:
    """Return the difference to the baseline with each seed: perplexity in per cent, or score."""
    ours = [row for row in found if row["experiment"] == line.experiment]
    test = any(row["measure"] == "test perplexity" for row in ours)
    perplexity = f"{'test' if test else 'validation'} perplexity"
    differences = []
    for seed in sorted({row["seed"] for row in ours}):
        means = []
        for arm in (line.baseline, line.arm):
            values = [
                float(row["value"])
                for row in ours
                if (row["arm"], row["seed"]) == (arm, seed)
                if row["measure"] == perplexity or kind != "perplexity"
                if kind == "perplexity" or row["measure"].endswith(f" {kind}")
            ]
            means.append(statistics.fmean(values) if values else None)
        base, other = means
        if base is not None and other is not None:
            relative = kind == "perplexity"
            differences.append(100 * (other / base - 1) if relative else other - base)
    return differences


def _cell(values: Sequence[float], relative: bool) -> str:
    if not values:
        return ""
    digits, unit = (1, " %") if relative else (2, "")
    mean = f"{statistics.fmean(values):+.{digits}f}{unit}"
    if len(values) < 2:
        return mean
    low, high = student_interval(values)
    text = f"{mean} ({low:+.{digits}f} to {high:+.{digits}f})"
    return f"**{text}**" if low > 0 or high < 0 else text


def placed(page: str, made: str) -> str:
    """Return a page with the table between its marks."""
    begin, end = "<!-- table -->\n", "<!-- end of table -->"
    before, _, rest = page.partition(begin)
    return f"{before}{begin}\n{made}{end}{rest.partition(end)[2]}"
