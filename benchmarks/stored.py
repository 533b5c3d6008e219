"""What a teacher's file costs: to write it, and to train from a large one that is on the disk.

``python -m benchmarks.stored writing DATA CHECKPOINT``: words a second of ``fairseq-skd teach``,
without and with sampled words, and of ``fairseq-validate``, which passes the same text through the
same model.
``python -m benchmarks.stored reading FOLDER``: seconds an update with a file of 10 GB of which
nothing is in memory, and with a small one.
"""

import argparse
import json
import os
import sys
import tempfile
from functools import partial
from pathlib import Path
from typing import Callable, Dict

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import in_turn, percentiles, run, seconds_of
from benchmarks.report import ROOT
from benchmarks.workloads import STORED, Shape, Training
from fairseq_skd import StoredTargets
from fairseq_skd.word_file import WordFile, checksum, make, pack

# The low-resource translation of docs/results: an update of a fifth of a second, in which a wait
# for the disk is seen. Those of `benchmarks.workloads` take ten times as long.
SHAPE = Shape(words=4_000, positions=1_200, dim=128, ffn=256, layers=3)
LENGTH = 25  # of every made-up sentence, as `Training` makes batches
TOP_K = 10


def main() -> None:
    """Measure one of the two."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="calls of each (default: 5)")
    commands = parser.add_subparsers(dest="command", required=True)
    one = commands.add_parser("writing")
    one.add_argument("data", type=Path, help="folder made by fairseq-preprocess, of a translation")
    one.add_argument("checkpoint", type=Path)
    other = commands.add_parser("reading")
    other.add_argument("folder", type=Path, help="on the disk that is tried; the file goes again")
    other.add_argument("--gigabytes", type=float, default=10, help="default: 10")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; allowed: 2 or more")
    if args.command == "writing":
        writing(args.data, args.checkpoint, args.rounds)
    else:
        reading(args.folder, args.gigabytes, args.rounds)


def writing(data: Path, checkpoint: Path, rounds: int) -> None:
    """Compare the commands on the training text, less what they take for the validation text.

    The difference holds no start of Python and no loading of the model, which take longer than a
    small text. Both take batches of 4,096 words.
    """
    texts = ("train", "valid")
    words: Dict[str, int] = {}
    with tempfile.TemporaryDirectory() as folder:

        def teach(text: str, sampled: int = 0) -> None:
            file = Path(folder, "teacher.skd")
            file.unlink(missing_ok=True)
            made = ("--output", file, "--subset", text, "--json", "--sampled", sampled)
            printed = run("fairseq-skd", "teach", data, "--path", checkpoint, *made)
            line = next(line for line in printed.splitlines() if line.startswith('{"teacher"'))
            words[text] = json.loads(line)["teacher"][0]["words"]

        def validate(text: str) -> None:
            like = ("--required-batch-size-multiple", 1, "--max-tokens", 4096)
            given = ("--task", "translation", "--path", checkpoint, "--valid-subset", text)
            run("fairseq-validate", data, "--user-dir", ROOT / "fairseq_skd", *given, *like)

        commands: Dict[str, Callable[[str], None]] = {
            "fairseq-validate": validate,
            "fairseq-skd teach": teach,
            "the same, --sampled 5": partial(teach, sampled=5),
        }
        calls: Dict[str, Callable[[], object]] = {
            f"{name}, {text}": partial(command, text)
            for name, command in commands.items()
            for text in texts
        }
        found = [{name: seconds_of(call) for name, call in calls.items()} for _ in range(rounds)]
    seconds = {name: percentiles([one[name] for one in found])["median"] for name in calls}
    table = Table(title=f"{words['train']:,} words of training text, {rounds} rounds, medians")
    for heading in ("command", "seconds", "on the validation text", "words a second", "ratio"):
        table.add_column(heading, justify="left" if heading == "command" else "right")
    base, more = 0.0, words["train"] - words["valid"]
    for name in commands:
        train, valid = (seconds[f"{name}, {text}"] for text in texts)
        if train <= valid:
            sys.exit(f"{name} takes no longer for the training text; it has to be a larger one")
        speed = more / (train - valid)
        base = base or speed
        table.add_row(name, f"{train:.1f}", f"{valid:.1f}", f"{speed:,.0f}", f"{speed / base:.2f}")
    Console(width=100).print(table)


def reading(folder: Path, gigabytes: float, rounds: int) -> None:
    """Compare updates of random sentences, of a file that the system has never read."""
    sentences = int(gigabytes * 1e9 / (6 * TOP_K * LENGTH))
    with tempfile.TemporaryDirectory(dir=folder) as place:
        large = made_up(Path(place, "large"), sentences)
        small = made_up(Path(place, "small"), 1_000)
        forget(large)
        updates = {"small file": Updates(small), f"{gigabytes:g} GB, cold": Updates(large)}
        found = in_turn(updates, rounds)
    table = Table(title=f"seconds an update, {rounds} rounds, medians")
    for heading in ("file", "seconds", "20th to 80th percentile", "ratio"):
        table.add_column(heading, justify="left" if heading == "file" else "right")
    base = 0.0
    for name, seconds in found.items():
        figures = percentiles(seconds)
        base = base or figures["median"]
        spread = f"{figures['p20']:.3f} to {figures['p80']:.3f}"
        ratio = figures["median"] / base
        table.add_row(name, f"{figures['median']:.3f}", spread, f"{ratio:.2f}")
    Console(width=100).print(table)


class Updates:
    """Training steps, each with other sentences of a file."""

    def __init__(self, path: Path) -> None:
        self.training = Training(SHAPE, STORED)
        self.teacher = StoredTargets(path)
        self.training.criterion.source._teacher = self.teacher
        self.generator = np.random.default_rng(1)

    def __call__(self) -> None:
        sample = self.training.sample
        drawn = self.generator.integers(len(self.teacher), size=len(sample["id"]))
        sample["id"] = torch.from_numpy(drawn)
        self.training()


def made_up(path: Path, sentences: int) -> Path:
    """Write a file of random words, the same few thousand sentences again and again."""
    lengths = np.full(sentences, LENGTH)
    head = {"kind": "stored", "text": "made up", "top_k": TOP_K}
    print(make(path, head, lengths, "a smaller --gigabytes"), flush=True)
    generator = np.random.default_rng(1)
    some = min(sentences, 20_000)
    ids = generator.integers(4, SHAPE.words, (some * LENGTH, TOP_K))
    block = pack(ids, np.full(ids.shape, 0.9 / TOP_K))
    sums = np.array([checksum(part) for part in block.reshape(some, LENGTH)], dtype="<u4")
    file = WordFile(path, writable=True)
    file.marks[:] = np.resize(sums, sentences)
    with path.open("r+b") as handle:
        handle.seek(file.sizes.words)
        for first in range(0, sentences, some):
            handle.write(block[: min(some, sentences - first) * LENGTH].tobytes())
    return path


def forget(path: Path) -> None:
    """Let the system forget what it has of a file in memory."""
    os.sync()
    handle = os.open(path, os.O_RDONLY)
    os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
    os.close(handle)


if __name__ == "__main__":
    main()
