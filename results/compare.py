"""The figures of a run that need another one: how sure a difference is, and which came first."""

from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import sacrebleu
from sacrebleu.significance import PairedTest

from results import collect
from results.collect import Row
from results.plan import Run

SAMPLES = 1000
AGAINST = ", p against "
REACHED = "minutes of updates to the baseline's best"


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
            minutes = minutes_to(run, best, complete)
            if minutes is not None:
                yield collect.row(run, REACHED, round(minutes, 2))
        for text in _translated(runs[0]):
            yield from significance(runs, text)


def minutes_to(run: Run, perplexity: float, others: Sequence[Run]) -> Optional[float]:
    """Return the minutes of updates until a validation perplexity was reached.

    Those of the trunk that the run began with, one of the others, count too. None if the perplexity
    was never reached or the figures are not there.
    """
    seconds = collect.seconds_an_update(run)
    trunk = next((o for o in others if run.trunk and o.folder == run.trunk.folder), None)
    before = collect.seconds_an_update(trunk) if trunk else seconds
    if seconds is None or before is None or (run.trunk and not trunk):
        return None
    shared = run.trunk.updates if run.trunk else 0
    curve = [point for point in collect.curve(trunk) if point[0] <= shared] if trunk else []
    for updates, reached in [*curve, *collect.curve(run)]:
        if reached <= perplexity:
            first = min(updates, shared)
            return (first * before + (updates - first) * seconds) / 60
    return None


def _translated(run: Run) -> List[str]:
    """Return the names of the texts whose translations a run's evaluation has scored."""
    measures = [name for name, _, _ in collect.scores(run.evaluation.read_text(encoding="utf-8"))]
    return [name[: -len(" chrF2")] for name in measures if name.endswith(" chrF2")]


def significance(runs: Sequence[Run], text: str) -> Iterator[Row]:
    """Yield the p of sacrebleu's paired bootstrap (Koehn 2004) between each run and the first.

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
    references = [_lines(runs[0].folder / f"{text}.ref")]
    test = PairedTest(systems, metrics, references, test_type="bs", n_samples=SAMPLES)
    signatures, found = test()
    for name in metrics:
        signature = f"{name}|{signatures[name]}"
        for run, result in zip(runs[1:], found[name][1:]):
            measure = f"{text} {name}{AGAINST}{runs[0].arm}"
            yield collect.row(run, measure, round(result.p_value, 4), signature)


def _lines(path: Path) -> List[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]
