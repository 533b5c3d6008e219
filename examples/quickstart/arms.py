"""One training of the quick start: a language model or a translation."""

import concurrent.futures
import hashlib
import json
import os
import re
import subprocess
from pathlib import Path
from typing import Any, ClassVar, Dict, List, Optional, Sequence

import torch
from steps import ROOT, run, say, short, step, stop

from fairseq_skd.commands.compare import read_generated
from fairseq_skd.commands.logs import parse_line, read_log
from fairseq_skd.options import SelfKDOptions

LOG_INTERVAL = 50
LABEL_SMOOTHING = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"]
SELF_KD = ["--criterion", "self_kd", "--label-smoothing", "0.1"]
# ve-fairseq 0.12.3 drops the sentences that are left over when it fills batches up to a multiple
# of 8, its default, in validation and test too. A multiple of 1 leaves none over.
BATCHES = ["--required-batch-size-multiple", "1"]
# Blocks of text, without regard to its sentences: those of "eos" fail in ve-fairseq with numpy 2.
BLOCKS = ["--sample-break-mode", "none", "--tokens-per-sample", "64"]
OPTIMISATION = [
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0"),
    # Falls to 0 with the last update, so that the training has come to its end.
    *("--lr", "0.005", "--lr-scheduler", "cosine", "--warmup-updates", "200"),
]
# glibc gives large blocks back to the system at once. Label smoothing takes several of the size of
# all logits in every update, and would spend a part of its time on pages that are new each time:
# docs/performance.md. Other C libraries ignore this.
KEEP_MEMORY = {"MALLOC_MMAP_MAX_": "0", "MALLOC_TRIM_THRESHOLD_": str(2**34)}


class Arm:
    """A training, and what its model makes of the test set.

    Parameters
    ----------
    name : str
        Shown, and a part of its folder's name.
    options : sequence of str
        Of fairseq-train: the criterion, and the size where it is not the task's.
    folder : Path
        With ``data``; the training gets a folder of its own in it.
    updates, max_tokens, seed : int
        Options of fairseq-train.
    teacher : Path, optional
        What the training learns from, in ``folder``.
    """

    task: ClassVar[str]
    model: ClassVar[List[str]]
    output: ClassVar[str]

    def __init__(
        self,
        name: str,
        options: Sequence[str],
        folder: Path,
        updates: int,
        max_tokens: int,
        seed: int,
        teacher: Optional[Path] = None,
    ) -> None:
        self.name = name
        self.seed = seed
        self.teacher = teacher
        self.data = folder / "data"
        self.updates = updates
        given = [*self.model, *options, *OPTIMISATION]
        source = None if teacher is None else str(teacher.relative_to(folder))
        # What is not given has its default, which another version may have changed.
        defaults = SelfKDOptions().signature()
        settings = json.dumps([given, updates, max_tokens, seed, source, defaults])
        key = hashlib.sha256(settings.encode()).hexdigest()[:8]
        # Other settings are another run: they must not go on from this one's checkpoint.
        self.folder = folder / f"{name.replace(',', '').replace(' ', '-')}-{key}"
        self.checkpoint = self.folder / "checkpoint_best.pt"
        self.train_log = self.folder / "train.log"
        self.process: Optional[subprocess.Popen[str]] = None
        self.ended = False
        self.command = [
            *("fairseq-train", self.data, "--user-dir", ROOT / "fairseq_skd"),
            *(given + BATCHES),
            *([] if teacher is None else ["--self-kd-teacher", teacher]),
            *("--max-tokens", max_tokens, "--max-update", updates, "--seed", seed),
            *("--save-dir", self.folder, "--save-interval-updates", 100),
            *("--keep-interval-updates", 1, "--validate-interval-updates", 250),
            *("--no-epoch-checkpoints", "--log-format", "json", "--log-interval", LOG_INTERVAL),
        ]

    @property
    def done(self) -> bool:
        """Whether it is trained and tested."""
        return (self.folder / self.output).exists()

    def complete(self, environment: Dict[str, str]) -> None:
        """Train to the end, from the last checkpoint if there is one, then test."""
        self.folder.mkdir(parents=True, exist_ok=True)
        if not (self.folder / "done").exists():
            run(self.command, self.train_log, self._progress, self._started, environment)
            (self.folder / "done").touch()
        if not self.done:
            partial = self.folder / "test.partial"
            partial.unlink(missing_ok=True)
            run(self.test(), partial, started=self._started, environment=environment)
            partial.rename(self.folder / self.output)

    def test(self) -> List[Any]:
        """Return the command that tries the best checkpoint on the test set."""
        raise NotImplementedError

    def end(self) -> None:
        """End its training or test, also one that begins just now; the same command goes on."""
        self.ended = True
        if self.process is not None:
            self.process.terminate()

    def _started(self, process: "subprocess.Popen[str]") -> None:
        self.process = process
        if self.ended:
            process.terminate()

    def _progress(self, line: str) -> None:
        kind, values = parse_line(line)
        if kind == "train_inner":
            done, seconds = int(values["num_updates"]), values["train_wall"] / LOG_INTERVAL
            left = (self.updates - done) * seconds / 60
            say(
                f"  {self.name:<16}update {done:>5} of {self.updates}   loss {values['loss']:>6}"
                f"   {seconds:.2f} s an update   about {left:.1f} minutes left"
            )
        elif kind == "valid":
            say(f"  {self.name:<16}validation perplexity {values['ppl']}")

    def figures(self) -> Dict[str, Optional[float]]:
        """Return the best validation perplexity and the median seconds of an update."""
        log = read_log(self.train_log)
        return {
            "valid_ppl": min(fields["ppl"] for fields in log.valid),
            "seconds": log.seconds_an_update(),
        }


