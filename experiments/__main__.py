"""Train and score all arms with all seeds: ``python -m experiments`` (or ``make experiments``).

What is run is declared in ``plan.yaml``. A run is a recipe's ``train.sh``, its
``evaluate.sh`` and ``fairseq-skd calibration``. They go on where they were interrupted, so the same
command runs what is missing.
"""

import argparse
import concurrent.futures
import contextlib
import dataclasses
import fcntl
import os
import shlex
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from typing import Callable, Dict, Iterator, List, Set

from experiments.figures import collect, compare
from experiments.runner.branch import trunk_checkpoint
from experiments.runner.plan import ROOT, PlanError, Run, Trunk, check_prepared, read

INTERRUPTED = "\nInterrupted. The same command goes on from here."


def main() -> None:
    """Run what is missing, print a line when a run begins and ends, collect the figures."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--plan", type=Path, default=Path(__file__).with_name("plan.yaml"))
    parser.add_argument("--out", type=Path, default=ROOT / "runs", help="where prepared data is")
    parser.add_argument("--csv", type=Path, default=ROOT / "docs" / "results" / "results.csv")
    parser.add_argument("--jobs", type=int, default=1, help="runs side by side (default: 1)")
    args = parser.parse_args()
    if args.jobs < 1:
        parser.error(f"--jobs is {args.jobs}; allowed: 1 or more")
    try:
        runs = read(args.plan, args.out.resolve())
        check_prepared(runs)
        for run in runs:
            collect.complete(run)  # a run that was declared otherwise is refused before any work
        # `kill` and the end of a terminal, unless under nohup, must not leave trainings behind.
        signal.signal(signal.SIGTERM, signal.default_int_handler)
        if signal.getsignal(signal.SIGHUP) != signal.SIG_IGN:
            signal.signal(signal.SIGHUP, signal.default_int_handler)
        failure = Runner(runs, args.jobs).run()
        found = [run for run in runs if collect.complete(run)]
    except (PlanError, OSError) as error:
        sys.exit(f"python -m experiments: {error}")
    if found:
        try:
            figures(found, runs, args.csv)
        except KeyboardInterrupt:
            sys.exit(INTERRUPTED)
    print(f"{len(found)} of {len(runs)} runs are complete")
    if failure:
        sys.exit(failure)


def figures(complete: List[Run], declared: List[Run], path: Path) -> None:
    """Write the figures of complete runs to a CSV file, and what belongs to them beside it."""
    print("Comparing translations with the baselines': some seconds an arm", flush=True)
    names = ("runs", "curves", "compared")
    conditions, curves, compared = (collect.beside(path, name) for name in names)
    collect.write([row for run in complete for row in collect.rows(run)], path)
    collect.write([collect.conditions(run) for run in complete], conditions)
    collect.write([row for run in complete for row in collect.curve_rows(run)], curves)
    collect.write(list(compare.rows(complete, declared)), compared)
    print(
        f"Figures: {path}; what repeats them: {conditions}; validation: {curves}; "
        f"comparisons: {compared}"
    )


class Runner:
    """Runs what is missing, ``jobs`` at a time, each with its share of the cores."""

    def __init__(self, runs: List[Run], jobs: int) -> None:
        self.runs = runs
        self.jobs = jobs
        self.threads = max(1, (os.cpu_count() or 1) // jobs)
        # The recipes' commands are those of this interpreter, whether or not it is on the path.
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ.get('PATH', os.defpath)}"
        self.environment = {**os.environ, "PATH": path, "OMP_NUM_THREADS": str(self.threads)}
        self.lock = threading.Lock()
        self.processes: Set[int] = set()
        self.stopped = False

    def run(self) -> str:
        """Run all, and return what went wrong: the first failure, Ctrl-C or kill stops all."""
        with concurrent.futures.ThreadPoolExecutor(self.jobs) as pool:
            try:
                numbered = enumerate(self.runs, start=1)
                futures = [pool.submit(self._one, n, run) for n, run in numbered]
                for future in concurrent.futures.as_completed(futures):
                    with contextlib.suppress(Stopped):  # because of another one
                        future.result()
            except KeyboardInterrupt:
                return INTERRUPTED
            except RunError as error:
                return f"\npython -m experiments: {error}"
            finally:
                self._stop()
        return ""

    def _one(self, number: int, run: Run) -> None:
        which = f"{run.experiment}, {run.task}, {run.arm}, seed {run.seed}"
        title = f"[{number}/{len(self.runs)}] {which}"
        run.folder.mkdir(parents=True, exist_ok=True)
        with self._alone(run, title) as lock:
            if collect.complete(run):
                print(f"{title}: complete already", flush=True)
                return
            began = time.time()
            collect.began(run, self.threads)
            if not (run.folder / "done").exists():
                if run.after is not None:
                    self._wait(title, f"the end of {run.after}", (run.after / "done").exists)
                if run.trunk is not None and not (run.folder / "checkpoint_last.pt").exists():
                    self._wait_for_trunk(title, run.trunk)
                    self._command(run.branch, run.folder / "branch.out", "wb", lock)
                print(f"{title}: training, log {run.folder}/train.log", flush=True)
                self._command(run.train, run.folder / "train.out", "wb", lock)
            print(f"{title}: evaluation on {run.text}", flush=True)
            partial = run.evaluation.with_suffix(".partial")
            found = self._length_penalties(run, partial, lock)
            best = max(found, key=lambda penalty: found[penalty]) if found else None
            # The report compares the validation text in the folder: that of the best one.
            if best is not None and run.text == "valid" and best != run.length_penalties[-1]:
                self._command(run.evaluate("valid", best), partial, "wb", lock)
            if best is None or run.text != "valid":
                self._command(run.evaluate(run.text, best), partial, "wb", lock)
            with partial.open("a") as file:
                file.writelines(collect.length_penalty_lines(found, best))
                file.write(collect.scored_by(run))
            self._command(run.calibrate, partial, "ab", lock)
            rows = collect.rows(run, partial)
            partial.replace(run.evaluation)
        figures = ", ".join(f"{row['measure']} {row['value']}" for row in rows)
        print(f"{title}: {figures}; {(time.time() - began) / 60:.1f} minutes", flush=True)

    def _length_penalties(self, run: Run, partial: Path, lock: int) -> Dict[float, float]:
        """Return the BLEU on validation text with each length penalty of a run."""
        on_valid = dataclasses.replace(run, text="valid")
        if run.text != "valid" and collect.scored(on_valid):
            # Of an experiment on validation text, whose translations must stay.
            return collect.length_penalties(on_valid.evaluation.read_text(encoding="utf-8"))
        found = {}
        for penalty in run.length_penalties:
            self._command(run.evaluate("valid", penalty), partial, "wb", lock)
            scores = {name: value for name, value, _ in collect.scores(partial.read_text())}
            found[penalty] = scores["valid BLEU"]
        return found

    def _wait_for_trunk(self, title: str, trunk: Trunk) -> None:
        folder, updates = trunk.run.folder, trunk.updates

        def ready() -> bool:
            if trunk_checkpoint(folder, updates) is not None:
                return True
            if (folder / "done").exists():
                raise RunError(f"{folder} has kept no checkpoint of update {updates}")
            return False

        self._wait(title, f"update {updates} in {folder}", ready)

    def _wait(self, title: str, what: str, ready: Callable[[], bool]) -> None:
        """Wait for something that another run makes, which was begun before."""
        if not ready():
            print(f"{title}: waiting for {what}", flush=True)
        while not ready():
            if self.stopped:
                raise Stopped
            time.sleep(1)

    def _command(self, command: List[str], output: Path, mode: str, lock: int) -> None:
        with output.open(mode) as file, self.lock:
            if self.stopped:
                raise Stopped
            process = subprocess.Popen(
                command,
                stdout=file,
                stderr=subprocess.STDOUT,
                cwd=ROOT,
                env=self.environment,
                pass_fds=[lock],
                start_new_session=True,  # a group of its own, which can be stopped as a whole
            )
            self.processes.add(process.pid)
        status = process.wait()
        with self.lock:
            self.processes.remove(process.pid)
            if self.stopped:
                raise Stopped
            self.stopped = status != 0  # nothing else is begun
        if status != 0:
            tail = "\n".join(output.read_text(errors="replace").splitlines()[-10:])
            raise RunError(f"{shlex.join(command)} failed; the end of {output}:\n{tail}")

    @contextlib.contextmanager
    def _alone(self, run: Run, title: str) -> Iterator[int]:
        """Hold a run's folder, so that no two processes share it, and give the lock.

        What is started with the lock keeps it, also if this program is killed with no chance to
        stop it. Then the next one waits for its end.
        """
        with (run.folder / "lock").open("w") as file:
            told = False
            while not self.stopped:
                with contextlib.suppress(BlockingIOError):
                    fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                    break
                if not told:
                    print(f"{title}: waiting for another process in {run.folder}", flush=True)
                    told = True
                time.sleep(1)
            else:
                raise Stopped
            # Scripts use the numbers up to 9 as they like: recipe.sh would lose a lock that was 3.
            lock = fcntl.fcntl(file, fcntl.F_DUPFD_CLOEXEC, 10)
            try:
                yield lock
            finally:
                os.close(lock)

    def _stop(self) -> None:
        with self.lock:
            self.stopped = True
            for process in self.processes:
                with contextlib.suppress(ProcessLookupError):  # it has just ended by itself
                    os.killpg(process, signal.SIGTERM)


class RunError(Exception):
    """A command has failed; the message holds the end of its output."""


class Stopped(Exception):
    """Something else has failed, or all are to stop."""


if __name__ == "__main__":
    main()
