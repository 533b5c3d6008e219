"""The quick start's trainings: two criteria side by side, their progress and their figures."""

import collections
import concurrent.futures
import hashlib
import json
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Deque, Dict, NamedTuple, NoReturn, Optional, Sequence

import torch

from fairseq_skd.commands.logs import parse_line, read_log
from fairseq_skd.options import SelfKDOptions

ROOT = Path(__file__).resolve().parents[2]
LOG_INTERVAL = 50
# ve-fairseq 0.12.3 drops the sentences that are left over when it fills batches up to a multiple
# of 8, its default, in validation and test too. A multiple of 1 leaves none over.
BATCHES = ["--required-batch-size-multiple", "1"]


class Training(NamedTuple):
    """What the arms of a comparison share.

    Attributes
    ----------
    title : str
        What is trained.
    folder : Path
        Holds ``data``, and gets a folder for each arm.
    options : sequence of str
        Task, model and optimisation.
    test : sequence of str
        The command that looks at the test set, and its options.
    updates, max_tokens, seed : int
        Of fairseq-train.
    """

    title: str
    folder: Path
    options: Sequence[str]
    test: Sequence[str]
    updates: int
    max_tokens: int
    seed: int

    @property
    def data(self) -> Path:
        """What fairseq-preprocess has written."""
        return self.folder / "data"


class Arm:
    """One criterion: a training, what it makes of the test set, and its figures."""

    def __init__(self, name: str, criterion: Sequence[str], training: Training) -> None:
        self.name = name
        self.training = training
        shared = [training.options, training.updates, training.max_tokens, training.seed]
        # What is not given has its default, which another version may have changed.
        settings = json.dumps([criterion, *shared, SelfKDOptions().signature()])
        key = hashlib.sha256(settings.encode()).hexdigest()[:8]
        # Other settings are another run: they must not go on from this one's checkpoint.
        self.folder = training.folder / f"{name.replace(' ', '-')}-{key}"
        self.checkpoint = self.folder / "checkpoint_best.pt"
        self.train_log = self.folder / "train.log"
        self.process: Optional[subprocess.Popen[str]] = None
        self.command = [
            *("fairseq-train", training.data, "--user-dir", ROOT / "fairseq_skd"),
            *(*criterion, *training.options, *BATCHES, "--max-tokens", training.max_tokens),
            *("--max-update", training.updates, "--seed", training.seed),
            *("--save-dir", self.folder, "--save-interval-updates", 100),
            *("--keep-interval-updates", 1, "--validate-interval-updates", 250),
            *("--no-epoch-checkpoints", "--log-format", "json", "--log-interval", LOG_INTERVAL),
        ]

    @property
    def done(self) -> bool:
        """Whether it is trained to the end."""
        return (self.folder / "done").exists()

    def train(self) -> None:
        """Train to the end, from the last checkpoint if there is one."""
        self.folder.mkdir(parents=True, exist_ok=True)
        run(self.command, self.train_log, self._progress, self._started)
        (self.folder / "done").touch()

    def stop(self) -> None:
        """End the training; the same command goes on with it."""
        if self.process is not None:
            self.process.terminate()

    def quoted(self) -> str:
        """Return the training's command, as a shell takes it."""
        return shlex.join(map(str, self.command))

    def _started(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def _progress(self, line: str) -> None:
        kind, values = parse_line(line)
        if kind == "train_inner":
            done, seconds = int(values["num_updates"]), values["train_wall"] / LOG_INTERVAL
            left = (self.training.updates - done) * seconds / 60
            print(
                f"  {self.name:<16}update {done:>5} of {self.training.updates}   "
                f"loss {values['loss']:>6}   {seconds:.2f} s an update   "
                f"about {left:.1f} minutes left",
                flush=True,
            )
        elif kind == "valid":
            print(f"  {self.name:<16}validation perplexity {values['ppl']}", flush=True)

    def test(self) -> str:
        """Return what the test set's command prints about the best checkpoint."""
        output = self.folder / "test.out"
        if not output.exists():
            program, *options = self.training.test
            step(f"{program} with {self.name}")
            partial = self.folder / "test.partial"
            plugin = ["--user-dir", ROOT / "fairseq_skd"]
            best = ["--path", self.checkpoint, *options, *BATCHES]
            run([program, self.training.data, *plugin, *best], partial)
            partial.rename(output)
        return output.read_text(encoding="utf-8")

    def figures(self) -> Dict[str, Optional[float]]:
        """Return the best validation perplexity and the median seconds of an update."""
        log = read_log(self.train_log)
        return {
            "valid_ppl": min(fields["ppl"] for fields in log.valid),
            "seconds": log.seconds_an_update(),
        }


def train(arms: Sequence[Arm]) -> None:
    """Train those that are not done side by side, each with its share of the cores.

    Two small trainings with a core each take less time than one after the other with two.
    """
    missing = [arm for arm in arms if not arm.done]
    if not missing:
        return
    training, names = missing[0].training, " and ".join(arm.name for arm in missing)
    step(
        f"Training {training.title} with {names}: {training.updates} updates, side by side on "
        f"{_device()}"
    )
    cores = os.cpu_count() or 1
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // len(missing))))
    with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
        futures = [pool.submit(arm.train) for arm in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            for arm in missing:
                arm.stop()
            raise


def run(
    command: Sequence[Any],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
    started: Callable[["subprocess.Popen[str]"], None] = lambda process: None,
) -> None:
    """Run a command, keep its output in a log and hand on every line; stop on failure."""
    arguments = [str(argument) for argument in command]
    print(f"  $ {shlex.join([short(a) for a in arguments])}", flush=True)
    # The commands of this interpreter's environment, whether or not it is activated.
    arguments[0] = str(Path(sys.executable).parent / arguments[0])
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            arguments, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, cwd=ROOT
        )
        started(process)
        assert process.stdout is not None
        tail: Deque[str] = collections.deque(maxlen=15)
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                on_line(line.rstrip("\n"))
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status != 0:
        stop(f"{arguments[0]} failed; the end of {short(log)}:\n{''.join(tail)}")


def short(path: Any) -> str:
    """Return a path as it is from here."""
    return os.path.relpath(path) if os.path.isabs(path) else str(path)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} cores"


def step(title: str) -> None:
    """Say what comes next."""
    print(f"\n{title}", flush=True)


def stop(message: str) -> NoReturn:
    """End the quick start with a sentence."""
    sys.exit(f"\nThe quick start has stopped: {message}")
