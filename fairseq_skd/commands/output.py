"""What a subcommand prints: tables for people, JSON and CSV for machines, errors in a sentence."""

import contextlib
import csv
import json
import logging
import sys
import textwrap
from pathlib import Path
from typing import (
    Any,
    ContextManager,
    Dict,
    Iterable,
    Iterator,
    List,
    Mapping,
    NamedTuple,
    Optional,
    Sequence,
    TypeVar,
)

import typer
from rich.console import Console
from rich.progress import track
from rich.table import Table
from typing_extensions import Annotated

__all__ = [
    "AsCSV",
    "AsJSON",
    "CommandError",
    "Plot",
    "Rows",
    "check_plot",
    "labels",
    "note",
    "progress",
    "pyplot",
    "save_plot",
    "show",
    "waiting",
]

T = TypeVar("T")
Rows = List[Dict[str, Any]]

AsJSON = Annotated[bool, typer.Option("--json", help="Print JSON, with all digits.")]
AsCSV = Annotated[bool, typer.Option("--csv", help="Print the first table as CSV.")]
Plot = Annotated[
    Optional[Path], typer.Option("--plot", metavar="FILE", help="Draw it: a .png or .svg file.")
]

# Width of what is not a terminal: a log, a page.
_WIDTH = 110


class CommandError(Exception):
    """The command cannot be carried out; the message says what was wrong and what to do."""


class Titled(NamedTuple):
    """A table and what is said above it."""

    title: str
    rows: Rows


def show(
    tables: Mapping[str, Titled], formats: Mapping[str, str], as_json: bool, as_csv: bool
) -> None:
    """Print tables.

    Parameters
    ----------
    tables : mapping
        By the name that JSON gives them, the most important one first. All rows of a table have
        the same columns.
    formats : mapping
        How a column is written for people, as `format` takes it (".2f"). Others as they are.
    as_json, as_csv : bool
        For machines: all tables, or the rows of the first.
    """
    if as_json and as_csv:
        raise CommandError("--json and --csv were given; allowed: one of them")
    if as_json:
        print(json.dumps({name: rows for name, (_, rows) in tables.items()}, ensure_ascii=False))
        return
    if as_csv:
        rows = next(iter(tables.values())).rows
        if rows:
            writer = csv.DictWriter(sys.stdout, list(rows[0]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(rows)
        return
    console = _console()
    for title, rows in tables.values():
        if not rows:
            continue
        console.print(title, style="bold", markup=False)
        table = Table()
        numeric = {
            name
            for name in rows[0]
            if all(isinstance(row[name], (int, float, type(None))) for row in rows)
        }
        for name in rows[0]:
            table.add_column(
                name.replace("_", " "),
                justify="right" if name in numeric else "left",
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(_cell(value, formats.get(name, "")) for name, value in row.items()))
        console.print(table)


def _cell(value: Any, form: str) -> str:
    if value is None:
        return ""
    text = format(value, form) if isinstance(value, (int, float)) else str(value)
    return text.replace("[", r"\[")  # rich reads [de] as a style


def _console() -> Console:
    return Console(highlight=False, soft_wrap=False, width=None if sys.stdout.isatty() else _WIDTH)


def note(text: str) -> None:
    """Say something that is no result: not into what a machine reads."""
    print(text, file=sys.stderr, flush=True)


def labels(paths: Sequence[Path]) -> List[str]:
    """Return the shortest ends of paths that tell them apart."""
    longest = max((len(path.parts) for path in paths), default=1)
    for length in range(1, longest + 1):
        names = [str(Path(*path.parts[-length:])) for path in paths]
        if len(set(names)) == len(names):
            return names
    return [str(path) for path in paths]


def progress(items: Iterable[T], what: str, total: Optional[int] = None) -> Iterator[T]:
    """Yield the items, and tell a terminal how many are left."""
    console = Console(stderr=True)
    yield from track(
        items, what, total, console=console, transient=True, disable=not console.is_terminal
    )


def waiting(what: str) -> ContextManager[object]:
    """Tell a terminal what is being waited for."""
    console = Console(stderr=True)
    return console.status(what) if console.is_terminal else contextlib.nullcontext()


def check_plot(path: Optional[Path]) -> None:
    """Refuse a picture that could not be written, before any work.

    Raises
    ------
    CommandError
        Without matplotlib, for another kind of file, or in a folder that is not there.
    """
    if path is None:
        return
    if path.suffix not in (".png", ".svg"):
        raise CommandError(f"--plot is {path}; allowed: a file that ends in .png or .svg")
    if not path.parent.is_dir():
        raise CommandError(f"--plot is {path}, and there is no folder {path.parent}")
    pyplot()


def pyplot() -> Any:
    """Return matplotlib's pyplot, set up so that equal figures give equal files.

    Raises
    ------
    CommandError
        If matplotlib is missing.
    """
    # fairseq has all loggers print all they have; this one has a line for each font.
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    try:
        import matplotlib
    except ImportError:
        raise CommandError("pictures need matplotlib:  pip install 'fairseq_skd[view]'") from None
    matplotlib.use("agg")
    matplotlib.rcParams.update(
        {
            **{"svg.hashsalt": "fairseq_skd", "svg.fonttype": "none"},
            **{"font.size": 9, "axes.spines.top": False, "axes.spines.right": False},
        }
    )
    from matplotlib import pyplot as found

    return found


def save_plot(figure: Any, path: Path, title: str = "") -> None:
    """Write a figure, without the date, so that equal figures give equal files."""
    if title:
        # At 8 points about 14 letters to an inch.
        lines = [textwrap.fill(line, int(14 * figure.get_figwidth())) for line in title.split("\n")]
        figure.suptitle("\n".join(lines), fontsize=8, x=0.01, ha="left")
    figure.tight_layout()
    figure.savefig(path, dpi=150, metadata={"Date": None} if path.suffix == ".svg" else None)
    pyplot().close(figure)
    note(f"written to {path}")
