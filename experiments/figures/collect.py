"""The figures of a run, read from the log of its training and the output of its evaluation."""

import contextlib
import csv
import fcntl
import json
import math
import os
import platform
import re
import shlex
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple, Union

import sacrebleu
import torch
from fairseq import __version__ as fairseq_version

from benchmarks.measure import processor
from experiments.runner.plan import ROOT, PlanError, Run
from fairseq_skd import __version__
from fairseq_skd.commands.logs import Log, read_log

Row = Dict[str, Union[str, int, float]]
Curve = List[Tuple[int, float]]

# What sacrebleu prints in one line: name and signature, score, and for BLEU what follows it.
_SCORE = re.compile(r"^ *((BLEU|chrF2)\|\S+) = ([\d.]+)(?:.*\(BP = [\d.]+ ratio = ([\d.]+))?")
_PERPLEXITY = re.compile(r"^(valid|test): perplexity ([\d.]+) a word .* at least (\d+) words")
# What `length_penalty_lines` writes.
_LENGTH_PENALTY = re.compile(r"^(length penalty(?: ([\d.]+), valid BLEU)?): ([\d.]+)$")
# How figures of `fairseq-skd calibration` are called here.
_CALIBRATION = {
    **{"words": "words", "accuracy": "accuracy", "confidence": "confidence", "ece": "ECE"},
    **{"nll": "nll", "own_nll": "nll of its own choices"},
}
# What fairseq logs when it goes on from a checkpoint.
_RESUMED = re.compile(r"Loaded checkpoint .* \(epoch \d+ @ (\d+) updates\)")


def complete(run: Run) -> bool:
    """Whether a run is trained and scored, as it is declared.

    Raises
    ------
    PlanError
        If its folder holds a run that was declared otherwise.
    """
    path = run.folder / "conditions.json"
    if not path.exists():
        return False
    command = json.loads(path.read_text())["command"]
    if command != _training_command(run):
        raise PlanError(
            f"{run.folder} holds another run than is declared:\n  {command}\n"
            f"now:\n  {_training_command(run)}\nGive the arm another name, or remove the folder"
        )
    return (run.folder / "done").exists() and scored(run)


def scored(run: Run) -> bool:
    """Whether a run's text is scored, in the way that is declared."""
    return run.evaluation.exists() and scored_by(run) in run.evaluation.read_text(encoding="utf-8")


def scored_by(run: Run) -> str:
    """Return the line of an evaluation that tells how its text is scored."""
    command = _shown(run.evaluate(run.text))
    return f"scored by: {command}, of length penalties {list(run.length_penalties)}\n"


def began(run: Run, threads: int) -> None:
    """Note what is trained, and under which conditions, unless that is noted already."""
    path = run.folder / "conditions.json"
    if path.exists():
        return
    noted = {
        "fairseq_skd": __version__,
        "fairseq": fairseq_version,
        "torch": torch.__version__,
        "sacrebleu": sacrebleu.__version__,
        "python": platform.python_version(),
        "device": _device(threads),
        "command": _training_command(run),
    }
    partial = path.with_suffix(".partial")
    partial.write_text(json.dumps(noted))
    partial.replace(path)


def _training_command(run: Run) -> str:
    return " && ".join(_shown(command) for command in (run.branch, run.train) if command)


def _shown(command: Sequence[str]) -> str:
    return shlex.join([argument.replace(f"{ROOT}/", "") for argument in command])


def _device(threads: int) -> str:
    if torch.cuda.is_available():
        return f"{torch.cuda.device_count()} x {torch.cuda.get_device_name()}"
    return f"{processor()}, {threads} of {os.cpu_count()} cores"


def rows(run: Run, evaluation: Optional[Path] = None) -> List[Row]:
    """Return a row for each figure of a complete run; `conditions` has what repeats them."""
    text = (evaluation or run.evaluation).read_text(encoding="utf-8")
    return [
        {**which(run), "measure": measure, "value": value, "signature": signature}
        for measure, value, signature in (*_training(run), *scores(text))
    ]


def curve_rows(run: Run) -> List[Row]:
    """Return a row for each validation of a run."""
    return [{**which(run), "updates": n, "perplexity": round(p, 2)} for n, p in curve(run)]


def conditions(run: Run) -> Row:
    """Return one row with all that repeats the figures of a complete run."""
    noted: Row = json.loads((run.folder / "conditions.json").read_text())
    found = scores(run.evaluation.read_text(encoding="utf-8"))
    penalty = next((value for name, value, _ in found if name == "length penalty"), None)
    commands = (run.evaluate(run.text, penalty), run.calibrate)
    trunk = _shown(run.trunk.run.train) if run.trunk else ""
    return {
        **which(run),
        **noted,
        "evaluation": " && ".join(map(_shown, commands)),
        "prepare": _shown(run.prepare),
        "trunk": trunk,
        "resumed": _resumed(run),
    }


