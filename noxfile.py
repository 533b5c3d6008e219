"""The whole suite with every combination that is claimed: ``make test-matrix``.

README.md says which ones were run, and when. torch for Linux is gigabytes with CUDA, so every
environment is removed after its run; pip keeps the downloads.
"""

import shutil
from pathlib import Path

import nox

nox.options.reuse_existing_virtualenvs = True
#: Python and torch. fairseq, hydra-core and the rest follow from the version of Python (setup.py).
COMBINATIONS = [
    ("3.9", "2.4.1"),
    ("3.9", "2.5.1"),
    ("3.9", "2.8.0"),
    ("3.10", "2.4.1"),
    ("3.10", "2.5.1"),
    ("3.10", "2.13.0"),
    ("3.11", "2.4.1"),
    ("3.11", "2.9.1"),
    ("3.11", "2.13.0"),
    ("3.11", "2.14.1"),
    ("3.11", "2.15.0"),
    ("3.12", "2.13.0"),
]
#: What the interpreter of a torch's Triton needs, in which tests/test_kernels.py runs.
NUMPY = {"2.4.1": "numpy<2", "2.9.1": "numpy<2.4"}


@nox.session
@nox.parametrize("python,torch", COMBINATIONS)
def tests(session: nox.Session, torch: str) -> None:
    """Install one combination, run all tests, remove it."""
    lines = Path("constraints.txt").read_text().splitlines()
    lines = [line for line in lines if not line.startswith("torch==")]
    if torch in NUMPY:
        lines = [line for line in lines if not line.startswith("numpy==")] + [NUMPY[torch]]
    pins = Path(session.create_tmp(), "constraints.txt")
    pins.write_text("\n".join(lines))
    if session.python in ("3.9", "3.10"):
        session.install("pip<24.1")  # a newer one refuses omegaconf 2.0
    session.install(f"torch=={torch}")
    session.install("-c", str(pins), f"torch=={torch}", "-e", ".[dev]")
    try:
        session.run("python", "-m", "pytest", "-q", "-n", "2", *session.posargs)
    finally:
        shutil.rmtree(session.virtualenv.location)
