"""Compare self-KD with fairseq's own criteria: ``python -m benchmarks`` (or ``make benchmark``)."""

import argparse
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Callable, Dict, List

import torch
from fairseq import __version__ as fairseq_version

from benchmarks import report
from benchmarks.measure import added_memory, in_turn, percentiles, processor
from benchmarks.workloads import (
    BASELINE,
    DEVICE,
    LARGE,
    PAST,
    SHAPES,
    Training,
    criteria,
    losses,
    refreshes,
)
from fairseq_skd import __version__

STEP = "training step (forward, backward, Adam)"
GRADIENTS = "the same without Adam"
LOSS = "projection and loss alone"
REFRESH = "refresh of the neighbors"
MEMORY = "memory added by projection and loss"
STEP_MEMORY = "memory added by a training step"
START_MEMORY = "memory added by the first two steps without Adam, refresh included"
VALIDATION_MEMORY = "memory added by a validation step"


def main() -> None:
    """Measure, print as it goes, and write everything to one CSV and, of the steps, one plot."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="calls of each (default: 7)")
    parser.add_argument("--only", choices=["step", "loss", "memory", "refresh"])
    parser.add_argument("--shape", choices=[*SHAPES, *LARGE], nargs="+", help="default: all")
    parser.add_argument("--out", type=Path, help=f"default: {report.CSV.relative_to(report.ROOT)}")
    parser.add_argument("--memory-of", nargs=3, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; allowed: 2 or more")
    if args.out is None and (args.only or args.shape):
        parser.error("--only and --shape measure a part; --out FILE.csv must say where to write it")
    out: Path = args.out or report.CSV
    partial = out.with_name(out.name + ".partial")
    logging.disable(logging.INFO)  # fairseq's and hydra's, of which one would find no figure
    warnings.simplefilter("ignore")
    if args.memory_of:
        what, shape, name = args.memory_of
        print(added_memory(_memory_workload(what, shape, name)))
        return
    conditions: report.Row = {
        "device": torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "dtype": "float32",
        "torch": torch.__version__,
        "fairseq": fairseq_version,
        "fairseq_skd": __version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()), flush=True)
    rows: List[report.Row] = []
    for name, shape in SHAPES.items():
        if name not in (args.shape or SHAPES):
            continue
        large = shape.layers > 1
        rounds = max(3, args.rounds // 2) if large else args.rounds
        if args.only in (None, "step"):
            steps = {c: Training(shape, c) for c in criteria(shape)}
            rows += _times(STEP, name, steps, rounds)
            del steps
        if args.only in (None, "step") and not large:
            steps = {c: Training(shape, c, update=False) for c in criteria(shape)[:2]}
            rows += _times(GRADIENTS, name, steps, rounds)
            del steps
        if args.only in (None, "loss") and not large:
            rows += _times(LOSS, name, losses(shape), rounds)
        if args.only in (None, "memory"):
            for what in (STEP_MEMORY, START_MEMORY):
                rows += _memory(what, name, [BASELINE, "self-KD", PAST])
            if not large:
                loss_names = [BASELINE, "self-KD", "self-KD from logits"]
                rows += _memory(MEMORY, name, loss_names)
        _save(rows, conditions, partial)  # what follows may fail
    for name in LARGE:
        if args.only in (None, "memory") and (not args.shape or name in args.shape):
            rows += _memory(STEP_MEMORY, name, [BASELINE, "self-KD"])
            rows += _memory(VALIDATION_MEMORY, name, [BASELINE, "self-KD"])
            _save(rows, conditions, partial)
    if args.only == "refresh" or (args.only is None and not args.shape):
        rounds = max(3, args.rounds // 2)
        rows += _times(REFRESH, "V = 32,768, d = 512", refreshes(32_768, 512), rounds, "products")
    _save(rows, conditions, partial)
    partial.replace(out)
    print(f"Written to {out}; as a table: python -m benchmarks.report")
    if any(row["what"] == STEP for row in rows):
        report.plot(rows, out.with_suffix(".svg"))


def _save(rows: List[report.Row], conditions: report.Row, path: Path) -> None:
    order = [STEP, GRADIENTS, LOSS, STEP_MEMORY, START_MEMORY, VALIDATION_MEMORY, MEMORY, REFRESH]
    found = sorted(rows, key=lambda row: order.index(row["what"]))
    report.write([{**row, **conditions} for row in found], path)


def _times(
    what: str,
    shape: str,
    functions: Dict[str, Callable[[], object]],
    rounds: int,
    base: str = BASELINE,
) -> List[report.Row]:
    figures = {name: percentiles(values) for name, values in in_turn(functions, rounds).items()}
    rows = []
    for name, values in figures.items():
        ratio = values["median"] / figures[base]["median"]
        print(
            f"{what:<42}{shape:<28}{name:<20}{values['median']:8.3f} s "
            f"({values['p20']:.3f} to {values['p80']:.3f})  x {ratio:.2f}",
            flush=True,
        )
        row = {key: round(value, 4) for key, value in {**values, "ratio": ratio}.items()}
        rows.append({**_row(what, shape, name), **row, "unit": "s", "rounds": rounds})
    return rows


def _memory(what: str, shape: str, names: List[str]) -> List[report.Row]:
    rows = []
    for name in names:
        program = [sys.executable, "-m", "benchmarks", "--memory-of", what, shape, name]
        done = subprocess.run(program, stdout=subprocess.PIPE, check=True, text=True)
        added = float(done.stdout.split()[-1])
        ratio = added / (rows[0]["median"] if rows else added)
        print(f"{what:<42}{shape:<28}{name:<20}{added:8.0f} MiB  x {ratio:.2f}", flush=True)
        figures = {"median": round(added), "ratio": round(ratio, 4)}
        rows.append({**_row(what, shape, name), **figures, "unit": "MiB", "rounds": 1})
    return rows


def _memory_workload(what: str, shape: str, name: str) -> Callable[[], object]:
    if what == MEMORY:
        return losses(SHAPES[shape])[name]
    training = Training({**SHAPES, **LARGE}[shape], name, update=what != START_MEMORY)
    if what == START_MEMORY:
        return lambda: [training() for _ in range(2)]
    training()  # Adam's state and the table of neighbours stay; they are no memory of a step
    return training.validate if what == VALIDATION_MEMORY else training


def _row(what: str, shape: str, name: str) -> report.Row:
    return {
        **{"what": what, "shape": shape, "name": name},
        **{"median": "", "p20": "", "p80": "", "ratio": ""},
    }


if __name__ == "__main__":
    main()
