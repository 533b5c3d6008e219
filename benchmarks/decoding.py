"""How fast models translate: ``python -m benchmarks.decoding DATA CHECKPOINT ...``.

Sentences a second of a text, with a beam of 5, by ``fairseq-generate`` and by CTranslate2, which
serves the same checkpoints. Neither counts reading the model.
"""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any, List, Tuple

import ctranslate2
import torch
from rich.console import Console
from rich.table import Table

from benchmarks.measure import percentiles, run, seconds_of
from benchmarks.report import ROOT
from fairseq_skd.commands.output import labels

BEAM = 5


def main() -> None:
    """Translate with every model in turn, and print medians."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rounds", type=int, default=5, help="times each (default: 5)")
    parser.add_argument("--subset", default="test", help="text of the data (default: test)")
    parser.add_argument("data", type=Path, help="folder made by fairseq-preprocess")
    parser.add_argument("checkpoints", type=Path, nargs="+", metavar="checkpoint")
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; allowed: 2 or more")
    names = labels(args.checkpoints)
    with tempfile.TemporaryDirectory() as folder:
        served = [Path(folder, str(i)) for i in range(len(names))]
        for checkpoint, place in zip(args.checkpoints, served):
            run("ct2-fairseq-converter", "--model_path", checkpoint, "--data_dir", args.data,
                "--user_dir", ROOT / "fairseq_skd", "--output_dir", place)  # fmt: skip
        threads = torch.get_num_threads()
        translators = [
            ctranslate2.Translator(str(p), device="auto", intra_threads=threads) for p in served
        ]
        # Of each model and round: sentences a second of fairseq-generate and of CTranslate2.
        found: List[List[Tuple[float, float]]] = [[] for _ in names]
        for _ in range(args.rounds):
            for i, translator in enumerate(translators):
                speed, sentences = by_fairseq(args.data, args.checkpoints[i], args.subset)
                seconds = seconds_of(lambda t=translator, s=sentences: by_ctranslate2(t, s))
                found[i].append((speed, len(sentences) / seconds))
    table = Table(title=f"{len(sentences)} sentences, beam {BEAM}, {threads} thread(s)")
    for heading in ("checkpoint", "fairseq-generate", "ratio", "CTranslate2", "ratio"):
        table.add_column(heading, justify="left" if heading == "checkpoint" else "right")
    medians = [[percentiles(list(x))["median"] for x in zip(*rounds)] for rounds in found]
    for name, values in zip(names, medians):
        pairs = zip(values, medians[0])
        table.add_row(
            name, *(cell for x, base in pairs for cell in (f"{x:.0f}", f"{x / base:.2f}"))
        )
    Console(width=140).print(table)


def by_fairseq(data: Path, checkpoint: Path, subset: str) -> Tuple[float, List[List[str]]]:
    """Return sentences a second, and the source as the model reads it."""
    options = ("--gen-subset", subset, "--beam", BEAM, "--max-tokens", 4096)
    # Without a multiple of 1 ve-fairseq leaves sentences out.
    options = (*options, "--user-dir", ROOT / "fairseq_skd", "--required-batch-size-multiple", 1)
    printed = run("fairseq-generate", data, "--path", checkpoint, *options)
    speed = re.search(r"^.*Translated .* \(([\d.]+) sentences/s", printed, re.MULTILINE)
    assert speed is not None, printed[-2000:]
    source = re.findall(r"^S-\d+\t(.*)$", printed, re.MULTILINE)
    return float(speed[1]), [line.split() for line in source]


def by_ctranslate2(translator: Any, sentences: List[List[str]]) -> None:
    """Translate in batches of as many words, those of like length together."""
    translator.translate_batch(
        sentences,
        beam_size=BEAM,
        max_batch_size=4096,
        batch_type="tokens",
        max_decoding_length=200,
    )


if __name__ == "__main__":
    main()
