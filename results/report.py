"""Tables of the results, as Markdown: ``python -m results.report``.

The mean and the standard deviation over seeds of every figure, and for each seed a paired bootstrap
test of BLEU (sacrebleu's) against the first arm of the experiment, which is its baseline.
"""

import argparse
import statistics
import sys
from pathlib import Path
from typing import Dict, List, Sequence

import sacrebleu
from sacrebleu.significance import PairedTest

from results import collect
from results.plan import ROOT, PlanError, Run, read

SAMPLES = 1000


def main() -> None:
    """Print the tables of all complete runs of a plan."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_name("experiments.yaml"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="where prepared data is")
    args = parser.parse_args()
    try:
        runs = [run for run in read(args.plan, args.out.resolve()) if collect.complete(run)]
    except (PlanError, OSError) as error:
        sys.exit(f"python -m results.report: {error}")
    if not runs:
        sys.exit("python -m results.report: no run is complete yet; first:  python -m results")
    for task in dict.fromkeys(run.task for run in runs):
        print(f"## {task}\n")
        of_task = [run for run in runs if run.task == task]
        print(means(of_task))
        test_sets = sorted(path.stem for path in of_task[0].folder.glob("*.ref"))
        for name in test_sets:
            print(f"\nBLEU on {name}, seed by seed: difference to {of_task[0].arm} (p)\n")
            print(significance(of_task, name))
        print()


def means(runs: Sequence[Run]) -> str:
    """Return one row an arm: mean, standard deviation over seeds where there are several."""
    values: Dict[str, Dict[str, List[float]]] = {}
    for run in runs:
        for row in collect.rows(run):
            arm = values.setdefault(run.arm, {})
            arm.setdefault(str(row["measure"]), []).append(float(row["value"]))
    measures = list(next(iter(values.values())))
    lines = [["arm", "seeds", *measures]]
    for arm, figures in values.items():
        seeds = max(len(found) for found in figures.values())
        lines.append([arm, str(seeds), *(_mean(figures.get(name, [])) for name in measures)])
    return _table(lines)


def significance(runs: Sequence[Run], name: str) -> str:
    """Return one row an arm: for each seed the difference of BLEU to the first arm, and its p.

    Paired bootstrap resampling (Koehn 2004) of the test set ``name``, as sacrebleu does it.
    """
    baseline = runs[0].arm
    seeds = sorted({run.seed for run in runs})
    lines = [["arm", *(f"seed {seed}" for seed in seeds)]]
    for arm in dict.fromkeys(run.arm for run in runs if run.arm != baseline):
        cells = []
        for seed in seeds:
            pair = [run for run in runs if run.seed == seed and run.arm in (baseline, arm)]
            pair.sort(key=lambda run: run.arm != baseline)
            cells.append(_difference(pair, name) if len(pair) == 2 else "")
        lines.append([arm, *cells])
    return _table(lines)


def _difference(pair: Sequence[Run], name: str) -> str:
    systems = [(run.arm, _lines(run.folder / f"{name}.txt")) for run in pair]
    lower = "case:lc" in (pair[0].folder / collect.EVALUATION).read_text(encoding="utf-8")
    test = PairedTest(
        systems,
        {"BLEU": sacrebleu.BLEU(lowercase=lower)},
        [_lines(pair[0].folder / f"{name}.ref")],
        test_type="bs",
        n_samples=SAMPLES,
    )
    baseline, other = test()[1]["BLEU"]
    return f"{other.score - baseline.score:+.1f} (p = {other.p_value:.3f})"


def _lines(path: Path) -> List[str]:
    return path.read_text(encoding="utf-8").split("\n")[:-1]


def _mean(found: Sequence[float]) -> str:
    if not found:
        return ""
    mean = f"{statistics.fmean(found):.4g}"
    return mean if len(found) == 1 else f"{mean} ± {statistics.stdev(found):.2g}"


def _table(lines: Sequence[Sequence[str]]) -> str:
    head, *body = ["| " + " | ".join(line) + " |" for line in lines]
    return "\n".join([head, "|" + "---|" * len(lines[0]), *body])


if __name__ == "__main__":
    main()