def _resumed(run: Run) -> str:
    """Return the updates after which the training was interrupted.

    Within an epoch fairseq goes on with other batches: such a run is not repeated exactly.
    """
    log = (run.folder / "train.log").read_text(encoding="utf-8")
    updates = _RESUMED.findall(log)
    return " ".join(updates[1:] if run.trunk else updates) or "never"


def which(run: Run) -> Row:
    """Return what tells a run from others, in every row."""
    return {"experiment": run.experiment, "task": run.task, "arm": run.arm, "seed": run.seed}


def curve(run: Run) -> Curve:
    """Return the validation perplexity after so many updates, as often as it was measured."""
    return [(int(fields["num_updates"]), _perplexity(run, fields)) for fields in _log(run).valid]


def _perplexity(run: Run, fields: Mapping[str, float]) -> float:
    if run.criterion.endswith("_with_rdrop"):
        # fairseq's R-Drop sums over every sentence twice, in validation too, and divides by the
        # words of one: what it logs is the square.
        return math.sqrt(fields["ppl"])
    return fields["ppl"]


def _training(run: Run) -> Iterator[Tuple[str, float, str]]:
    """Yield validation figures of the checkpoint that fairseq keeps as the best, and the costs."""
    log = _log(run)
    valid = log.valid
    best = min(reversed(valid), key=lambda fields: fields["loss"])  # of equal ones the last
    yield "validation perplexity", round(_perplexity(run, best), 2), ""
    yield "updates to it", int(best["num_updates"]), ""
    yield "updates", int(valid[-1]["num_updates"]), ""
    seconds = log.seconds_an_update(run.trunk.updates if run.trunk else 0)
    if seconds is not None:
        minutes = sum(fields["train_wall"] for fields in log.train) / 60
        yield "seconds an update", round(seconds, 3), ""
        yield "minutes of its own updates", round(minutes, 1), ""


def _log(run: Run) -> Log:
    return read_log(run.folder / "train.log")


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
        penalty = _LENGTH_PENALTY.match(line)
        if score and data:
            yield f"{data} {score[2]}", float(score[3]), score[1]
            if score[4]:
                yield f"{data} length ratio", float(score[4]), ""
        elif perplexity:
            signature = f"context:{perplexity[3]}"
            yield f"{perplexity[1]} perplexity", float(perplexity[2]), signature
        elif penalty:
            yield penalty[1], float(penalty[3]), ""
        elif line.startswith('{"calibration": '):
            for row in json.loads(line)["calibration"]:
                for name, shown in _CALIBRATION.items():
                    yield f"{row['text']} {shown}", round(float(row[name]), 4), ""


def length_penalty_lines(found: Dict[float, float], best: Optional[float]) -> Iterator[str]:
    """Yield the lines of an evaluation that tell how its length penalty was chosen."""
    for penalty, bleu in found.items():
        yield f"length penalty {penalty}, valid BLEU: {bleu}\n"
    if best is not None:
        yield f"length penalty: {best}\n"


def length_penalties(evaluation: str) -> Dict[float, float]:
    """Return the BLEU on validation text with each length penalty, from an evaluation."""
    lines = [_LENGTH_PENALTY.match(line) for line in evaluation.splitlines()]
    return {float(line[2]): float(line[3]) for line in lines if line and line[2]}


def write(found: List[Row], path: Path) -> None:
    """Write rows as CSV, whole or not at all.

    Rows of other runs that the file holds stay in it, since their folders may be elsewhere.
    """
    if not found:
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    with _alone(path.parent):  # another process may have found other rows
        if path.exists():
            old = read(path)
            ours = {_key(row) for row in found}
            found = [*(row for row in old if _key(row) not in ours), *found]
        partial = path.with_name(path.name + ".partial")
        with partial.open("w", newline="", encoding="utf-8") as file:
            writer = csv.DictWriter(file, list(found[-1]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(found)
        partial.replace(path)


def read(path: Path) -> List[Dict[str, str]]:
    """Return the rows that `write` has written; all that they hold is text."""
    with path.open(newline="", encoding="utf-8") as file:
        return list(csv.DictReader(file))


def beside(path: Path, what: str) -> Path:
    """Return where the runs' conditions or curves are, given the file of their figures."""
    return path.with_name(f"{path.stem}-{what}.csv")


@contextlib.contextmanager
def _alone(folder: Path) -> Iterator[None]:
    """Keep other processes that do the same out of a folder."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _key(row: Mapping[str, Any]) -> Tuple[str, ...]:
    return tuple(str(row[name]) for name in ("experiment", "task", "arm", "seed"))
