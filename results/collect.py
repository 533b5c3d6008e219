"""The figures of a run, read from the log of its training and the output of its evaluation."""

import csv
import json
import os
import platform
import re
import shlex
import statistics
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Tuple, Union

import sacrebleu
import torch
from fairseq import __version__ as fairseq_version

from fairseq_skd import __version__
from results.plan import ROOT, Run

Row = Dict[str, Union[str, int, float]]
Curve = List[Tuple[int, float]]

# What sacrebleu prints in one line: name and signature, score, and for BLEU what follows it.
_SCORE = re.compile(r"^ *((BLEU|chrF2)\|\S+) = ([\d.]+)(?:.*\(BP = [\d.]+ ratio = ([\d.]+))?")
_PERPLEXITY = re.compile(r"^(valid|test): perplexity ([\d.]+) a word .* at least (\d+) words")
# What `length_penalty_lines` writes.
_LENGTH_PENALTY = re.compile(r"^(length penalty(?: [\d.]+, valid BLEU)?): ([\d.]+)$")
# What `results.calibration` prints.
_CALIBRATION = re.compile(r"^calibration on (\w+): (.*)$")


def complete(run: Run) -> bool:
    """Whether a run is trained and scored."""
    return (run.folder / "done").exists() and run.evaluation.exists()


def began(run: Run, threads: int) -> None:
    """Note under which conditions a run is trained, unless that is noted already."""
    path = run.folder / "conditions.json"
    if not path.exists():
        conditions = {
            "fairseq_skd": __version__,
            "fairseq": fairseq_version,
            "torch": torch.__version__,
            "sacrebleu": sacrebleu.__version__,
            "python": platform.python_version(),
            "device": _device(threads),
            "training_minutes": 0.0,
        }
        path.write_text(json.dumps(conditions))


def trained_for(run: Run, minutes: float) -> None:
    """Add to the time that a run has taken; an interrupted one is trained in several parts."""
    path = run.folder / "conditions.json"
    conditions = json.loads(path.read_text())
    conditions["training_minutes"] = round(conditions["training_minutes"] + minutes, 2)
    path.write_text(json.dumps(conditions))


def _device(threads: int) -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    name = next((line.split(": ")[1] for line in lines if line.startswith("model name")), "CPU")
    return f"{name}, {threads} of {os.cpu_count()} cores"


def rows(run: Run) -> List[Row]:
    """Return a row for each figure of a complete run, each with all that repeats it."""
    conditions: Dict[str, Any] = json.loads((run.folder / "conditions.json").read_text())
    conditions["command"] = shlex.join([_short(argument) for argument in run.train])
    which: Row = {"experiment": run.experiment, "task": run.task, "arm": run.arm, "seed": run.seed}
    evaluation = run.evaluation.read_text(encoding="utf-8")
    figures = [*_training(log(run)), *scores(evaluation)]
    return [
        {**which, "measure": measure, "value": value, "signature": signature, **conditions}
        for measure, value, signature in figures
    ]


def log(run: Run) -> str:
    """Return the log of a training."""
    return (run.folder / "train.log").read_text(encoding="utf-8")


def curve(log: str) -> Curve:
    """Return the validation perplexity after so many updates, as often as it was measured."""
    valid = [_fields(line) for line in log.splitlines() if " | valid | " in line]
    return [(int(fields["num_updates"]), fields["ppl"]) for fields in valid]


def _training(log: str) -> Iterator[Tuple[str, float, str]]:
    """Yield validation figures at the lowest perplexity, and what an update takes."""
    valid = curve(log)
    updates, best = min(valid, key=lambda point: point[1])
    yield "validation perplexity", best, ""
    yield "updates to it", updates, ""
    yield "updates", valid[-1][0], ""
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
    """Yield what an evaluation has found: names, values, signatures.

    Scores of detokenised text, perplexities with their context, length penalties, calibration.
    """
    data: Optional[str] = None
    for line in evaluation.splitlines():
        if ", detokenised text" in line:
            data = line.split(",")[0]
        elif ", tokenised text" in line:
            data = None
        score, perplexity = _SCORE.match(line), _PERPLEXITY.match(line)
        calibration, penalty = _CALIBRATION.match(line), _LENGTH_PENALTY.match(line)
        if score and data:
            yield f"{data} {score[2]}", float(score[3]), score[1]
            if score[4]:
                yield f"{data} length ratio", float(score[4]), ""
        elif perplexity:
            signature = f"context:{perplexity[3]}"
            yield f"{perplexity[1]} perplexity", float(perplexity[2]), signature
        elif penalty:
            yield penalty[1], float(penalty[2]), ""
        elif calibration:
            for part in calibration[2].split(", "):
                name, value = part.rsplit(" ", 1)
                yield f"{calibration[1]} {name}", float(value), ""


def length_penalty_lines(found: Dict[float, float], best: Optional[float]) -> Iterator[str]:
    """Yield the lines of an evaluation that tell how its length penalty was chosen."""
    for penalty, bleu in found.items():
        yield f"length penalty {penalty}, valid BLEU: {bleu}\n"
    if best is not None:
        yield f"length penalty: {best}\n"


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
