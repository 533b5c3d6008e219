"""What a subcommand prints: tables for people, JSON and CSV for machines, progress."""

import contextlib
import csv
import json
import sys
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

from fairseq_skd.commands import CommandError

__all__ = [
    "AsCSV",
    "AsJSON",
    "Plot",
    "Rows",
    "Titled",
    "labels",
    "note",
    "progress",
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
        How a column is written for people, as `format` takes it (".2f"). Others as they are, and
        those without any value not at all.
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
        shown = [name for name in rows[0] if any(row[name] is not None for row in rows)]
        numeric = {
            name
            for name in shown
            if all(isinstance(row[name], (int, float, type(None))) for row in rows)
        }
        for name in shown:
            table.add_column(
                name.replace("_", " "),
                justify="right" if name in numeric else "left",
                overflow="fold",
            )
        for row in rows:
            table.add_row(*(_cell(row[name], formats.get(name, "")) for name in shown))
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
