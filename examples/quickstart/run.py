"""The quick start: what self-KD gives to models that are trained in minutes, on real text.

First a language model of the source side, with label smoothing and with self-KD. Then translations:
a large model, and a small one, alone and taught by the large one.

Run it with ``make quickstart``. Every step writes below one folder and is not repeated once it is
done; a training that was interrupted goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import logging
import shlex
import shutil
import sys
import time
from pathlib import Path
from typing import Any, Dict, Iterable, List, Optional, Sequence, Tuple

import sacrebleu
import sentencepiece
from arms import LABEL_SMOOTHING, SELF_KD, Arm, LanguageModel, Translation, run_all
from corpus import (
    LONGEST,
    CorpusError,
    clean,
    fetch_help,
    languages_of,
    read_help,
    read_pairs,
    split,
    tokens,
    write,
)
from rich.console import Console
from rich.table import Table
from steps import ROOT, run, short, step, stop

from fairseq_skd.commands import explain, pictures
from fairseq_skd.commands.compare import paired
from fairseq_skd.commands.logs import read_log
from fairseq_skd.commands.teaching import settings_of
from fairseq_skd.commands.trained import load

# Of the help pages: a small model learns sentences of this length in minutes.
SHORT = 12
PIECES = 4000
# Words in a batch of the language model: 900 updates are seven passes over the help pages.
LANGUAGE_MODEL_TOKENS = 1024


def main() -> None:
    """Do what is not done yet, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE.tsv", help="your own corpus: source, tab, target"
    )
    parser.add_argument("--langs", default="en-de", help="two languages (default: %(default)s)")
    parser.add_argument(
        "--updates", type=int, default=900, help="of each training (default: %(default)s)"
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=3000,
        help="default: %(default)s; of them the language model takes at most "
        f"{LANGUAGE_MODEL_TOKENS}",
    )
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
        print(f"Everything is kept in {short(folder)}", flush=True)
        prepare_text(args.pairs, languages, folder)
    except CorpusError as error:
        stop(str(error))
    # In names of files a hyphen stands between the two languages.
    source, target = (language.replace("-", "_") for language in languages)
    results = {}
    model_folder = folder / LanguageModel.task.replace(" ", "-")
    # Words that are seen once are unknown.
    words = ["--only-source", "--thresholdsrc", "2"]
    binarise(folder / "words", f".{source}", words, model_folder / "data")
    length = args.updates, min(args.max_tokens, LANGUAGE_MODEL_TOKENS), args.seed
    models = [
        LanguageModel("label smoothing", LABEL_SMOOTHING, model_folder, *length),
        LanguageModel("self-KD", SELF_KD, model_folder, *length),
    ]
    run_all(models)
    results[LanguageModel.task] = report_language_model(models, source)
    pair = ["--source-lang", source, "--target-lang", target, "--joined-dictionary"]
    binarise(folder / "pieces", "", pair, folder / "data")
    translations = translate(folder, args.updates, args.max_tokens, args.seed)
    results[Translation.task] = report_translation(translations, folder, (source, target))
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    draw(models, translations, folder)
    print(f"Done in {(time.time() - began) / 60:.1f} minutes.")