class LanguageModel(Arm):
    """A Transformer language model."""

    task = "language model"
    model: ClassVar[List[str]] = [
        *("--task", "language_modeling", *BLOCKS),
        *("--arch", "transformer_lm", "--share-decoder-input-output-embed"),
        # Without the second and third width the table of words stays 512 wide.
        *("--decoder-layers", "2", "--decoder-embed-dim", "128", "--decoder-input-dim", "128"),
        *("--decoder-output-dim", "128", "--decoder-ffn-embed-dim", "512"),
        *("--decoder-attention-heads", "4", "--dropout", "0.1"),
        # Perplexity is compared. The label-smoothed loss is lowest before it.
        *("--best-checkpoint-metric", "ppl"),
    ]
    output = "test.log"

    def test(self) -> List[Any]:
        """Return fairseq-eval-lm of the test set."""
        return [
            *("fairseq-eval-lm", self.data, "--user-dir", ROOT / "fairseq_skd"),
            # Half of a block is context only, so that no word is guessed from nothing.
            *("--path", self.checkpoint, "--context-window", 32, "--max-tokens", 4096),
            *BLOCKS,
        ]

    def perplexity(self) -> float:
        """Return the perplexity of the test set."""
        log = self.folder / self.output
        text = log.read_text(encoding="utf-8")
        found = re.search(r"Loss \(base 2\): .*, Perplexity: (.*)", text)
        if found is None:
            stop(f"there is no perplexity in {short(log)}; without it the same command tests again")
        return float(found[1])


def _size(layers: int, width: int) -> List[str]:
    return [
        *("--encoder-layers", str(layers), "--decoder-layers", str(layers)),
        *("--encoder-embed-dim", str(width), "--decoder-embed-dim", str(width)),
        *("--encoder-ffn-embed-dim", str(2 * width), "--decoder-ffn-embed-dim", str(2 * width)),
    ]


class Translation(Arm):
    """A Transformer that translates."""

    task = "translation"
    model: ClassVar[List[str]] = [
        *("--arch", "transformer", "--share-all-embeddings"),
        *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4", "--dropout", "0.1"),
    ]
    full_size: ClassVar[List[str]] = _size(2, 128)
    small_size: ClassVar[List[str]] = _size(1, 64)  # 0.29 of the parameters
    output = "test.out"

    def test(self) -> List[Any]:
        """Return fairseq-generate of the test set."""
        return [
            *("fairseq-generate", self.data, "--user-dir", ROOT / "fairseq_skd"),
            *("--path", self.checkpoint, "--beam", 5, "--max-tokens", 4000),
            *("--max-len-a", 1.5, "--max-len-b", 10),
            *("--remove-bpe", "sentencepiece"),
            *BATCHES,
        ]

    def teach(self) -> Path:
        """Write what the trained model gives to every word of the training text, unless done."""
        file, done = self.folder / "teacher.skd", self.folder / "taught"
        if not (done.exists() and file.exists()):
            step(f"What {self.name} gives to every word of the training text: ten words each")
            command = ["fairseq-skd", "teach", self.data, "--path", self.checkpoint]
            run([*command, "--output", file], self.folder / "teach.log")
            done.touch()
        return file

    def parameters(self) -> int:
        """Return the size of the model."""
        found = re.search(r"model params: ([\d,]+)", self.train_log.read_text(encoding="utf-8"))
        if found is None:
            stop(f"{short(self.train_log)} does not say how large the model is")
        return int(found[1].replace(",", ""))

    def hypotheses(self) -> List[str]:
        """Return the translations in the order of the test set."""
        generated = (self.folder / self.output).read_text(encoding="utf-8")
        found = read_generated(generated.split("\n"))
        return [] if found is None else found[0]


def run_all(arms: Sequence[Arm]) -> None:
    """Train and test those that are not done side by side, each with its share of the cores.

    Two small trainings with a core each take less time than one after the other with two.
    """
    missing = [arm for arm in arms if not arm.done]
    if not missing:
        return
    names = " and ".join(arm.name for arm in missing)
    step(
        f"{missing[0].task.capitalize()}, {names}: {missing[0].updates} updates and the test, "
        f"on {_device()}"
    )
    threads = max(1, (os.cpu_count() or 1) // len(missing))
    environment = {"OMP_NUM_THREADS": str(threads), **KEEP_MEMORY, **os.environ}
    with concurrent.futures.ThreadPoolExecutor(len(missing)) as pool:
        futures = [pool.submit(arm.complete, environment) for arm in missing]
        try:
            for future in concurrent.futures.as_completed(futures):
                future.result()
        except BaseException:
            for arm in missing:
                arm.end()
            raise


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} cores"
