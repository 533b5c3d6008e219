"""The command ``fairseq-skd``."""

import argparse
from pathlib import Path

from fairseq_skd.version import __version__

__all__ = ["main"]


def main() -> None:
    """Parse the command line; ``fairseq-skd path`` prints what ``--user-dir`` needs."""
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
    parser.parse_args()
    print(Path(__file__).resolve().parent)
