"""Tables of the results, as Markdown, and their plots: ``python -m results.report``.

For every experiment the mean and the standard deviation over seeds of every figure; "(2 of 3)"
where not all seeds have it. What was translated is also tested, seed by seed, against the first
declared arm of the experiment, its baseline: the difference of BLEU and chrF2 and the p of
sacrebleu's paired bootstrap (Koehn 2004).
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Sequence

import sacrebleu
from sacrebleu.significance import PairedTest

from results import collect, plots
from results.plan import ROOT, PlanError, Run, read

SAMPLES = 1000
TRAINING = "training"
REACHED = "minutes of updates to the baseline's best"


def main() -> None:
    """Print the tables and draw the plots of all complete runs of a plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_name("experiments.yaml"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="where prepared data is")
    parser.add_argument("--plots", type=Path, default=ROOT / "docs", help="folder for the plots")
    args = parser.parse_args()
    try:
        declared = read(args.plan, args.out.resolve())
        complete = [run for run in declared if collect.complete(run)]
    except (PlanError, OSError) as error:
        sys.exit(f"python -m results.report: {error}")
    if not complete:
        sys.exit("python -m results.report: no run is complete yet; first:  python -m results")
    args.plots.mkdir(parents=True, exist_ok=True)
    for name in dict.fromkeys(run.experiment for run in complete):
        baseline = next(run.arm for run in declared if run.experiment == name)
        runs = [run for run in complete if run.experiment == name]
        print("\n".join(tables(runs, baseline)))
        plots.arms(values(runs, baseline), baseline, args.plots / f"results-{name}.svg")
        curves: Dict[str, List[collect.Curve]] = {}
        for run in runs:
            curves.setdefault(run.arm, []).append(collect.curve(run))
        plots.curves(curves, args.plots / f"results-{name}-curves.svg")


def tables(runs: Sequence[Run], baseline: str) -> Iterator[str]:
    """Yield the tables of one experiment's complete runs, each below what it is about."""
    yield f"## {runs[0].experiment}: {runs[0].task}\n"
    found = values(runs, baseline)
    measures = list(dict.fromkeys(name for figures in found.values() for name in figures))
    for group in dict.fromkeys(_group(name) for name in measures):
        names = [name for name in measures if _group(name) == group]
        heads = [name if group == TRAINING else name[len(group) + 1 :] for name in names]
        lines = [["arm", "seeds", *heads]]
        for arm, figures in found.items():
            seeds = len({run.seed for run in runs if run.arm == arm})
            cells = (_mean(figures.get(name, []), seeds) for name in names)
            lines.append([arm, str(seeds), *cells])
        yield f"{group}\n\n{table(lines)}\n"
        if (runs[0].folder / f"{group}.ref").exists() and baseline in found:
            differences = significance(runs, baseline, group)
            yield f"{group}, difference to {baseline} (p)\n\n{differences}\n"


def _group(measure: str) -> str:
    group = measure.split()[0]
    return TRAINING if group in ("validation", "updates", "seconds", "minutes") else group


def values(runs: Sequence[Run], baseline: str) -> Dict[str, Dict[str, List[float]]]:
    """Return the figures of all seeds, by arm and measure."""
    found: Dict[str, Dict[str, List[float]]] = {}
    best = {
        run.seed: min(perplexity for _, perplexity in collect.curve(run))
        for run in runs
        if run.arm == baseline
    }
    for run in runs:
        figures = {str(row["measure"]): float(row["value"]) for row in collect.rows(run)}
        minutes = minutes_to(run, best[run.seed], runs) if run.seed in best else None
        if minutes is not None:
            figures[REACHED] = minutes
        for name, value in figures.items():
            found.setdefault(run.arm, {}).setdefault(name, []).append(value)
    return found


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


def significance(runs: Sequence[Run], baseline: str, text: str) -> str:
    """Return one row an arm: for each seed the differences to the baseline, and their p."""
    seeds = sorted({run.seed for run in runs})
    metrics = ("BLEU", "chrF2")
    lines = [["arm", *(f"{metric}, seed {seed}" for seed in seeds for metric in metrics)]]
    for arm in dict.fromkeys(run.arm for run in runs if run.arm != baseline):
        cells: List[str] = []
        for seed in seeds:
            pair = [run for run in runs if run.seed == seed and run.arm in (baseline, arm)]
            pair.sort(key=lambda run: run.arm != baseline)
            cells += _differences(pair, text) if len(pair) == 2 else [""] * len(metrics)
        lines.append([arm, *cells])
    return table(lines)


def _differences(pair: Sequence[Run], text: str) -> List[str]:
    systems = [(run.arm, _lines(run.folder / f"{text}.txt")) for run in pair]
    lower = "case:lc" in pair[0].evaluation.read_text(encoding="utf-8")
    metrics = {"BLEU": sacrebleu.BLEU(lowercase=lower), "chrF2": sacrebleu.CHRF(lowercase=lower)}
    references = [_lines(pair[0].folder / f"{text}.ref")]
    test = PairedTest(systems, metrics, references, test_type="bs", n_samples=SAMPLES)
    found = test()[1]
    return [
        f"{other.score - baseline.score:+.1f} (p = {other.p_value:.3f})"
        for baseline, other in (found[metric] for metric in metrics)
    ]


def _lines(path: Path) -> List[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _mean(found: Sequence[float], seeds: int) -> str:
    if not found:
        return ""
    mean = _four_digits(statistics.fmean(found))
    if len(found) > 1:
        mean += f" ± {statistics.stdev(found):.2g}"
    return mean if len(found) == seeds else f"{mean} ({len(found)} of {seeds})"


def _four_digits(value: float) -> str:
    return f"{value:.0f}" if value >= 10_000 else f"{value:.4g}"


def table(lines: Sequence[Sequence[str]]) -> str:
    """Return lines of cells as a Markdown table; the first line is its head."""
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


if __name__ == "__main__":
    main()
