"""Does a long training grow? ``python -m benchmarks.endurance DATA [--updates N]``.

Trains a tiny Transformer with every kind of soft target on data of fairseq-preprocess, and prints
resident memory and the seconds an update in each tenth of the training. Tables are
measured, sentences recorded, checkpoints written and validations made all the time.
"""

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any, List

from rich.console import Console
from rich.table import Table

from benchmarks.report import ROOT
from fairseq_skd.commands.logs import parse_line

CANDIDATES = ["none", "neighbors", "both", "past"]
MODEL = [
    *("--arch", "transformer", "--encoder-embed-dim", 32, "--decoder-embed-dim", 32),
    *("--encoder-ffn-embed-dim", 32, "--decoder-ffn-embed-dim", 32, "--encoder-layers", 1),
    *("--decoder-layers", 1, "--encoder-attention-heads", 2, "--decoder-attention-heads", 2),
]


def main() -> None:
    """Train and print a table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path, help="folder made by fairseq-preprocess")
    parser.add_argument("--updates", type=int, default=5000, help="default: %(default)s")
    args = parser.parse_args()
    if args.updates < 20:
        parser.error(f"--updates is {args.updates}; allowed: 20 or more")
    tenth = args.updates // 10
    table = Table(title=f"{args.updates} updates: MiB resident, seconds an update")
    table.add_column("soft targets")
    for i in range(1, 11):
        table.add_column(f"to {i * tenth}", justify="right")
    for candidates in CANDIDATES:
        table.add_row(candidates, *train(args.data, candidates, args.updates, tenth))
    Console(width=170).print(table)


def train(data: Path, candidates: str, updates: int, tenth: int) -> List[str]:
    """Train, and return memory and time of every tenth."""
    weight = 0 if candidates == "none" else 0.5
    chosen = "neighbors" if candidates == "none" else candidates
    with tempfile.TemporaryDirectory() as folder:
        options: List[Any] = [
            *("--user-dir", ROOT / "fairseq_skd", "--criterion", "self_kd", "--self-kd-weight"),
            *(weight, "--self-kd-candidates", chosen, "--self-kd-refresh-interval", 50),
            *("--label-smoothing", 0.1, "--optimizer", "adam", "--lr", 0.001, "--max-tokens", 500),
            *("--max-update", updates, "--save-interval-updates", tenth, "--save-dir", folder),
            *("--keep-interval-updates", 1, "--no-epoch-checkpoints", "--log-format", "json"),
            *("--log-interval", tenth, "--validate-interval-updates", tenth),
        ]
        program = Path(sys.executable).parent / "fairseq-train"
        command = [str(x) for x in (program, data, *MODEL, *options)]
        process = subprocess.Popen(
            command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
        )
        assert process.stdout is not None
        cells: List[str] = []
        for line in process.stdout:
            kind, fields = parse_line(line)
            if kind == "train_inner":
                status = Path(f"/proc/{process.pid}/status").read_text().splitlines()
                (memory,) = (int(x.split()[1]) // 1024 for x in status if x.startswith("VmRSS"))
                cells.append(f"{memory}, {fields['train_wall'] / tenth:.3f}")
                print(f"{candidates}: update {fields['num_updates']:.0f}: {cells[-1]}", flush=True)
        if process.wait() != 0:
            sys.exit(f"{' '.join(command)} failed")
    return cells


if __name__ == "__main__":
    main()
