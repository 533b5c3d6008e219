"""The benchmarks run, on a tiny shape; no time is asserted."""

import logging
import re
import subprocess
import sys

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import report
from benchmarks.measure import added_memory, percentiles
from benchmarks.workloads import CRITERIA, Shape
from tests.conftest import ROOT


@pytest.mark.parametrize(
    ("shape", "names"),
    [
        (Shape(1_200, 50, 16, 16, 1), list(CRITERIA)),
        (Shape(1_200, 256, 16, 16, 1, language_model=True), list(CRITERIA)),
    ],
    ids=["translation", "language model"],
)
def test_every_criterion_is_measured(monkeypatch, tmp_path, capsys, shape, names):
    monkeypatch.setattr(logging, "disable", lambda level: None)  # other tests read the log
    monkeypatch.setattr(benchmarks, "SHAPES", {"tiny": shape})
    out = tmp_path / "figures.csv"
    arguments = ["benchmarks", "--only", "step", "--rounds", "2", "--out", str(out)]
    monkeypatch.setattr(sys, "argv", arguments)
    benchmarks.main()
    rows = report.read(out)
    steps = [row for row in rows if row["what"] == benchmarks.STEP]
    assert [row["name"] for row in steps] == names
    assert float(steps[0]["ratio"]) == 1
    assert all(float(row["median"]) > 0 and row["torch"] and row["device"] for row in rows)
    assert "| tiny |" in report.table(rows)
    assert out.with_suffix(".svg").read_text().startswith("<?xml")
    assert "self-KD" in capsys.readouterr().out


def test_a_part_does_not_replace_the_whole(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks", "--only", "step"])
    with pytest.raises(SystemExit):
        benchmarks.main()
    assert "--out FILE.csv must say where to write it" in capsys.readouterr().err


def test_percentiles_and_memory():
    assert percentiles([1.0, 2.0, 3.0, 4.0, 5.0]) == {"median": 3, "p20": 1.8, "p80": 4.2}
    kept = []
    assert added_memory(lambda: kept.append(bytearray(b"x") * 64 * 2**20)) >= 60


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is one")
def test_the_script_for_a_gpu_says_so_where_there_is_none():
    script = [str(ROOT / "benchmarks" / "gpu.sh")]
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable}
    done = subprocess.run(script, stderr=subprocess.PIPE, text=True, env=environment)
    assert done.returncode == 1
    assert re.search(r"torch \S+ finds no GPU; --trial tries the script without one", done.stderr)
    done = subprocess.run([*script, "--fast"], stderr=subprocess.PIPE, text=True)
    assert done.returncode == 2
    assert "there is no option --fast" in done.stderr
