"""The command ``fairseq-skd``."""

import logging
import sys
from pathlib import Path
from typing import List

import typer
from typing_extensions import Annotated

from fairseq_skd.averaging import average_checkpoints
from fairseq_skd.checkpoints import CheckpointError
from fairseq_skd.commands import CommandError
from fairseq_skd.commands.calibration import calibration
from fairseq_skd.commands.compare import compare
from fairseq_skd.commands.curves import curves
from fairseq_skd.commands.doctor import doctor
from fairseq_skd.commands.explain import explain
from fairseq_skd.commands.neighbors import neighbors
from fairseq_skd.commands.teach import teach
from fairseq_skd.version import __version__

__all__ = ["main"]

app = typer.Typer(
    add_completion=False,
    rich_markup_mode="markdown",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)


def _version(wanted: bool) -> None:
    if wanted:
        print(__version__)
        raise typer.Exit


@app.callback()
def options(
    version: Annotated[
        bool,
        typer.Option("--version", callback=_version, is_eager=True, help="Print the version."),
    ] = False,
) -> None:
    """Self-knowledge distillation for fairseq: look into models, compare runs."""


@app.command()
def path() -> None:
    """Print the installed plugin's folder, for --user-dir.

    Example:

      fairseq-train DATA --user-dir $(fairseq-skd path) --criterion self_kd ...
    """
    print(Path(__file__).resolve().parent)


@app.command()
def average(
    checkpoints: Annotated[List[Path], typer.Argument(help="Checkpoints of one model.")],
    output: Annotated[Path, typer.Option(help="The checkpoint to write.")],
) -> None:
    """Average the parameters of checkpoints.

    Example:

      fairseq-skd average checkpoint8.pt checkpoint9.pt checkpoint10.pt --output average.pt
    """
    average_checkpoints(checkpoints, output, lambda line: print(line, flush=True))
    print(f"written to {output}")


for command in (neighbors, explain, compare, curves, calibration, doctor):
    app.command()(command)


app.command(context_settings={"allow_extra_args": True, "ignore_unknown_options": True})(teach)


def main() -> None:
    """Run the subcommand; whatever a user can mend ends in one sentence and exit status 2."""
    logging.disable(logging.INFO)  # fairseq's, hydra's and sacrebleu's
    try:
        app()
    except (CommandError, CheckpointError, OSError) as error:
        print(f"fairseq-skd: {error}", file=sys.stderr)
        sys.exit(2)
