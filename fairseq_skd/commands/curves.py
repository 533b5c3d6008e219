"""``fairseq-skd curves``: how trainings went, from their logs."""

from pathlib import Path
from typing import Any, Dict, List, Tuple

import typer
from typing_extensions import Annotated

from fairseq_skd.commands import CommandError, output, pictures
from fairseq_skd.commands.logs import Log, read_log
from fairseq_skd.commands.output import AsCSV, AsJSON, Plot, Titled

__all__ = ["curves"]

# What is drawn, where a log has it: of training or validation, its name, and what it is called.
PANELS = [
    ("valid", "ppl", "validation perplexity"),
    ("valid", "bleu", "validation BLEU"),
    ("train", "loss", "training loss (bits)"),
    ("train", "self_kd_weight", "alpha"),
    ("train", "self_kd_mass", "mass given away"),
    ("train", "seconds", "seconds an update"),
]


def curves(
    logs: Annotated[List[Path], typer.Argument(help="Logs of fairseq-train, or folders of runs.")],
    by: Annotated[str, typer.Option(help="updates, or time (minutes of training).")] = "updates",
    plot: Plot = None,
    as_json: AsJSON = False,
    as_csv: AsCSV = False,
) -> None:
    """Show how trainings went: best validation, what self-KD gave away, seconds an update.

    Reads what fairseq-train printed, with --log-format json or simple. A folder stands for the
    train.log in it.

    Example:

      fairseq-skd curves label-smoothing/train.log self-kd/train.log --plot curves.png
    """
    pictures.check_plot(plot)
    if by not in ("updates", "time"):
        raise CommandError(f"--by is {by}; allowed: updates, time")
    paths = [path / "train.log" if path.is_dir() else path for path in logs]
    named = [path.parent if path.name == "train.log" else path.with_suffix("") for path in paths]
    found = dict(zip(output.labels(named), map(_read, paths)))
    rows = [_row(name, log) for name, log in found.items()]
    formats = {
        **dict.fromkeys(("best_perplexity", "best_bleu", "loss", "alpha"), ".2f"),
        **dict.fromkeys(("updates", "best_at_update"), ".0f"),
        **{"mass": ".3f", "seconds_an_update": ".3f", "minutes": ".1f"},
    }
    output.show({"runs": Titled("Trainings", rows)}, formats, as_json, as_csv)
    if plot is not None:
        draw(found, by, plot)


def _read(path: Path) -> Log:
    if not path.is_file():
        raise CommandError(f"{path}: there is no such file")
    log = read_log(path)
    if not log.train and not log.valid:
        raise CommandError(
            f"{path} holds no line of a training (train_inner or valid); a log is what "
            "fairseq-train printed with --log-format json or simple"
        )
    return log


def _row(name: str, log: Log) -> Dict[str, Any]:
    best = min(log.valid, key=lambda fields: fields.get("loss", float("inf")), default={})
    bleu = [fields["bleu"] for fields in log.valid if "bleu" in fields]
    last: Dict[str, float] = (log.train or [{}])[-1]
    return {
        "run": name,
        "updates": max(int(fields["num_updates"]) for fields in log.train + log.valid),
        "best_perplexity": best.get("ppl"),
        "best_at_update": best.get("num_updates"),
        "best_bleu": max(bleu, default=None),
        "loss": last.get("loss"),
        "alpha": last.get("self_kd_weight"),
        "mass": last.get("self_kd_mass"),
        "seconds_an_update": log.seconds_an_update(),
        "minutes": sum(fields.get("train_wall", 0) for fields in log.train) / 60,
    }


def draw(found: Dict[str, Log], by: str, path: Path) -> None:
    """Draw a panel a figure, with a line a run."""
    pyplot = pictures.pyplot()
    panels = [
        panel for panel in PANELS if any(_points(log, *panel[:2], by) for log in found.values())
    ]
    figure, axes = pyplot.subplots(
        *(len(panels), 1), figsize=(6.5, 0.6 + 1.7 * len(panels)), sharex=True, squeeze=False
    )
    for axis, (kind, name, title) in zip(axes[:, 0], panels):
        later: List[float] = []
        for number, (run, log) in enumerate(found.items()):
            points = _points(log, kind, name, by)
            if not points:
                continue
            style = ("-", "--", ":", "-.")[number % 4]
            marker = "." if len(points) < 30 else None
            axis.plot(
                *zip(*points), color=f"C{number % 10}", linestyle=style, marker=marker, label=run
            )
            later += [value for _, value in points[len(points) // 2 :]]
        if name in ("ppl", "loss") and later:
            # The first values are many times as high; the rest is what one wants to see.
            room = 0.08 * (max(later) - min(later)) or 1
            axis.set_ylim(min(later) - room, max(later) + room)
        axis.set_ylabel(title, fontsize=8)
    axes[0][0].legend(fontsize=7)
    axes[-1][0].set_xlabel(
        "updates" if by == "updates" else "minutes of training, without validation"
    )
    pictures.save_plot(figure, path)


def _points(log: Log, kind: str, name: str, by: str) -> List[Tuple[float, float]]:
    """Return where and how high a figure is drawn."""
    if name == "seconds":
        found = log.seconds()
    else:
        lines: List[Dict[str, float]] = getattr(log, kind)
        found = [(fields, fields[name]) for fields in lines if name in fields]
    return [(_place(fields, log, by), value) for fields, value in found]


def _place(fields: Dict[str, float], log: Log, by: str) -> float:
    updates = fields["num_updates"]
    if by == "updates":
        return updates
    done = (line for line in log.train if line["num_updates"] <= updates)
    return sum(line.get("train_wall", 0) for line in done) / 60
