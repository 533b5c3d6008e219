"""Train and score all arms with all seeds: ``python -m experiments`` (or ``make experiments``).

What is run is declared in ``plan.yaml``. A run is a recipe's ``train.sh`` and its ``evaluate.sh``,
before them ``fairseq-skd teach`` where an arm has teachers. All of them go on where they were
interrupted, so the same command runs what is missing. The figures go into one CSV, and the table of
docs/results.md is made from it.
"""

import argparse
import concurrent.futures
import contextlib
import os
import platform
import shlex
import signal
import subprocess
import sys
import threading
from pathlib import Path
from typing import Dict, Iterator, List, Set

import torch

from benchmarks.measure import processor
from experiments import figures
from experiments.plan import ROOT, PlanError, Run, read


def main() -> None:
    """Run what is missing, then write the figures of what is complete."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_name("plan.yaml"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="where prepared data is")
    parser.add_argument("--csv", type=Path, default=figures.CSV)
    parser.add_argument("--only", nargs="+", metavar="EXPERIMENT", help="default: all")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    parser.add_argument("--table", action="store_true", help="only make the table of the page anew")
    args = parser.parse_args()
    if args.table:
        page = figures.PAGE.read_text(encoding="utf-8")
        made = figures.placed(page, figures.table(figures.read(args.csv)))
        figures.PAGE.write_text(made, encoding="utf-8")
        return
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; allowed: 1 or more")
    try:
        declared = read(args.plan, args.out.resolve())
        names = {run.experiment for run in declared}
        for name in args.only or ():
            if name not in names:
                parser.error(f"--only is {name}; allowed: {', '.join(sorted(names))}")
        runs = [run for run in declared if run.experiment in (args.only or names)]
        for run in runs:
            needed = run.prepared
            if not needed.data.is_dir():
                raise PlanError(f"{needed.data} is missing; first:  {shlex.join(needed.prepare)}")
        # `kill` must not leave trainings behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        failure = Runner(runs, args.jobs).run()
    except PlanError as error:
        sys.exit(f"python -m experiments: {error}")
    complete = [run for run in runs if run.evaluation.exists()]
    figures.write([row for run in complete for row in figures.rows(run)], args.csv)
    print(f"{len(complete)} of {len(runs)} runs are complete; figures: {args.csv}")
    if failure:
        sys.exit(failure)


class Runner:
    """Runs what is missing, ``jobs`` at a time, each with its share of the cores."""

    def __init__(self, runs: List[Run], jobs: int) -> None:
        self.runs = runs
        self.jobs = jobs
        # The recipes' commands are those of this interpreter, whether or not it is on the path.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        threads = max(1, (os.cpu_count() or 1) // jobs)
        self.environment = {"OMP_NUM_THREADS": str(threads), **os.environ, "PATH": path}
        self.machine = (
            f"{processor()}, {threads} thread(s), torch {torch.__version__}, "
            f"Python {platform.python_version()}"
        )
        self.processes: Set[subprocess.Popen[bytes]] = set()
        self.stopped = False
        self.failure = ""  # what failed first; what is stopped because of it fails as well
        # Two arms may have one teacher, and two experiments one run: one at a time works on it.
        self.locks: Dict[Path, threading.Lock] = {}
        self.lock = threading.Lock()

    def run(self) -> str:
        """Run all, and return what went wrong; the first failure and Ctrl-C stop all."""
        # Teachers first: two runs with the same ones would wait for each other.
        runs = sorted(self.runs, key=lambda run: run.generation)
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            futures = [pool.submit(self._complete, run) for run in runs]
            try:
                for future in concurrent.futures.as_completed(futures):
                    future.result()
            except KeyboardInterrupt:
                return "\nInterrupted. The same command goes on from here."
            except RunError:
                return f"python -m experiments: {self.failure}"
            finally:
                self._stop()
        return ""

    def _complete(self, run: Run) -> None:
        self._train(run)
        with self._alone(run.evaluation):
            if not run.evaluation.exists():
                partial = run.evaluation.with_suffix(".partial")
                self._command(run.evaluate, partial, "wb")
                partial.replace(run.evaluation)
        print(f"complete: {run.experiment}, {run.arm}, seed {run.seed}", flush=True)

    def _train(self, run: Run) -> None:
        for made in run.made:
            for teacher in made.runs:
                self._train(teacher)
            with self._alone(made.path):
                made.path.parent.mkdir(parents=True, exist_ok=True)
                self._command(made.command, made.path.with_suffix(".out"), "ab")
        with self._alone(run.folder):  # train.sh itself knows whether there is anything to do
            run.folder.mkdir(parents=True, exist_ok=True)
            if not run.machine.exists():
                run.machine.write_text(self.machine, encoding="utf-8")
            self._command(run.train, run.folder / "train.out", "ab")

    @contextlib.contextmanager
    def _alone(self, path: Path) -> Iterator[None]:
        with self.lock:
            lock = self.locks.setdefault(path, threading.Lock())
        with lock:
            yield

    def _command(self, command: List[str], output: Path, mode: str) -> None:
        with output.open(mode) as file:
            with self.lock:
                if self.stopped:
                    raise RunError
                print(f"  $ {shlex.join(command)}".replace(f"{ROOT}/", ""), flush=True)
                process = subprocess.Popen(
                    command,
                    stdout=file,
                    stderr=subprocess.STDOUT,
                    cwd=ROOT,
                    env=self.environment,
                    start_new_session=True,  # a group of its own, which can be stopped as a whole
                )
                self.processes.add(process)
            status = process.wait()
            with self.lock:
                self.processes.remove(process)
                if status != 0 and not self.stopped:
                    # Here, and not when `run` hears of it: by then the next one would have begun.
                    self.stopped = True
                    tail = "\n".join(output.read_text(errors="replace").splitlines()[-10:])
                    self.failure = f"{shlex.join(command)} failed; the end of {output}:\n{tail}"
        if status != 0:
            raise RunError

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(process.pid, signal.SIGTERM)


class RunError(Exception):
    """A command has failed, or was stopped since another one has (``Runner.failure``)."""


if __name__ == "__main__":
    main()
