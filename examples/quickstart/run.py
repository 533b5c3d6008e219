"""The quick start: language models and translations with and without self-KD, compared.

Run it with ``make quickstart``. Every step writes below one folder and is not repeated once it is
done; a training that was interrupted goes on from its last checkpoint.
"""

import argparse
import hashlib
import json
import logging
import re
import sys
import time
from pathlib import Path
from typing import Any, Dict, List, Optional, Sequence, Tuple

import sacrebleu
import sentencepiece
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
from training import ROOT, Arm, Training, run, short, step, stop, train

from fairseq_skd.commands import explain, pictures
from fairseq_skd.commands.compare import paired, read_generated
from fairseq_skd.commands.logs import read_log
from fairseq_skd.commands.teaching import settings_of
from fairseq_skd.commands.trained import load

# Of the help pages: a small model learns sentences of this length in minutes.
SHORT = 12
PIECES = 4000
SELF_KD = ["--criterion", "self_kd", "--self-kd-candidates", "past"]
_LAYERS = {"layers": 2, "embed-dim": 128, "ffn-embed-dim": 256, "attention-heads": 4}
_STACK = {
    side: [part for name, value in _LAYERS.items() for part in (f"--{side}-{name}", str(value))]
    for side in ("encoder", "decoder")
}
_OPTIMISATION = [
    *("--dropout", "0.1", "--optimizer", "adam", "--adam-betas", "(0.9, 0.98)"),
    # Falls to 0 with the last update, so that the training has come to its end.
    *("--clip-norm", "1.0", "--lr", "0.005", "--lr-scheduler", "cosine"),
]
_BLOCKS = ["--sample-break-mode", "complete", "--tokens-per-sample", "64"]
LANGUAGE_MODEL = [
    *("--task", "language_modeling", *_BLOCKS, "--arch", "transformer_lm", *_STACK["decoder"]),
    *("--decoder-input-dim", "128", "--decoder-output-dim", "128"),  # by default 512
    *("--share-decoder-input-output-embed", *_OPTIMISATION, "--warmup-updates", "100"),
]
TRANSLATION = [
    *("--arch", "transformer", "--share-all-embeddings", *_STACK["encoder"], *_STACK["decoder"]),
    *(*_OPTIMISATION, "--warmup-updates", "200"),
]
GENERATE = [
    *("fairseq-generate", "--beam", "5", "--max-tokens", "4000", "--max-len-a", "1.5"),
    *("--max-len-b", "10", "--remove-bpe", "sentencepiece"),
]
EVALUATE = ["fairseq-eval-lm", "--max-tokens", "4000", *_BLOCKS]


