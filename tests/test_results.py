"""The runner of experiments: what it runs, what it leaves alone, what it collects."""

import csv
import shutil
import signal
import subprocess
import sys

import pytest

from results import collect, plan, report
from tests.conftest import ROOT

PLAN = """
tasks: {translate: {recipe: translation/multi30k, options: [--lr, 0.5]}}
arms:
  plain: {criterion: label_smoothed_cross_entropy}
  near: {criterion: self_kd, options: [--self-kd-top-k, 3]}
experiments:
  - {task: translate, seeds: [1, 2], arms: [plain, near]}
"""
INNER = (
    "2026-01-01 00:00:00 | INFO | train_inner | epoch 001:  {n} / 9 loss=3, ppl=8, num_updates={n},"
)
INNER += " lr=0.1, train_wall={wall}, wall=99"
VALID = "2026-01-01 00:00:00 | INFO | valid | epoch 001 | valid on 'valid' subset | loss 3.5"
VALID += " | nll_loss 2.5 | ppl {ppl} | wps 1e+06 | num_updates {n} | best_loss 3.5"
EVALUATION = """
test2016, en-de, detokenised text (the figure to quote, with its signature):
  BLEU|nrefs:1|case:lc|version:2.6.0 = 36.4 68/44/30/22 (BP = 0.958 ratio = 0.959 hyp_len = 9)
chrF2|nrefs:1|case:lc|version:2.6.0 = 60.2
test2016, en-de, tokenised text (as papers of this task quote it; not comparable with the above):
BLEU|nrefs:1|tok:none|version:2.6.0 = 37.5 69/45/31/23 (BP = 0.960 ratio = 0.961 hyp_len = 9)
"""


def prepare(tmp_path, text=PLAN):
    (tmp_path / "multi30k" / "data").mkdir(parents=True)
    (tmp_path / "plan.yaml").write_text(text)
    return tmp_path / "plan.yaml"


def finish(run):
    run.folder.mkdir(parents=True)
    log = [
        INNER.format(n=100, wall=50),
        VALID.format(ppl=9.5, n=120),
        VALID.format(ppl=5.25, n=240),
    ]
    log += [INNER.format(n=300, wall=300), VALID.format(ppl=6, n=360)]
    (run.folder / "train.log").write_text("\n".join(log) + "\n")
    (run.folder / collect.EVALUATION).write_text(EVALUATION)
    (run.folder / "done").touch()


def test_a_plan_is_read_seed_by_seed(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)
    assert [(run.arm, run.seed) for run in runs] == [
        *(("plain", 1), ("near", 1)),
        *(("plain", 2), ("near", 2)),
    ]
    assert runs[1].train == [
        *(str(ROOT / "examples/translation/multi30k/train.sh"), "self_kd"),
        *("--out", str(tmp_path / "multi30k"), "--name", "near-seed1", "--seed", "1"),
        *("--lr", "0.5", "--self-kd-top-k", "3"),
    ]
    assert runs[1].evaluate[1:] == runs[1].train[1:8]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.replace("[plain, near]", "[plain, far]"), "the arm is far; allowed: plain, near"),
        (PLAN.replace("task: translate", "task: talk"), "the task is talk; allowed: translate"),
        (PLAN.replace("translation/multi30k", "translation/other"), "other holds no data; first:"),
    ],
)
def test_a_plan_for_what_is_not_there_is_refused(text, message, tmp_path):
    path = prepare(tmp_path, text)
    with pytest.raises(plan.PlanError, match=message):
        plan.read(path, tmp_path)


def test_the_plan_of_the_project_is_valid(tmp_path):
    for recipe in ("multi30k", "wikitext2"):
        (tmp_path / recipe / "data").mkdir(parents=True)
    runs = plan.read(ROOT / "results" / "experiments.yaml", tmp_path)
    assert len({run.folder for run in runs}) == len(runs)
    assert {run.seed for run in runs} == {1, 2, 3}


