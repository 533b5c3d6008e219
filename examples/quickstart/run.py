"""The quick start: label smoothing and self-KD, trained alike on real text and compared.

Run it with ``make quickstart``. Every step writes below one folder and is not repeated once it is
done; a training that was interrupted goes on from its last checkpoint.
"""

import argparse
import collections
import concurrent.futures
import hashlib
import json
import logging
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Deque, Dict, List, NoReturn, Optional, Sequence, Tuple

import sacrebleu
import sentencepiece
import torch
from corpus import (
    LONGEST,
    CorpusError,
    clean,
    fetch_help,
    languages_of,
    read_help,
    read_pairs,
    split,
    write,
)
from rich.console import Console
from rich.table import Table

from fairseq_skd.commands import explain, pictures
from fairseq_skd.commands.compare import paired, read_generated
from fairseq_skd.commands.logs import parse_line, read_log
from fairseq_skd.commands.teaching import settings_of
from fairseq_skd.commands.trained import load
from fairseq_skd.options import SelfKDOptions

ROOT = Path(__file__).resolve().parents[2]
LOG_INTERVAL = 50
# Of the help pages: a small model learns sentences of this length in minutes.
SHORT = 12
PIECES = 4000
ARMS = {
    "label smoothing": ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", "0.1"],
    "self-KD": ["--criterion", "self_kd", "--label-smoothing", "0.1"],
}
MODEL = [
    *("--arch", "transformer", "--share-all-embeddings"),
    *("--encoder-layers", "2", "--decoder-layers", "2"),
    *("--encoder-embed-dim", "128", "--decoder-embed-dim", "128"),
    *("--encoder-ffn-embed-dim", "256", "--decoder-ffn-embed-dim", "256"),
    *("--encoder-attention-heads", "4", "--decoder-attention-heads", "4", "--dropout", "0.1"),
]
# ve-fairseq 0.12.3 drops the sentences that are left over when it fills batches up to a multiple
# of 8, its default, in validation and test too. A multiple of 1 leaves none over.
BATCHES = ["--required-batch-size-multiple", "1"]
OPTIMISATION = [
    *("--optimizer", "adam", "--adam-betas", "(0.9, 0.98)", "--clip-norm", "1.0"),
    # Falls to 0 with the last update, so that the training has come to its end.
    *("--lr", "0.005", "--lr-scheduler", "cosine", "--warmup-updates", "200"),
]