def main() -> None:
    """Do what is not done yet, then print the comparison."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "--pairs", type=Path, metavar="FILE.tsv", help="your own corpus: source, tab, target"
    )
    parser.add_argument("--langs", default="en-de", help="two languages (default: %(default)s)")
    parser.add_argument(
        "--updates",
        type=int,
        default=750,
        help="of a translation; two thirds of a language model (default: %(default)s)",
    )
    parser.add_argument(
        "--max-tokens",
        type=int,
        default=3000,
        help="of a translation; two thirds of a language model (default: %(default)s)",
    )
    parser.add_argument("--seed", type=int, default=1, help="default: %(default)s")
    parser.add_argument("--out", type=Path, help="default: runs/quickstart-<corpus>")
    args = parser.parse_args()
    for name, least in (("updates", 3), ("max_tokens", 150)):
        if getattr(args, name) < least:
            given = f"--{name.replace('_', '-')} is {getattr(args, name)}"
            parser.error(f"{given}; allowed: {least} or more")
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
    binarise(folder, (source, target))
    updates, tokens = args.updates, args.max_tokens
    models = Training(
        f"language models of {source}",
        folder / "language-model",
        LANGUAGE_MODEL,
        EVALUATE,
        updates * 2 // 3,
        tokens * 2 // 3,
        args.seed,
    )
    translations = Training(
        f"translations {source}-{target}",
        folder,
        TRANSLATION,
        GENERATE,
        updates,
        tokens,
        args.seed,
    )
    smoothing = ["--label-smoothing", "0.1"]
    language_models = [
        Arm("cross-entropy", ["--criterion", "cross_entropy"], models),
        Arm("self-KD", SELF_KD, models),
    ]
    translators = [
        Arm(
            "label smoothing",
            ["--criterion", "label_smoothed_cross_entropy", *smoothing],
            translations,
        ),
        Arm("self-KD", [*SELF_KD, *smoothing], translations),
    ]
    for arms in (language_models, translators):
        train(arms)
        for arm in arms:
            arm.test()
    results = {
        "language model": report_language_models(language_models),
        "translation": report_translations(translators, folder, (source, target)),
    }
    (folder / "results.json").write_text(json.dumps(results, indent=2), encoding="utf-8")
    draw(language_models, translators, folder)
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
            normalization_rule_name="identity",  # references keep their "…", so must translations
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
    """Run fairseq-preprocess, for the pairs and for the source language alone."""
    source, target = languages
    pieces, parts = folder / "pieces", ("train", "valid", "test")
    both = ["--source-lang", source, "--target-lang", target, "--joined-dictionary"]
    for data, options, ending in (
        (folder / "data", both, ""),
        (folder / "language-model" / "data", ["--only-source"], f".{source}"),
    ):
        if (data / "done").exists():
            continue
        step("fairseq-preprocess")
        files = [text for part in parts for text in (f"--{part}pref", pieces / f"{part}{ending}")]
        run(["fairseq-preprocess", *options, *files, "--destdir", data], folder / "preprocess.log")
        (data / "done").touch()


def report_language_models(arms: Sequence[Arm]) -> Dict[str, Any]:
    """Print perplexities a piece, and return what is printed."""
    training = arms[0].training
    table = Table(title=f"{training.title}, seed {training.seed}: perplexity")
    for heading in ("criterion", "test", "validation", "over the first", "seconds an update"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    results: Dict[str, Any] = {}
    for arm in arms:
        perplexity = float(re.findall(r"Perplexity: ([\d.]+)", arm.test())[-1])
        row = {"test_ppl": perplexity, **arm.figures(), "command": arm.quoted()}
        results[arm.name] = row
        over = 100 * (perplexity / results[arms[0].name]["test_ppl"] - 1)
        shown = "" if arm is arms[0] else f"{over:+.1f} %"
        table.add_row(
            arm.name, f"{perplexity:.2f}", f"{row['valid_ppl']:.2f}", shown, _seconds(row)
        )
    console = Console(width=100, highlight=False)
    console.print()
    console.print(table)
    return results


def report_translations(
    arms: Sequence[Arm], folder: Path, languages: Tuple[str, str]
) -> Dict[str, Any]:
    """Print scores with their signatures and some translations, and return the scores."""
    source, reference = (
        (folder / "text" / f"test.{language}").read_text(encoding="utf-8").splitlines()
        for language in languages
    )
    systems = [(arm.name, _hypotheses(arm)) for arm in arms]
    for name, hypotheses in systems:
        if len(hypotheses) != len(reference):
            stop(f"{name}: {len(hypotheses)} translations of {len(reference)} test sentences")
    metrics = {"BLEU": sacrebleu.BLEU(), "chrF2": sacrebleu.CHRF()}
    signatures, scores = paired(systems, metrics, reference)
    results: Dict[str, Any] = {
        arm.name: {
            **{metric: scores[metric][i][0] for metric in metrics},
            **arm.figures(),
            "command": arm.quoted(),
        }
        for i, arm in enumerate(arms)
    }
    training = arms[0].training
    table = Table(title=f"{training.title}, {len(reference)} test sentences, seed {training.seed}")
    for heading in ("criterion", "BLEU", "chrF2", "validation perplexity", "seconds an update"):
        table.add_column(heading, justify="left" if heading == "criterion" else "right")
    for name, row in results.items():
        scores_of = f"{row['BLEU']:.1f}", f"{row['chrF2']:.1f}", f"{row['valid_ppl']:.2f}"
        table.add_row(name, *scores_of, _seconds(row))
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
    return results


def draw(language_models: Sequence[Arm], translators: Sequence[Arm], folder: Path) -> None:
    """Draw validation curves, and what self-KD has taught itself at five words."""
    pyplot = pictures.pyplot()
    figure, (left, middle, right) = pyplot.subplots(1, 3, figsize=(15, 3.6), width_ratios=[1, 1, 2])
    for axes, arms in ((left, language_models), (middle, translators)):
        shown: List[float] = []
        for arm, style in zip(arms, ("--", "-")):
            log = read_log(arm.train_log)
            points = [(fields["num_updates"], fields["ppl"]) for fields in log.valid]
            axes.plot(*zip(*points), style, color="black", label=arm.name)
            shown += [perplexity for _, perplexity in points[len(points) // 2 :]]
        axes.set_ylim(min(shown) * 0.95, max(shown) * 1.05)
        axes.set_xlabel("updates")
        axes.set_title(arms[0].training.title, fontsize=9)
        axes.legend(fontsize=8)
    left.set_ylabel("validation perplexity")
    trained = load(translators[-1].checkpoint, translators[-1].training.data)
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


def _hypotheses(arm: Arm) -> List[str]:
    """Return the translations in the order of the test set."""
    found = read_generated(arm.test().split("\n"))
    return [] if found is None else found[0]


def _seconds(figures: Dict[str, Any]) -> str:
    return "" if figures["seconds"] is None else f"{figures['seconds']:.2f}"


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
