"""The benchmarks run, on a tiny shape; no time is asserted."""

import json
import logging
import re
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from benchmarks import __main__ as benchmarks
from benchmarks import report, stored
from benchmarks.measure import added_memory, percentiles
from benchmarks.workloads import CRITERIA, Shape
from fairseq_skd.word_file import WordFile
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


def test_reading_a_teachers_file(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(stored, "SHAPE", Shape(1_200, 50, 16, 16, 1))
    arguments = ["stored", "--rounds", "2", "reading", str(tmp_path), "--gigabytes", "0.002"]
    monkeypatch.setattr(sys, "argv", arguments)
    stored.main()
    printed = capsys.readouterr().out
    assert re.search(r"small file +│ +\d\.\d+ │ +\d\.\d+ to \d\.\d+ │ +1\.00", printed)
    assert re.search(r"0\.002 GB, cold +│ +\d\.\d+ │", printed)
    assert not list(tmp_path.iterdir())
    file = stored.made_up(tmp_path / "teacher.skd", 30_000)  # more than are drawn
    assert not WordFile(file).damaged()


def test_writing_a_teachers_file(monkeypatch, tmp_path, capsys):
    """Words a second are those of the training text without what the validation text takes too."""

    def run(*command):
        text = "train" if "train" in command else "valid"
        times = 1 + 1.5 * (5 in command) + (command[0] == "fairseq-skd")
        clock[0] += 3 + (20 if text == "train" else 0) * times
        words = {"train": 2100, "valid": 100}[text]
        return "read\n" + json.dumps({"teacher": [{"words": words}]})

    clock = [0.0]
    monkeypatch.setattr(stored, "run", run)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", ["stored", "--rounds", "2", "writing", "data", "model.pt"])
    stored.main()
    assert cells(capsys.readouterr().out) == [
        ["fairseq-validate", "23.0", "3.0", "100", "1.00"],
        ["fairseq-skd teach", "43.0", "3.0", "50", "0.50"],
        ["the same, --sampled 5", "73.0", "3.0", "29", "0.29"],
    ]


def test_speed_of_decoding(monkeypatch, capsys):
    pytest.importorskip("ctranslate2")
    from benchmarks import decoding

    def run(*command):
        if command[0] != "fairseq-generate":
            return ""
        speed = 20 if Path("large.pt") in command else 50
        said = f"Translated 2 sentences (6 tokens) in 1.0s ({speed} sentences/s, 6 tokens/s)"
        return f"S-1\ta b\nS-0\tc\nx | {said}"

    def translate(sentences, **options):
        assert sentences == [["a", "b"], ["c"]]
        clock[0] += 0.5

    clock = [0.0]
    translator = SimpleNamespace(translate_batch=translate)
    monkeypatch.setattr(decoding, "run", run)
    monkeypatch.setattr(decoding.ctranslate2, "Translator", lambda *_, **options: translator)
    monkeypatch.setattr("time.perf_counter", lambda: clock[0])
    monkeypatch.setattr(sys, "argv", ["decoding", "--rounds", "2", "data", "large.pt", "small.pt"])
    decoding.main()
    assert cells(capsys.readouterr().out) == [
        ["large.pt", "20", "1.00", "4", "1.00"],
        ["small.pt", "50", "2.50", "4", "1.00"],
    ]


def cells(printed):
    """Return the body of a table that was printed."""
    rows = [line.split("│")[1:-1] for line in printed.splitlines() if "│" in line]
    return [[cell.strip() for cell in row] for row in rows]


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
