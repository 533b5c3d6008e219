"""Compare self-KD with fairseq's own criteria: ``python -m benchmarks`` (or ``make benchmark``)."""

import argparse
import csv
import logging
import os
import platform
import subprocess
import sys
import warnings
from pathlib import Path
from typing import Dict, List

import torch
from fairseq import __version__ as fairseq_version

from benchmarks.measure import added_memory, in_turn, percentiles
from benchmarks.workloads import DEVICE, SHAPES, losses, refreshes, training_steps
from fairseq_skd import __version__

FIELDS = ["what", "shape", "name", "median", "p20", "p80", "ratio", "unit"]


def main() -> None:
    """Measure, print as it goes, and write everything to one CSV."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7, help="calls of each (default: 7)")
    parser.add_argument("--only", choices=["step", "loss", "memory", "refresh"])
    parser.add_argument("--shape", choices=list(SHAPES), help="default: all")
    parser.add_argument("--out", type=Path, default=Path("docs/benchmarks.csv"))
    parser.add_argument("--memory-of", nargs=2, help=argparse.SUPPRESS)  # a process of its own
    args = parser.parse_args()
    if args.rounds < 2:
        parser.error(f"--rounds is {args.rounds}; allowed: 2 or more")
    if args.memory_of:
        shape, name = args.memory_of
        print(added_memory(losses(SHAPES[shape])[name]))
        return
    logging.disable(logging.INFO)  # fairseq's and hydra's, of which one would find no figure
    warnings.simplefilter("ignore")
    device = torch.cuda.get_device_name() if DEVICE.type == "cuda" else _processor()
    conditions = (
        f"{device}; torch {torch.__version__}, fairseq {fairseq_version}, "
        f"fairseq_skd {__version__}, Python {platform.python_version()}; float32; "
        f"{torch.get_num_threads()} threads; medians of {args.rounds} in turn"
    )
    print(conditions, flush=True)
    rows: List[Dict[str, object]] = []
    for name, shape in SHAPES.items():
        if args.shape not in (None, name):
            continue
        if args.only in (None, "step"):
            rows += _times("step", name, in_turn(training_steps(shape), args.rounds))
        if "6+6" in name:
            continue
        if args.only in (None, "loss"):
            rows += _times("loss", name, in_turn(losses(shape), args.rounds))
        if args.only in (None, "memory"):
            rows += _memory(name)
    if args.only in (None, "refresh") and args.shape is None:
        rounds = max(2, args.rounds // 2)
        rows += _times(
            "refresh", "V=32768, d=512", in_turn(refreshes(32_768, 512), rounds), "products"
        )
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with args.out.open("w", newline="") as file:
        file.write(f"# {conditions}\n")
        writer = csv.DictWriter(file, FIELDS)
        writer.writeheader()
        writer.writerows(rows)
    print(f"Written to {args.out}")


def _times(
    what: str, shape: str, seconds: Dict[str, List[float]], base: str = "label smoothing"
) -> List[Dict[str, object]]:
    figures = {name: percentiles(values) for name, values in seconds.items()}
    rows = []
    for name, values in figures.items():
        ratio = values["median"] / figures[base]["median"]
        print(
            f"{what:<8}{shape:<20}{name:<20}{values['median']:8.3f} s "
            f"({values['p20']:.3f} to {values['p80']:.3f})  x {ratio:.2f}",
            flush=True,
        )
        row = {key: round(value, 4) for key, value in {**values, "ratio": ratio}.items()}
        rows.append({"what": what, "shape": shape, "name": name, "unit": "s", **row})
    return rows


def _memory(shape: str) -> List[Dict[str, object]]:
    names = ["label smoothing", "self-KD"]
    added = {}
    for name in names:
        program = [sys.executable, "-m", "benchmarks", "--memory-of", shape, name]
        done = subprocess.run(program, stdout=subprocess.PIPE, check=True, text=True)
        added[name] = float(done.stdout.split()[-1])
    rows = []
    for name in names:
        ratio = added[name] / added[names[0]]
        print(
            f"memory  {shape:<20}{name:<20}{added[name]:8.0f} MiB added  x {ratio:.2f}", flush=True
        )
        figures = {"median": round(added[name]), "ratio": round(ratio, 4)}
        rows.append({"what": "memory", "shape": shape, "name": name, "unit": "MiB", **figures})
    return rows


def _processor() -> str:
    for line in Path("/proc/cpuinfo").read_text().splitlines():
        if line.startswith("model name"):
            return f"{line.split(':')[1].strip()}, {os.cpu_count()} cores"
    return platform.processor()


if __name__ == "__main__":
    main()
