"""The figures of a run, read from the log of its training and the output of its evaluation."""

import csv
import platform
import re
import shlex
import statistics
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple, Union

import sacrebleu
import torch
from fairseq import __version__ as fairseq_version

from fairseq_skd import __version__
from results.plan import ROOT, Run

EVALUATION = "evaluation.txt"
Row = Dict[str, Union[str, int, float]]

# What sacrebleu prints in one line: name and signature, score, and for BLEU what follows it.
_SCORE = re.compile(r"^ *((BLEU|chrF2)\|\S+) = ([\d.]+)(?:.*\(BP = [\d.]+ ratio = ([\d.]+))?")
_PERPLEXITY = re.compile(r"^(valid|test): perplexity ([\d.]+) a word .* at least (\d+) words")


def complete(run: Run) -> bool:
    """Whether a run is trained and scored."""
    return (run.folder / "done").exists() and (run.folder / EVALUATION).exists()


def rows(run: Run) -> List[Row]:
    """Return a row for each figure of a complete run, each with all that repeats it."""
    conditions = {
        "command": shlex.join([_short(argument) for argument in run.train]),
        "fairseq_skd": __version__,
        "fairseq": fairseq_version,
        "torch": torch.__version__,
        "sacrebleu": sacrebleu.__version__,
        "python": platform.python_version(),
    }
    which: Row = {"task": run.task, "arm": run.arm, "seed": run.seed}
    log = (run.folder / "train.log").read_text(encoding="utf-8")
    evaluation = (run.folder / EVALUATION).read_text(encoding="utf-8")
    figures = [*_training(log), *scores(evaluation)]
    return [
        {**which, "measure": measure, "value": value, "signature": signature, **conditions}
        for measure, value, signature in figures
    ]


def _training(log: str) -> Iterator[Tuple[str, float, str]]:
    """Yield validation figures at the lowest perplexity, and what an update takes."""
    valid = [_fields(line) for line in log.splitlines() if " | valid | " in line]
    best = min(valid, key=lambda fields: fields["ppl"])
    yield "validation perplexity", best["ppl"], ""
    yield "updates to it", best["num_updates"], ""
    yield "updates", valid[-1]["num_updates"], ""
    # train_wall: seconds since the line before, without validation and saving.
    inner = [_fields(line) for line in log.splitlines() if " | train_inner | " in line]
    done = [0.0, *(fields["num_updates"] for fields in inner)]
    seconds = [
        fields["train_wall"] / (now - before)
        for fields, before, now in zip(inner, done, done[1:])
        if now > before  # not where the training was resumed
    ]
    if seconds:
        yield "seconds an update", round(statistics.median(seconds), 3), ""


def _fields(line: str) -> Dict[str, float]:
    """Return the figures of a line of fairseq's log, ``name value`` or ``name=value``."""
    found = re.findall(r"(\w+)[ =](-?[\d.]+(?:e[+-]?\d+)?)(?= \||,|$)", line.rstrip())
    return {name: float(value) for name, value in found}


def scores(evaluation: str) -> Iterator[Tuple[str, float, str]]:
    """Yield the scores of detokenised text, and perplexities with their context."""
    data: Optional[str] = None
    for line in evaluation.splitlines():
        if ", detokenised text" in line:
            data = line.split(",")[0]
        elif ", tokenised text" in line:
            data = None
        score, perplexity = _SCORE.match(line), _PERPLEXITY.match(line)
        if score and data:
            yield f"{data} {score[2]}", float(score[3]), score[1]
            if score[4]:
                yield f"{data} length ratio", float(score[4]), ""
        elif perplexity:
            signature = f"context:{perplexity[3]}"
            yield f"{perplexity[1]} perplexity", float(perplexity[2]), signature


def write(found: List[Row], path: Path) -> None:
    """Write rows, at least one, as CSV, whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with partial.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(found[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(found)
    partial.replace(path)


def _short(argument: str) -> str:
    return argument.replace(f"{ROOT}/", "")