def main() -> None:
    """Do what is not done yet, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE.tsv", help="your own corpus: source, tab, target"
    )
    parser.add_argument("--langs", default="en-de", help="two languages (default: %(default)s)")
    parser.add_argument("--updates", type=int, default=900, help="default: %(default)s")
    parser.add_argument("--max-tokens", type=int, default=3000, help="default: %(default)s")
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: runs/quickstart-<corpus>")
    args = parser.parse_args()
    if args.updates < 1:
        parser.error(f"--updates is {args.updates}; allowed: 1 or more")
    began = time.time()
    logging.disable(logging.INFO)
    try:
        languages = languages_of(args.langs)
        folder = (args.out or ROOT / "runs" / _name(args.pairs, args.langs)).resolve()
        print(f"Everything is kept in {_short(folder)}", flush=True)
        prepare_text(args.pairs, languages, folder)
    except CorpusError as error:
        _stop(str(error))
    # In names of files a hyphen stands between the two languages.
    source, target = (language.replace("-", "_") for language in languages)
    binarise(folder, (source, target))
    arms = [Arm(name, folder, args.updates, args.max_tokens, args.seed) for name in ARMS]
    train(arms)
    for arm in arms:
        arm.translate()
    report(arms, folder, (source, target))
    draw(arms, folder)
    print(f"Done in {(time.time() - began) / 60:.1f} minutes.")


def prepare_text(pairs: Optional[Path], languages: Tuple[str, str], folder: Path) -> None:
    """Get the corpus, split it, and cut it into the pieces of a joint vocabulary."""
    text, pieces = folder / "text", folder / "pieces"
    longest = LONGEST if pairs is not None else SHORT
    corpus = f"{_name(pairs, '-'.join(languages))}, up to {longest} words"
    if (text / "done").exists():
        held = (text / "done").read_text(encoding="utf-8")
        if held != corpus:
            raise CorpusError(f"{folder} is of {held}, not of {corpus}; --out takes another folder")
    else:
        if pairs is not None:
            _step(f"Corpus: {pairs}")
            found = read_pairs(pairs)
        else:
            _step("Corpus: the help pages of LibreOffice (MPL-2.0), from Debian's packages")
            download = ROOT / "runs" / "download"
            fetch_help(languages, download)
            found = read_help(languages, download)
        kept = clean(found, longest)
        print(f"  {len(found)} pairs, {len(kept)} after cleaning", flush=True)
        parts = split(kept, min(1000, max(1, len(kept) // 20)))
        write(parts, tuple(language.replace("-", "_") for language in languages), text)
        (text / "done").write_text(corpus, encoding="utf-8")
    if not (pieces / "done").exists():
        _step("Vocabulary: one sentencepiece model for both languages")
        pieces.mkdir(exist_ok=True)
        files = sorted(text.glob("train.*"))
        characters = set().union(*(set(file.read_text(encoding="utf-8")) for file in files))
        # Every character is a piece: of Chinese there may be more than all of them.
        size = max(PIECES, len(characters) + PIECES // 2)
        print(f"  {len(characters)} characters, at most {size} pieces", flush=True)
        sentencepiece.SentencePieceTrainer.train(
            input=",".join(map(str, files)),
            model_prefix=str(pieces / "joint"),
            model_type="bpe",
            vocab_size=size,
            hard_vocab_limit=False,
            character_coverage=1.0,
            minloglevel=2,
        )
        processor = sentencepiece.SentencePieceProcessor(model_file=str(pieces / "joint.model"))
        for plain in sorted(text.glob("*.*")):
            lines = plain.read_text(encoding="utf-8").splitlines()
            cut = processor.encode(lines, out_type=str)
            (pieces / plain.name).write_text(
                "".join(" ".join(line) + "\n" for line in cut), encoding="utf-8"
            )
        (pieces / "done").touch()


def binarise(folder: Path, languages: Tuple[str, str]) -> None:
    """Run fairseq-preprocess."""
    source, target = languages
    data, pieces = folder / "data", folder / "pieces"
    if (data / "done").exists():
        return
    _step("fairseq-preprocess")
    _run(
        [
            *("fairseq-preprocess", "--source-lang", source, "--target-lang", target),
            *("--trainpref", pieces / "train", "--validpref", pieces / "valid"),
            *("--testpref", pieces / "test", "--joined-dictionary", "--destdir", data),
        ],
        folder / "preprocess.log",
    )
    (data / "done").touch()


class Arm:
    """One criterion: a training, a translation of the test set, and their figures."""

    def __init__(self, name: str, folder: Path, updates: int, max_tokens: int, seed: int) -> None:
        self.name = name
        self.seed = seed
        self.data = folder / "data"
        self.updates = updates
        options = [ARMS[name], MODEL, OPTIMISATION, updates, max_tokens, seed]
        # What is not given has its default, which another version may have changed.
        settings = json.dumps([*options, SelfKDOptions().signature()])
        key = hashlib.sha256(settings.encode()).hexdigest()[:8]
        # Other settings are another run: they must not go on from this one's checkpoint.
        self.folder = folder / f"{name.replace(' ', '-')}-{key}"
        self.checkpoint = self.folder / "checkpoint_best.pt"
        self.train_log = self.folder / "train.log"
        self.process: Optional[subprocess.Popen[str]] = None
        self.command = [
            *("fairseq-train", self.data, "--user-dir", ROOT / "fairseq_skd"),
            *(ARMS[name] + MODEL + OPTIMISATION + BATCHES),
            *("--max-tokens", max_tokens, "--max-update", updates, "--seed", seed),
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
        _run(self.command, self.train_log, self._progress, self._started)
        (self.folder / "done").touch()

    def stop(self) -> None:
        """End the training; the same command goes on with it."""
        if self.process is not None:
            self.process.terminate()

    def _started(self, process: "subprocess.Popen[str]") -> None:
        self.process = process

    def _progress(self, line: str) -> None:
        kind, values = parse_line(line)
        if kind == "train_inner":
            done, seconds = int(values["num_updates"]), values["train_wall"] / LOG_INTERVAL
            left = (self.updates - done) * seconds / 60
            print(
                f"  {self.name:<16}update {done:>5} of {self.updates}   loss {values['loss']:>6}"
                f"   {seconds:.2f} s an update   about {left:.1f} minutes left",
                flush=True,
            )
        elif kind == "valid":
            print(f"  {self.name:<16}validation perplexity {values['ppl']}", flush=True)

    def translate(self) -> None:
        """Translate the test set with the best checkpoint."""
        output = self.folder / "test.out"
        if output.exists():
            return
        _step(f"fairseq-generate with {self.name}")
        partial = self.folder / "test.partial"
        _run(
            [
                *("fairseq-generate", self.data, "--user-dir", ROOT / "fairseq_skd"),
                *("--path", self.checkpoint, "--beam", 5, "--max-tokens", 4000),
                *("--max-len-a", 1.5, "--max-len-b", 10),
                *("--remove-bpe", "sentencepiece"),
                *BATCHES,
            ],
            partial,
        )
        partial.rename(output)

    def hypotheses(self) -> List[str]:
        """Return the translations in the order of the test set."""
        found = read_generated((self.folder / "test.out").read_text(encoding="utf-8").split("\n"))
        return [] if found is None else found[0]

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
    names = " and ".join(arm.name for arm in missing)
    _step(f"Training with {names}: {missing[0].updates} updates, side by side on {_device()}")
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


def report(arms: List[Arm], folder: Path, languages: Tuple[str, str]) -> None:
    """Print scores with their signatures and some translations; keep them as JSON."""
    source, reference = (
        (folder / "text" / f"test.{language}").read_text(encoding="utf-8").splitlines()
        for language in languages
    )
    systems = [(arm.name, arm.hypotheses()) for arm in arms]
    for name, hypotheses in systems:
        if len(hypotheses) != len(reference):
            _stop(f"{name}: {len(hypotheses)} translations of {len(reference)} test sentences")
    metrics = {"BLEU": sacrebleu.BLEU(), "chrF2": sacrebleu.CHRF()}
    signatures, scores = paired(systems, metrics, reference)
    results: Dict[str, Any] = {
        arm.name: {
            **{metric: scores[metric][i][0] for metric in metrics},
            **arm.figures(),
            "command": shlex.join(map(str, arm.command)),
        }
        for i, arm in enumerate(arms)
    }
    table = Table(
        title=f"{'-'.join(languages)}, {len(reference)} test sentences, seed {arms[0].seed}"
    )
    for heading in ("criterion", "BLEU", "chrF2", "validation perplexity", "seconds an update"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    for name, row in results.items():
        seconds = "" if row["seconds"] is None else f"{row['seconds']:.2f}"
        scores_of = f"{row['BLEU']:.1f}", f"{row['chrF2']:.1f}", f"{row['valid_ppl']:.2f}"
        table.add_row(name, *scores_of, seconds)
    console = Console(width=100, highlight=False)
    console.print()
    console.print(table)
    for metric, signature in signatures.items():
        _, bootstrap, randomisation = scores[metric][1]
        console.print(
            f"{metric}: p for no difference is {bootstrap:.3f} by the paired bootstrap, "
            f"{randomisation:.3f} by randomisation. {signature}",
            soft_wrap=True,
        )
        results.setdefault("signature", {})[metric] = signature
        results.setdefault("p_value", {})[metric] = {"bs": bootstrap, "ar": randomisation}
    console.print(
        "One seed: below 0.05 the difference on this test set is hardly chance; another seed may "
        "still show another one.\n"
    )
    for i in range(len(reference) // 6, len(reference), len(reference) // 3 + 1):
        lines = [("source", source[i]), ("reference", reference[i])]
        for label, text in lines + [(name, hypotheses[i]) for name, hypotheses in systems]:
            console.print(f"{label + ':':<17}{text}", markup=False, soft_wrap=True)
        console.print()
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")


def draw(arms: List[Arm], folder: Path) -> None:
    """Draw validation curves of both, and what the second has taught itself at five words."""
    pyplot = pictures.pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(13, 3.6), width_ratios=[1, 2])
    shown: List[float] = []
    for arm, style in zip(arms, ("--", "-")):
        log = read_log(arm.train_log)
        points = [(fields["num_updates"], fields["ppl"]) for fields in log.valid]
        left.plot(*zip(*points), style, color="black", label=arm.name)
        shown += [perplexity for _, perplexity in points[len(points) // 2 :]]
    left.set_ylim(min(shown) * 0.95, max(shown) * 1.05)
    left.set_xlabel("updates")
    left.set_ylabel("validation perplexity")
    left.legend(fontsize=8)
    trained = load(arms[-1].checkpoint, arms[-1].data)
    settings = settings_of(trained)
    rows: List[Dict[str, Any]] = []
    for sentence in range(min(30, len(trained.dataset("valid")))):
        rows += explain.positions(trained, settings, "valid", sentence)[0]
    # Words that a person can read: no pieces of words, no signs. Those that give away most.
    whole = [row for row in rows if all(word.isalpha() for word, _ in row["mixed"][:3])]
    chosen = sorted(whole or rows, key=lambda row: row["trained_on"])[:5]
    explain.heat_map(right, chosen, min(6, max(len(row["mixed"]) for row in chosen)))
    right.set_yticks([])
    right.set_title("what it teaches itself at five words of the validation text", fontsize=9)
    pictures.save_plot(figure, folder / "quickstart.png")


def _run(
    command: Sequence[Any],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
    started: Callable[["subprocess.Popen[str]"], None] = lambda process: None,
) -> None:
    """Run a command, keep its output in a log and hand on every line; stop on failure."""
    arguments = [str(argument) for argument in command]
    print(f"  $ {shlex.join([_short(a) for a in arguments])}", flush=True)
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
        _stop(f"{arguments[0]} failed; the end of {_short(log)}:\n{''.join(tail)}")


def _name(pairs: Optional[Path], langs: str) -> str:
    if pairs is None:
        return f"quickstart-{langs}"
    content = pairs.read_bytes() if pairs.is_file() else b""
    return f"quickstart-{pairs.stem}-{langs}-{hashlib.sha256(content).hexdigest()[:8]}"


def _short(path: Any) -> str:
    return os.path.relpath(path) if os.path.isabs(path) else str(path)


def _device() -> str:
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return f"{torch.get_num_threads()} cores"


def _step(title: str) -> None:
    print(f"\n{title}", flush=True)


def _stop(message: str) -> NoReturn:
    sys.exit(f"\nThe quick start has stopped: {message}")


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
