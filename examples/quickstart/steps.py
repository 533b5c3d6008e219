"""Steps of the quick start: each says what it does and keeps a log; one that fails ends all."""

import collections
import os
import shlex
import subprocess
import sys
from pathlib import Path
from typing import Any, Callable, Deque, Dict, NoReturn, Optional, Sequence

ROOT = Path(__file__).resolve().parents[2]


def say(line: str) -> None:
    """Print a line in one piece, so that those of two trainings do not mix."""
    print(f"{line}\n", end="", flush=True)


def step(title: str) -> None:
    """Say what begins."""
    say(f"\n{title}")


def stop(message: str) -> NoReturn:
    """End the program with a reason."""
    sys.exit(f"\nThe quick start has stopped: {message}")


def short(path: Any) -> str:
    """Return a path as it is named from the current folder."""
    return os.path.relpath(path) if os.path.isabs(path) else str(path)


def run(
    command: Sequence[Any],
    log: Path,
    on_line: Callable[[str], None] = lambda line: None,
    started: Callable[["subprocess.Popen[str]"], None] = lambda process: None,
    environment: Optional[Dict[str, str]] = None,
) -> None:
    """Run a command, keep its output in a log and hand on every line; stop on failure."""
    arguments = [str(argument) for argument in command]
    say(f"  $ {shlex.join([short(a) for a in arguments])}")
    # The commands of this interpreter's environment, whether or not it is activated.
    arguments[0] = str(Path(sys.executable).parent / arguments[0])
    with log.open("a", encoding="utf-8") as file:
        process = subprocess.Popen(
            arguments,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            cwd=ROOT,
            env=environment,
        )
        started(process)
        assert process.stdout is not None
        tail: Deque[str] = collections.deque(maxlen=15)
        try:
            for line in process.stdout:
                file.write(line)
                tail.append(line)
                on_line(line.rstrip("\n"))
            status = process.wait()
        except BaseException:
            process.terminate()
            process.wait()
            raise
    if status != 0:
        stop(f"{arguments[0]} failed; the end of {short(log)}:\n{''.join(tail)}")
