"""Compare self-KD with fairseq's own criteria: ``python -m benchmarks`` (or ``make benchmark``)."""

import argparse
import gc
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Callable, Dict, List, Optional

import torch
from fairseq import __version__ as fairseq_version

from benchmarks import report
from benchmarks.measure import added_memory, in_turn, percentiles, processor
from benchmarks.workloads import (
    BASELINE,
    DEVICE,
    GPU_SHAPES,
    LARGE,
    PAST,
    STORED,
    Shape,
    Training,
    criteria,
    losses,
    refreshes,
)
from benchmarks.workloads import SHAPES as CPU_SHAPES
from fairseq_skd import __version__

SHAPES = GPU_SHAPES if DEVICE.type == "cuda" else CPU_SHAPES

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
    parser.add_argument(
        "--dtype",
        choices=["float32", "bfloat16", "float16"],
        nargs="+",
        default=["float32"],
        help="of the model (default: float32)",
    )
    parser.add_argument("--out", type=Path, help=f"default: {report.CSV.relative_to(report.ROOT)}")
    parser.add_argument("--memory-of", nargs=4, help=argparse.SUPPRESS)  # a process of its own
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
        print(added_memory(_memory_workload(*args.memory_of)))
        return
    conditions: report.Row = {
        "device": torch.cuda.get_device_name()
        if DEVICE.type == "cuda"
        else f"{processor()}, {os.cpu_count()} cores",
        "threads": torch.get_num_threads(),
        "torch": torch.__version__,
        "fairseq": fairseq_version,
        "fairseq_skd": __version__,
        "python": platform.python_version(),
    }
    print(", ".join(f"{key} {value}" for key, value in conditions.items()), flush=True)
    rows: List[report.Row] = []
    for name, shape in SHAPES.items():
        for kind in args.dtype:
            if name in (args.shape or SHAPES):
                rows += _measure(name, shape, kind, args.only, args.rounds)
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


def _measure(
    name: str, shape: Shape, kind: str, only: Optional[str], rounds: int
) -> List[report.Row]:
    """Return the rows of one shape in one type."""
    dtype = getattr(torch, kind)
    deep, on_gpu = shape.layers > 1, DEVICE.type == "cuda"
    if deep and not on_gpu:
        rounds = max(3, rounds // 2)
    names = criteria(shape)
    rows: List[report.Row] = []
    if only in (None, "step") and shape.layers:
        steps = {c: Training(shape, c, dtype=dtype) for c in names}
        rows += _times(STEP, name, steps, rounds, kind=kind)
        del steps
    if only in (None, "step") and shape.layers and not deep:
        steps = {c: Training(shape, c, update=False, dtype=dtype) for c in names[:2]}
        rows += _times(GRADIENTS, name, steps, rounds, kind=kind)
        del steps
    if only in (None, "loss") and (on_gpu or not deep):
        rows += _times(LOSS, name, losses(shape, dtype), rounds, kind=kind)
    if only in (None, "memory"):
        for what in (STEP_MEMORY, START_MEMORY) if shape.layers else ():
            rows += _memory(what, name, [BASELINE, "self-KD", PAST, STORED], kind)
        if on_gpu or not deep:
            rows += _memory(MEMORY, name, [BASELINE, "self-KD", "self-KD from logits"], kind)
    return rows


def _save(rows: List[report.Row], conditions: report.Row, path: Path) -> None:
    if not rows:
        return
    order = [STEP, GRADIENTS, LOSS, STEP_MEMORY, START_MEMORY, VALIDATION_MEMORY, MEMORY, REFRESH]
    found = sorted(rows, key=lambda row: order.index(row["what"]))
    report.write([{**row, **conditions} for row in found], path)


def _times(
    what: str,
    shape: str,
    functions: Dict[str, Callable[[], object]],
    rounds: int,
    base: str = BASELINE,
    kind: str = "float32",
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
        rows.append({**_row(what, shape, name, kind), **row, "unit": "s", "rounds": rounds})
    return rows


def _memory(what: str, shape: str, names: List[str], kind: str = "float32") -> List[report.Row]:
    rows = []
    for name in names:
        added = _added_memory(what, shape, name, kind)
        ratio = added / (rows[0]["median"] if rows else added)
        print(f"{what:<42}{shape:<28}{name:<20}{added:8.0f} MiB  x {ratio:.2f}", flush=True)
        figures = {"median": round(added), "ratio": round(ratio, 4)}
        rows.append({**_row(what, shape, name, kind), **figures, "unit": "MiB", "rounds": 1})
    return rows


def _added_memory(what: str, shape: str, name: str, kind: str) -> float:
    if DEVICE.type == "cuda":  # which counts what is allocated, whatever was there before
        gc.collect()
        torch.cuda.empty_cache()
        return added_memory(_memory_workload(what, shape, name, kind))
    program = [sys.executable, "-m", "benchmarks", "--memory-of", what, shape, name, kind]
    done = subprocess.run(program, stdout=subprocess.PIPE, check=True, text=True)
    return float(done.stdout.split()[-1])


def _memory_workload(what: str, shape: str, name: str, kind: str) -> Callable[[], object]:
    dtype = getattr(torch, kind)
    if what == MEMORY:
        return losses(SHAPES[shape], dtype)[name]
    chosen = {**SHAPES, **LARGE}[shape]
    training = Training(chosen, name, update=what != START_MEMORY, dtype=dtype)
    if what == START_MEMORY:
        return lambda: [training() for _ in range(2)]
    training()  # Adam's state and the table of neighbours stay; they are no memory of a step
    return training.validate if what == VALIDATION_MEMORY else training


def _row(what: str, shape: str, name: str, kind: str) -> report.Row:
    return {
        **{"what": what, "shape": shape, "name": name},
        **{"median": "", "p20": "", "p80": "", "ratio": "", "dtype": kind},
    }


if __name__ == "__main__":
    main()
