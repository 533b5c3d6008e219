"""Pictures: matplotlib, set up alike for commands, benchmarks and experiments."""

import logging
import sys
import textwrap
from pathlib import Path
from typing import Any, Optional

from fairseq_skd.commands import CommandError

__all__ = ["check_plot", "pyplot", "save_plot"]


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
        raise CommandError("pictures need matplotlib:  pip install matplotlib") from None
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
    print(f"written to {path}", file=sys.stderr, flush=True)