def prepare_text(pairs: Optional[Path], languages: Tuple[str, str], folder: Path) -> None:
    """Get the corpus, split it, and cut it into words, and into pieces of a joint vocabulary."""
    text, cut, pieces = folder / "text", folder / "words", folder / "pieces"
    longest = LONGEST if pairs is not None else SHORT
    corpus = f"{_name(pairs, '-'.join(languages))}, up to {longest} words"
    if (text / "done").exists():
        held = (text / "done").read_text(encoding="utf-8")
        if held != corpus:
            raise CorpusError(f"{folder} is of {held}, not of {corpus}; --out takes another folder")
    else:
        if pairs is not None:
            step(f"Corpus: {pairs}")
            found = read_pairs(pairs)
        else:
            step("Corpus: the help pages of LibreOffice (MPL-2.0), from Debian's packages")
            download = ROOT / "runs" / "download"
            fetch_help(languages, download)
            found = read_help(languages, download)
        kept = clean(found, longest)
        print(f"  {len(found)} pairs, {len(kept)} after cleaning", flush=True)
        parts = split(kept, min(1000, max(1, len(kept) // 20)))
        write(parts, tuple(language.replace("-", "_") for language in languages), text)
        (text / "done").write_text(corpus, encoding="utf-8")
    if not (cut / "done").exists():
        cut.mkdir(exist_ok=True)
        for plain in sorted(text.glob("*.*")):
            write_lines(cut / plain.name, map(tokens, read_lines(plain)))
        (cut / "done").touch()
    if not (pieces / "done").exists():
        step("Vocabulary: one sentencepiece model for both languages")
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
            write_lines(pieces / plain.name, processor.encode(read_lines(plain), out_type=str))
        (pieces / "done").touch()


def read_lines(path: Path) -> List[str]:
    """Return the sentences of a file."""
    return path.read_text(encoding="utf-8").splitlines()


def write_lines(path: Path, lines: Iterable[List[str]]) -> None:
    """Write sentences that are cut, with spaces between the parts."""
    path.write_text("".join(" ".join(line) + "\n" for line in lines), encoding="utf-8")


def binarise(text: Path, suffix: str, options: List[str], data: Path) -> None:
    """Run fairseq-preprocess on the train, valid and test text of a folder, unless it is done."""
    if (data / "done").exists():
        return
    step("fairseq-preprocess")
    data.parent.mkdir(exist_ok=True)
    # It refuses a folder that an interrupted one left.
    shutil.rmtree(data, ignore_errors=True)
    parts = [
        argument
        for part in ("train", "valid", "test")
        for argument in (f"--{part}pref", text / f"{part}{suffix}")
    ]
    run(["fairseq-preprocess", *options, *parts, "--destdir", data], data.parent / "preprocess.log")
    (data / "done").touch()


def translate(folder: Path, updates: int, max_tokens: int, seed: int) -> List[Translation]:
    """Train a large model, then a small one alone and one that the large one has taught."""
    length = updates, max_tokens, seed
    large = Translation("large", [*LABEL_SMOOTHING, *Translation.full_size], folder, *length)
    run_all([large])
    teacher = large.teach()
    stored = [*SELF_KD, "--self-kd-candidates", "stored"]
    small = [
        Translation("small", [*LABEL_SMOOTHING, *Translation.small_size], folder, *length),
        Translation("small, taught", [*stored, *Translation.small_size], folder, *length, teacher),
    ]
    run_all(small)
    return [*small, large]


def report_language_model(arms: Sequence[LanguageModel], language: str) -> Dict[str, Any]:
    """Print perplexities; return them."""
    perplexities = [arm.perplexity() for arm in arms]
    results = {
        arm.name: {"test_ppl": perplexity, **described(arm)}
        for arm, perplexity in zip(arms, perplexities)
    }
    console = show(
        f"{language}, language model, seed {arms[0].seed}",
        results,
        {
            "test perplexity": [f"{perplexity:.2f}" for perplexity in perplexities],
            **columns(results),
        },
    )
    baseline, ours = perplexities
    change = 100 * (ours / baseline - 1)
    console.print(f"Test perplexity of self-KD: {change:+.1f} % against label smoothing. One seed.")
    return results


def report_translation(
    arms: Sequence[Translation], folder: Path, languages: Tuple[str, str]
) -> Dict[str, Any]:
    """Print scores with their signatures and some translations; return the scores.

    The first model is that to which the others are compared.
    """
    source, reference = (read_lines(folder / "text" / f"test.{language}") for language in languages)
    systems = [(arm.name, arm.hypotheses()) for arm in arms]
    for name, hypotheses in systems:
        if len(hypotheses) != len(reference):
            stop(f"{name}: {len(hypotheses)} translations of {len(reference)} test sentences")
    metrics = {"BLEU": sacrebleu.BLEU(), "chrF2": sacrebleu.CHRF()}
    signatures, scores = paired(systems, metrics, reference)
    results: Dict[str, Any] = {
        arm.name: {
            "parameters": arm.parameters(),
            **{metric: scores[metric][i][0] for metric in metrics},
            **described(arm),
        }
        for i, arm in enumerate(arms)
    }
    console = show(
        f"{'-'.join(languages)}, translation, {len(reference)} test sentences, seed {arms[0].seed}",
        results,
        {
            "parameters": [f"{row['parameters']:,}" for row in results.values()],
            **{metric: [f"{row[metric]:.1f}" for row in results.values()] for metric in metrics},
            **columns(results),
        },
    )
    console.print(
        "large and small: with label smoothing. small, taught: with self-KD, by the large one. "
        "The large one trained on all cores, the small ones side by side.",
        soft_wrap=True,
    )
    one, other = arms[0].name, arms[1].name
    for metric, signature in signatures.items():
        _, bootstrap, randomisation = scores[metric][1]
        console.print(
            f"{metric}: p for no difference between '{one}' and '{other}' is {bootstrap:.3f} by "
            f"the paired bootstrap, {randomisation:.3f} by randomisation. {signature}",
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
    return results


def described(arm: Arm) -> Dict[str, Any]:
    """Return the figures of a training, and its command."""
    return {**arm.figures(), "command": shlex.join(map(str, arm.command))}


def columns(results: Dict[str, Any]) -> Dict[str, List[str]]:
    """Return the columns that both tables have."""
    seconds = [row["seconds"] for row in results.values()]
    return {
        "validation perplexity": [f"{row['valid_ppl']:.2f}" for row in results.values()],
        "seconds an update": ["" if found is None else f"{found:.2f}" for found in seconds],
    }


def show(title: str, names: Iterable[str], figures: Dict[str, List[str]]) -> Console:
    """Print a table with a line for each model."""
    table = Table(title=title)
    table.add_column("model")
    for heading in figures:
        table.add_column(heading, justify="right")
    for row in zip(names, *figures.values()):
        table.add_row(*row)
    console = Console(width=100, highlight=False)
    console.print()
    console.print(table)
    return console


def draw(
    models: Sequence[LanguageModel], translations: Sequence[Translation], folder: Path
) -> None:
    """Draw validation curves, and what the large translation taught at five words."""
    pyplot = pictures.pyplot()
    figure, axes = pyplot.subplots(1, 3, figsize=(15, 3.6), width_ratios=[1, 1, 2])
    arms: Sequence[Arm]
    for axis, arms in zip(axes, (models, translations)):
        shown: List[float] = []
        for arm, style in zip(arms, ("--", "-", ":")):
            log = read_log(arm.train_log)
            points = [(fields["num_updates"], fields["ppl"]) for fields in log.valid]
            axis.plot(*zip(*points), style, color="black", label=arm.name)
            shown += [perplexity for _, perplexity in points[len(points) // 2 :]]
        axis.set_ylim(min(shown) * 0.95, max(shown) * 1.05)
        axis.set_xlabel("updates")
        axis.set_title(f"{arms[0].task}: validation perplexity", fontsize=9)
        axis.legend(fontsize=8)
    taught = translations[1]
    trained = load(taught.checkpoint, taught.data)
    settings = settings_of(trained, teacher=str(taught.teacher))  # the folder may have been moved
    rows: List[Dict[str, Any]] = []
    for sentence in range(min(30, len(trained.dataset("train")))):
        rows += explain.positions(trained, settings, "train", sentence)[0]
    # Words that a person can read: no pieces of words, no signs. Those that give away most.
    whole = [row for row in rows if all(word.isalpha() for word, _ in row["mixed"][:3])]
    chosen = sorted(whole or rows, key=lambda row: row["trained_on"])[:5]
    explain.heat_map(axes[-1], chosen, min(6, max(len(row["mixed"]) for row in chosen)))
    axes[-1].set_yticks([])
    axes[-1].set_title("what the large translation taught the small one at five words", fontsize=9)
    pictures.save_plot(figure, folder / "quickstart.png")


def _name(pairs: Optional[Path], langs: str) -> str:
    if pairs is None:
        return f"quickstart-{langs}"
    content = pairs.read_bytes() if pairs.is_file() else b""
    return f"quickstart-{pairs.stem}-{langs}-{hashlib.sha256(content).hexdigest()[:8]}"


if __name__ == "__main__":
    try:
        main()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
