"""The command ``fairseq-skd``."""

import argparse
import sys
from pathlib import Path

from fairseq_skd.averaging import CheckpointError, average_checkpoints
from fairseq_skd.version import __version__

__all__ = ["main"]


def main() -> None:
    """Parse the command line and run the subcommand."""
    parser = argparse.ArgumentParser(
        prog="fairseq-skd", description="Self-knowledge distillation for fairseq."
    )
    parser.add_argument("--version", action="version", version=__version__)
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    commands.add_parser(
        "path",
        help="print the installed plugin's folder: "
        "fairseq-train DATA --user-dir $(fairseq-skd path) --criterion self_kd ...",
    )
    average = commands.add_parser("average", help="average the parameters of checkpoints")
    average.add_argument("checkpoints", nargs="+", type=Path, metavar="CHECKPOINT")
    average.add_argument("--output", type=Path, required=True, help="the checkpoint to write")
    args = parser.parse_args()
    if args.command == "path":
        print(Path(__file__).resolve().parent)
        return
    try:
        average_checkpoints(args.checkpoints, args.output, lambda line: print(line, flush=True))
    except (CheckpointError, OSError) as error:
        sys.exit(f"fairseq-skd average: {error}")
    print(f"written to {args.output}")
