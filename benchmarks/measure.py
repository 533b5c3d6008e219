"""Time things in turn and take medians; read the peak of memory."""

import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, Callable, Dict, List

import torch


def processor() -> str:
    """Return the name of the processor, on Linux with its family and model.

    Virtual machines give the same name to several generations, on which the same sums are rounded
    otherwise: a training with the same seed comes to other figures.
    """
    path = Path("/proc/cpuinfo")
    lines = path.read_text().splitlines() if path.exists() else []
    known: Dict[str, str] = {}
    for name, found, value in (line.partition(":") for line in lines):
        if found:
            known.setdefault(name.strip(), value.strip())
    name = known.get("model name", platform.processor())
    if "cpu family" in known and "model" in known:
        name += f" (family {known['cpu family']}, model {known['model']})"
    return name


def in_turn(functions: Dict[str, Callable[[], object]], rounds: int) -> Dict[str, List[float]]:
    """Return the seconds of each call: one measured call of each in every round.

    Whatever else slows the machine down for a while slows all of them down, so the ratio of two
    medians is worth more than either. Before each measured call the same function runs once
    unmeasured: the allocator then holds what this function left behind, as in a training, and not
    what the one before it did.
    """
    seconds: Dict[str, List[float]] = {name: [] for name in functions}
    clock = _cuda_seconds if torch.cuda.is_available() else seconds_of
    for _ in range(rounds):
        for name, function in functions.items():
            function()
            seconds[name].append(clock(function))
    return seconds


def seconds_of(function: Callable[[], object]) -> float:
    """Return how long a call takes."""
    began = time.perf_counter()
    function()
    return time.perf_counter() - began


def _cuda_seconds(function: Callable[[], object]) -> float:
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    function()
    end.record()
    torch.cuda.synchronize()
    return begin.elapsed_time(end) / 1000


def percentiles(seconds: List[float]) -> Dict[str, float]:
    """Return the median and the 20th and 80th percentiles."""
    cuts = statistics.quantiles(seconds, n=10, method="inclusive")
    return {"median": statistics.median(seconds), "p20": cuts[1], "p80": cuts[7]}


def added_memory(function: Callable[[], object]) -> float:
    """Return the peak of memory during a call over the memory before it, in MiB.

    On a CPU that is the peak of the process's resident memory (Linux), so each measurement needs
    a process of its own: memory that was freed before would be used again unseen.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # starts VmHWM anew
    before = _status("VmRSS")
    function()
    return (_status("VmHWM") - before) / 2**10


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field):
            return int(line.split()[1])
    raise KeyError(field)


def run(*command: Any) -> str:
    """Run a command of this environment, and return what it prints; stop if it fails."""
    program = Path(sys.executable).parent / command[0]
    done = subprocess.run(
        [str(part) for part in (program, *command[1:])],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )
    if done.returncode:
        sys.exit(f"{' '.join(map(str, command))} failed:\n{done.stdout[-2000:]}")
    return done.stdout
