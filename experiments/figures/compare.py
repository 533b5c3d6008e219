"""The figures of a run that need another one, the baseline: differences, and when it is reached."""

from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import sacrebleu

from experiments.figures import collect
from experiments.figures.collect import Row
from experiments.runner.plan import Run
from fairseq_skd.commands.compare import paired

REACHED = "updates to the baseline's best"


def rows(complete: Sequence[Run], declared: Sequence[Run]) -> Iterator[Row]:
    """Yield a row for each such figure.

    The baseline of a run is the first declared arm of its experiment, with the same seed; without
    it there are no rows.

    Parameters
    ----------
    complete, declared : sequence of Run
        Those that are trained and scored, and all.
    """
    first: Dict[str, str] = {}
    for run in declared:
        first.setdefault(run.experiment, run.arm)
    for which in dict.fromkeys((run.experiment, run.seed) for run in complete):
        runs = [run for run in complete if (run.experiment, run.seed) == which]
        runs.sort(key=lambda run: run.arm != first[run.experiment])  # the baseline, then the others
        if runs[0].arm != first[runs[0].experiment]:
            continue
        best = min(perplexity for _, perplexity in collect.curve(runs[0]))
        for run in runs:
            updates = updates_to(run, best)
            if updates is not None:
                yield _row(run, runs[0], REACHED, updates)
        for text in _translated(runs[0]):
            yield from significance(runs, text)


def updates_to(run: Run, perplexity: float) -> Optional[int]:
    """Return the updates until a validation perplexity was reached, None if it never was.

    Those of the trunk that the run began with count too; None if they are not there to see.
    """
    curve = collect.curve(run)
    if run.trunk:
        if not (run.trunk.run.folder / "train.log").exists():
            return None
        shared = collect.curve(run.trunk.run)
        curve = [*(point for point in shared if point[0] <= run.trunk.updates), *curve]
    return next((updates for updates, reached in curve if reached <= perplexity), None)


def _translated(run: Run) -> List[str]:
    """Return the names of the texts whose translations a run's evaluation has scored."""
    measures = [name for name, _, _ in collect.scores(run.evaluation.read_text(encoding="utf-8"))]
    return [name[: -len(" chrF2")] for name in measures if name.endswith(" chrF2")]


def significance(runs: Sequence[Run], text: str) -> Iterator[Row]:
    """Yield the differences between each run and the first, in BLEU and chrF2, and their p.

    p is of sacrebleu's paired bootstrap (Koehn 2004), and about one-sided: the part of the samples
    in which the absolute difference is larger than its mean over samples by more than the
    difference on the text itself.

    Parameters
    ----------
    runs : sequence of Run
        With ``<text>.txt`` and ``<text>.ref`` in their folders: translations and references.
    text : str
        The name of the text.
    """
    if len(runs) < 2:
        return
    systems = [(run.arm, _lines(run.folder / f"{text}.txt")) for run in runs]
    lower = "case:lc" in runs[0].evaluation.read_text(encoding="utf-8")
    metrics = {"BLEU": sacrebleu.BLEU(lowercase=lower), "chrF2": sacrebleu.CHRF(lowercase=lower)}
    references = _lines(runs[0].folder / f"{text}.ref")
    signatures, found = paired(systems, metrics, references, tests=["bs"])
    for name in metrics:
        (baseline,), *others = found[name]
        for run, (score, bootstrap) in zip(runs[1:], others):
            difference = round(score - baseline, 2)
            signature = f"{name}|{signatures[name]}"
            yield _row(run, runs[0], f"{text} {name}", difference, round(bootstrap, 4), signature)


def _row(
    run: Run,
    baseline: Run,
    measure: str,
    value: float,
    p: Optional[float] = None,
    signature: str = "",
) -> Row:
    figures: Row = {"measure": measure, "value": value, "p": "" if p is None else p}
    return {**collect.which(run), "baseline": baseline.arm, **figures, "signature": signature}


def _lines(path: Path) -> List[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]