def test_figures_are_those_of_log_and_evaluation(tmp_path):
    run = plan.read(prepare(tmp_path), tmp_path)[1]
    assert not collect.complete(run)
    finish(run)
    assert collect.complete(run)
    rows = collect.rows(run)
    assert {row["measure"]: row["value"] for row in rows} == {
        **{"validation perplexity": 5.25, "updates to it": 240, "updates": 360},
        **{"seconds an update": 1.0},  # the median of 50 / 100 and 300 / 200
        **{"test2016 BLEU": 36.4, "test2016 length ratio": 0.959, "test2016 chrF2": 60.2},
    }
    (bleu,) = [row for row in rows if row["measure"] == "test2016 BLEU"]
    assert bleu["signature"] == "BLEU|nrefs:1|case:lc|version:2.6.0"
    assert bleu["command"].startswith("examples/translation/multi30k/train.sh self_kd --out ")
    line = "valid: perplexity 120.50 a word (6.91 bits), each word with at least 96 words before it"
    assert list(collect.scores(line)) == [("valid perplexity", 120.5, "context:96")]


def results(tmp_path, *options):
    return subprocess.run(
        [
            *(sys.executable, "-m", "results", "--plan", tmp_path / "plan.yaml"),
            *("--out", tmp_path, "--csv", tmp_path / "out.csv", *options),
        ],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def test_what_is_complete_is_left_alone_and_a_failure_is_shown(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)
    for run in runs[:3]:
        finish(run)
    # The last one cannot be trained: its data is an empty folder.
    done = results(tmp_path)
    assert done.returncode != 0
    assert done.stdout.count("complete already") == 3
    assert "train.sh self_kd --out" in done.stdout
    assert "failed; the end of" in done.stdout
    assert "3 of 4 runs are complete" in done.stdout
    with (tmp_path / "out.csv").open(encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 3 * 7
    assert "Training with self_kd" in (runs[3].folder / "train.out").read_text()
    shutil.rmtree(runs[3].folder)
    finish(runs[3])
    done = results(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "4 of 4 runs are complete" in done.stdout


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_an_interruption_stops_what_runs(number, tmp_path):
    prepare(tmp_path)
    arguments = ["--plan", tmp_path / "plan.yaml", "--out", tmp_path, "--csv", tmp_path / "out.csv"]
    with subprocess.Popen(
        [sys.executable, "-m", "results", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        # Tests in the background of a script are told to ignore it, and so would be this process.
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
    ) as process:
        for line in process.stdout:
            if "training, log" in line:
                break
        process.send_signal(number)
        printed = process.communicate(timeout=60)[0]
    assert process.returncode != 0
    assert "Interrupted. The same command goes on from here." in printed
    assert "training, log" not in printed  # no other run was begun
    found = subprocess.run(["pgrep", "-f", str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert found.stdout == ""  # none was left behind


def test_the_report_compares_seed_by_seed_with_the_first_arm(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)
    reference = [
        f"{'abc'[i % 3]} man number {i} walks past {i % 7} red houses ." for i in range(60)
    ]
    for run in runs:
        finish(run)
        (run.folder / "test2016.ref").write_text("\n".join(reference) + "\n")
        # `near` is right everywhere with seed 1, and just as wrong as `plain` with seed 2.
        right = run.arm == "near" and run.seed == 1
        lines = reference if right else [line.replace("red", "green") for line in reference]
        (run.folder / "test2016.txt").write_text("\n".join(lines) + "\n")
    table = report.significance(runs, "test2016").splitlines()
    assert table[0] == "| arm | seed 1 | seed 2 |"
    arm, one, two = table[2].strip("| ").split(" | ")
    assert arm == "near"
    assert float(one.split()[0]) > 5
    assert "p = 0.001" in one
    assert two.startswith("+0.0 (p = ")
    means = report.means(runs).splitlines()
    assert means[0].startswith("| arm | seeds | validation perplexity | updates to it |")
    assert means[2].startswith("| plain | 2 | 5.25 ± 0 | 240 ± 0 |")


def test_a_report_of_nothing_is_refused(tmp_path, monkeypatch):
    path = prepare(tmp_path)
    arguments = ["report", "--plan", str(path), "--out", str(tmp_path)]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match="no run is complete yet; first:  python -m results"):
        report.main()
    monkeypatch.setattr(sys, "argv", [*arguments[:-1], str(tmp_path / "none")])
    with pytest.raises(SystemExit, match="holds no data; first:"):
        report.main()
