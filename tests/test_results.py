"""The runner of experiments: what it runs, what it leaves alone, what it collects."""

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time

import pytest
import torch

from experiments.__main__ import Runner
from experiments.__main__ import main as run_all
from experiments.figures import collect, compare, tables
from experiments.runner import plan
from tests.conftest import ROOT

PLAN = """
tasks:
  translate:
    recipe: translation/multi30k
    options: [--lr, 0.5]
    self_kd: [[--self-kd-start-update, 7], [--self-kd-weight, 0.3]]
    evaluate: [--best]
arms:
  plain: {criterion: label_smoothed_cross_entropy}
  near: {criterion: self_kd, options: [--self-kd-top-k, 3, "{root}/{out}", "{task}{seed}"]}
experiments:
  - {name: first, task: translate, text: test, seeds: [1, 2], arms: [plain, near]}
"""
INNER = (
    "2026-01-01 00:00:00 | INFO | train_inner | epoch 001:  {n} / 9 loss=3, ppl=8, num_updates={n},"
)
INNER += " lr=0.1, train_wall={wall}, wall=99"
VALID = "2026-01-01 00:00:00 | INFO | valid | epoch 001 | valid on 'valid' subset | loss {loss}"
VALID += " | nll_loss 2.5 | ppl {ppl} | wps 1e+06 | num_updates {n} | best_loss 3.5"
LOADED = "2026-01-01 00:00:00 | INFO | fairseq.trainer | "
LOADED += "Loaded checkpoint {path} (epoch 2 @ {n} updates)\n"
EVALUATION = """
test2016, en-de, detokenised text (the figure to quote, with its signature):
  BLEU|nrefs:1|case:lc|version:2.6.0 = 36.4 68/44/30/22 (BP = 0.958 ratio = 0.959 hyp_len = 9)
chrF2|nrefs:1|case:lc|version:2.6.0 = 60.2
test2016, en-de, tokenised text (as papers of this task quote it; not comparable with the above):
BLEU|nrefs:1|tok:none|version:2.6.0 = 37.5 69/45/31/23 (BP = 0.960 ratio = 0.961 hyp_len = 9)
{"calibration": [{"checkpoint": "best.pt", "text": "test", "words": 90, "accuracy": 0.61004, \
"confidence": 0.7, "ece": 0.02496, "nll": 1.5, "own_nll": 0.5}]}
"""
FIGURES = 14  # of a run with this log and this evaluation


def prepare(tmp_path, text=PLAN):
    (tmp_path / "multi30k" / "data").mkdir(parents=True)
    (tmp_path / "plan.yaml").write_text(text)
    return tmp_path / "plan.yaml"


def finish(run):
    run.folder.mkdir(parents=True)
    log = [
        INNER.format(n=100, wall=50),
        VALID.format(loss=3.9, ppl=9.5, n=120),
        VALID.format(loss=3.6, ppl=5.25, n=180),
        VALID.format(loss=3.5, ppl=5.25, n=240),  # the best loss
    ]
    # Interrupted before it was saved, and done again.
    log += [INNER.format(n=300, wall=400), INNER.format(n=300, wall=300)]
    log += [VALID.format(loss=3.7, ppl=6, n=360)]
    (run.folder / "train.log").write_text("\n".join(log) + "\n")
    run.evaluation.write_text(EVALUATION + collect.scored_by(run))
    for name in ("test2016.ref", "test2016.txt"):
        (run.folder / name).write_text("a man walks\n")
    collect.began(run, threads=1)
    (run.folder / "done").touch()


def test_a_plan_is_read_seed_by_seed(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)
    assert [(run.arm, run.seed) for run in runs] == [
        *(("plain", 1), ("near", 1)),
        *(("plain", 2), ("near", 2)),
    ]
    assert runs[1].train == [
        *(str(ROOT / "examples/translation/multi30k/train.sh"), "self_kd"),
        *("--out", str(tmp_path / "multi30k"), "--name", "translate-near-seed1", "--seed", "1"),
        *("--lr", "0.5", "--self-kd-start-update", "7", "--self-kd-weight", "0.3"),
        *("--self-kd-top-k", "3", f"{ROOT}/{tmp_path}/multi30k", "translate1"),
    ]
    assert runs[0].train[8:] == ["--lr", "0.5"]
    assert runs[1].evaluate("test")[1:] == [*runs[1].train[1:8], "--best"]


def test_an_experiment_on_validation_text_leaves_the_test_text_alone(tmp_path):
    text = PLAN + "  - {name: second, task: translate, text: valid, seeds: [1], arms: [near]}\n"
    runs = plan.read(prepare(tmp_path, text), tmp_path)
    options = ["--valid", "--best", "--lenpen", "1.4"]
    assert runs[-1].evaluate("valid", 1.4)[1:] == [*runs[1].train[1:8], *options]
    assert runs[-1].train == runs[1].train
    finish(runs[1])
    assert not collect.complete(runs[-1])  # trained, and not yet scored on that text


def test_an_arm_may_begin_with_what_another_has_learnt(tmp_path):
    text = PLAN.replace("evaluate: [--best]", "trunk: {arm: plain, updates: 7}")
    path = prepare(tmp_path, text)
    trunk, run = plan.read(path, tmp_path)[:2]
    assert trunk.branch == []
    assert run.branch[1:] == [
        *("-m", "experiments.runner.branch", str(trunk.folder), "7", str(run.folder)),
        *("--criterion", "self_kd", "--user-dir", str(ROOT / "fairseq_skd")),
    ]
    finish(run)
    conditions = collect.conditions(run)
    assert conditions["trunk"].startswith("examples/translation/multi30k/train.sh label_smoothed")
    command = conditions["command"]
    assert command.index("experiments.runner.branch") < command.index(
        " && examples/translation/multi30k/train.sh"
    )
    path.write_text(text.replace("[plain, near]", "[near, plain]"))
    with pytest.raises(plan.PlanError, match="near of translate needs plain with seed 1, which is"):
        plan.read(path, tmp_path)
    path.write_text(text.replace("updates: 7", "updates: 8"))
    with pytest.raises(plan.PlanError, match="distils from update 7, so it cannot begin with 8 "):
        plan.read(path, tmp_path)
    path.write_text(text.replace("self_kd, options: [", "self_kd, trunk: false, options: ["))
    assert plan.read(path, tmp_path)[1].branch == []
    text = text.replace("self_kd, options: [", "self_kd, trunk: other, options: [")
    text = text.replace("arms:\n", "arms:\n  other: {criterion: cross_entropy}\n")
    path.write_text(text.replace("[plain, near]", "[other, near]"))
    other, run = plan.read(path, tmp_path)[:2]
    assert run.branch[3] == str(other.folder)


def test_the_criterion_of_a_branch_is_the_one_that_trains(tmp_path):
    text = PLAN.replace("evaluate: [--best]", "trunk: {arm: plain, updates: 7}")
    text = text.replace(
        "[--self-kd-top-k", "[--user-dir, other, --criterion, mine, --self-kd-top-k"
    )
    run = plan.read(prepare(tmp_path, text), tmp_path)[1]
    assert run.branch[-4:] == ["--criterion", "mine", "--user-dir", "other"]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (PLAN.replace("[plain, near]", "[plain, far]"), "the arm is far; allowed: plain, near"),
        (PLAN.replace("task: translate", "task: talk"), "the task is talk; allowed: translate"),
        (PLAN.replace("text: test", "text: train"), "the text is train; allowed: valid, test"),
    ],
)
def test_a_plan_of_what_is_not_declared_is_refused(text, message, tmp_path):
    path = prepare(tmp_path, text)
    with pytest.raises(plan.PlanError, match=message):
        plan.read(path, tmp_path)


def refused(path, monkeypatch):
    """Return why `python -m experiments` has begun nothing."""
    arguments = [
        "experiments",
        "--plan",
        path,
        "--out",
        path.parent,
        "--csv",
        path.parent / "out.csv",
    ]
    monkeypatch.setattr(sys, "argv", list(map(str, arguments)))
    monkeypatch.setattr(Runner, "run", lambda self: pytest.fail("something was begun"))
    with pytest.raises(SystemExit) as stopped:
        run_all()
    return str(stopped.value)


def test_a_plan_whose_data_is_not_there_is_refused_before_any_work(tmp_path, monkeypatch):
    text = PLAN.replace("options: [--lr, 0.5]", "data: small\n    prepare: [--merges, 9]")
    assert refused(prepare(tmp_path, text), monkeypatch) == (
        f"python -m experiments: {tmp_path}/small holds no data; first:  "
        f"{ROOT}/examples/translation/multi30k/prepare.sh --out {tmp_path}/small --merges 9"
    )


def test_the_plan_of_the_project_is_valid(tmp_path):
    runs = plan.read(ROOT / "experiments" / "plan.yaml", tmp_path)
    # Settings are chosen on validation text alone.
    assert {run.experiment for run in runs if run.text == "test"} == {
        *("comparison", "comparison_long", "comparison_wikitext2"),
        *("comparison_modes", "recipe_wikitext2", "low_resource", "comparison_wikitext2_long"),
        *("controls_wikitext2_long", "low_resource_rivals", "low_resource_averaged"),
    }
    # All settings of neighbours, which `past` does not read, so that no run changes with a default.
    neighbours = [run for run in runs if run.criterion == "self_kd" and "past" not in run.train]
    assert all("--self-kd-max-mass" in run.train for run in neighbours)
    words = [word for run in runs for word in (*run.train, *run.branch, *run.evaluate("valid"))]
    assert {type(word) for word in words} == {str}
    assert not [word for word in words if word.startswith("[")]  # a list is no option
    # It must see the first weights.
    assert not any(run.branch for run in runs if "self_kd_frozen" in run.train)


def test_figures_are_those_of_log_and_evaluation(tmp_path):
    run = plan.read(prepare(tmp_path), tmp_path)[1]
    assert not collect.complete(run)
    finish(run)
    assert collect.complete(run)
    rows = collect.rows(run)
    assert {row["measure"]: row["value"] for row in rows} == {
        **{"validation perplexity": 5.25, "updates to it": 240, "updates": 360},
        **{"seconds an update": 1.0},  # the median of 50 / 100 and 300 / 200
        **{"minutes of its own updates": 5.8},
        **{"test2016 BLEU": 36.4, "test2016 length ratio": 0.959, "test2016 chrF2": 60.2},
        **{"test words": 90, "test accuracy": 0.61, "test ECE": 0.025, "test nll": 1.5},
        **{"test confidence": 0.7, "test nll of its own choices": 0.5},
    }
    (bleu,) = [row for row in rows if row["measure"] == "test2016 BLEU"]
    assert bleu["signature"] == "BLEU|nrefs:1|case:lc|version:2.6.0"
    conditions = collect.conditions(run)
    assert (conditions["arm"], conditions["seed"]) == (bleu["arm"], bleu["seed"])
    assert conditions["prepare"] == (
        f"examples/translation/multi30k/prepare.sh --out {tmp_path}/multi30k".replace(
            f"{ROOT}/", ""
        )
    )
    assert conditions["command"].startswith("examples/translation/multi30k/train.sh self_kd --out ")
    assert "fairseq-skd calibration " in conditions["evaluation"]
    assert conditions["torch"] == torch.__version__
    assert "1 of " in conditions["device"]
    lines = "".join(collect.length_penalty_lines({0.6: 35.0, 1.0: 35.5}, 1.0))
    assert collect.length_penalties(EVALUATION + lines) == {0.6: 35.0, 1.0: 35.5}
    assert [(name, value) for name, value, _ in collect.scores(lines)] == [
        *(("length penalty 0.6, valid BLEU", 35.0), ("length penalty 1.0, valid BLEU", 35.5)),
        ("length penalty", 1.0),
    ]
    assert list(collect.length_penalty_lines({}, None)) == []
    line = "valid: perplexity 120.50 a word (6.91 bits), each word with at least 96 words before it"
    assert list(collect.scores(line)) == [("valid perplexity", 120.5, "context:96")]


def test_conditions_are_those_of_the_beginning(tmp_path):
    run = plan.read(prepare(tmp_path), tmp_path)[0]
    finish(run)
    noted = json.loads((run.folder / "conditions.json").read_text())
    (run.folder / "conditions.json").write_text(json.dumps({**noted, "torch": "older"}))
    collect.began(run, threads=2)
    assert collect.conditions(run)["torch"] == "older"


def test_interruptions_are_noted(tmp_path):
    text = PLAN.replace("evaluate: [--best]", "trunk: {arm: plain, updates: 200}")
    runs = plan.read(prepare(tmp_path, text.replace("update, 7", "update, 200")), tmp_path)[:2]
    for run in runs:
        finish(run)
        assert collect.conditions(run)["resumed"] == "never"
        with (run.folder / "train.log").open("a") as log:
            for updates in (200, 250, 375):
                log.write(LOADED.format(path=run.folder / "checkpoint_last.pt", n=updates))
    # A branch begins with the checkpoint of its trunk: that is no interruption.
    assert [collect.conditions(run)["resumed"] for run in runs] == ["200 250 375", "250 375"]


def test_a_run_that_was_declared_otherwise_is_not_taken_for_complete(tmp_path):
    path = prepare(tmp_path)
    finish(plan.read(path, tmp_path)[0])
    path.write_text(PLAN.replace("--lr, 0.5", "--lr, 0.25"))
    message = "translate-plain-seed1 holds another run than is declared(.|\\n)*--lr 0.25"
    with pytest.raises(plan.PlanError, match=message):
        collect.complete(plan.read(path, tmp_path)[0])


def test_what_was_scored_otherwise_is_scored_again(tmp_path):
    path = prepare(tmp_path)
    finish(plan.read(path, tmp_path)[0])
    path.write_text(PLAN.replace("evaluate: [--best]", "evaluate: []"))
    assert not collect.complete(plan.read(path, tmp_path)[0])
    path.write_text(PLAN.replace("text: test,", "text: test, length_penalties: [0.6],"))
    assert not collect.complete(plan.read(path, tmp_path)[0])


def test_a_branch_is_timed_from_where_it_began(tmp_path):
    text = PLAN.replace("evaluate: [--best]", "trunk: {arm: plain, updates: 200}")
    text = text.replace("start-update, 7", "start-update, 200")
    trunk, run = plan.read(prepare(tmp_path, text), tmp_path)[:2]
    finish(trunk)
    finish(run)
    log = [INNER.format(n=300, wall=300), VALID.format(loss=3.5, ppl=5.25, n=300)]
    (run.folder / "train.log").write_text("\n".join(log))
    seconds = [
        {row["measure"]: row["value"] for row in collect.rows(one)}["seconds an update"]
        for one in (trunk, run)
    ]
    assert seconds == [1, 3]  # 300 s for the updates 201 to 300
    assert compare.updates_to(run, 9.5) == 120  # the trunk's
    assert compare.updates_to(run, 5.3) == 180
    trunk_log = trunk.folder / "train.log"
    trunk_log.write_text(trunk_log.read_text().replace("num_updates 180", "num_updates 220"))
    assert compare.updates_to(run, 5.3) == 300
    assert compare.updates_to(run, 5.2) is None
    trunk_log.unlink()
    assert compare.updates_to(run, 5.3) is None


def test_rows_of_runs_that_are_elsewhere_stay(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)
    for run in runs:
        finish(run)
    path = tmp_path / "out.csv"
    collect.write([row for run in runs[:2] for row in collect.rows(run)], path)
    collect.write([row for run in runs[1:3] for row in collect.rows(run)], path)
    found = collect.read(path)
    assert len(found) == 3 * FIGURES
    assert {(row["arm"], row["seed"]) for row in found} == {
        *(("plain", "1"), ("near", "1"), ("plain", "2")),
    }


def test_fairseqs_r_drop_logs_the_square_of_the_perplexity(tmp_path):
    criterion = "label_smoothed_cross_entropy_with_rdrop"
    text = PLAN.replace("criterion: label_smoothed_cross_entropy", f"criterion: {criterion}")
    run = plan.read(prepare(tmp_path, text), tmp_path)[0]
    finish(run)
    assert collect.curve(run) == [(120, pytest.approx(9.5**0.5)), *collect.curve(run)[1:]]
    assert {
        row["value"] for row in collect.rows(run) if row["measure"] == "validation perplexity"
    } == {2.29}


def results(tmp_path, *options):
    return subprocess.run(
        [
            *(sys.executable, "-m", "experiments", "--plan", tmp_path / "plan.yaml"),
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
    assert len(collect.read(tmp_path / "out.csv")) == 3 * FIGURES
    # When each has come to the baseline's best, and two differences of near's first seed.
    assert len(collect.read(tmp_path / "out-compared.csv")) == 3 + 2
    assert [(row["arm"], row["seed"]) for row in collect.read(tmp_path / "out-runs.csv")] == [
        *(("plain", "1"), ("near", "1"), ("plain", "2")),
    ]
    assert "Training with self_kd" in (runs[3].folder / "train.out").read_text()
    shutil.rmtree(runs[3].folder)
    finish(runs[3])
    done = results(tmp_path)
    assert done.returncode == 0, done.stdout
    assert "4 of 4 runs are complete" in done.stdout


def test_a_run_that_was_declared_otherwise_is_refused_before_any_work(tmp_path, monkeypatch):
    path = prepare(tmp_path)
    finish(plan.read(path, tmp_path)[3])
    path.write_text(PLAN.replace("--lr, 0.5", "--lr, 0.25"))
    message = "translate-near-seed2 holds another run than is declared"
    assert message in refused(path, monkeypatch)


def test_what_an_arm_needs_is_waited_for(tmp_path, monkeypatch):
    path = prepare(tmp_path, PLAN.replace("near: {", "near: {after: plain, "))
    plain, near = plan.read(path, tmp_path)[:2]
    plain.folder.mkdir(parents=True)
    begun = []

    def sleep(_):
        begun.append((near.folder / "train.out").exists())
        (plain.folder / "done").touch()

    monkeypatch.setattr("experiments.__main__.time.sleep", sleep)
    assert "train.sh self_kd" in Runner([near], jobs=1).run()  # its data is an empty folder
    assert begun == [False]


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["ctrl-c", "kill"])
def test_an_interruption_stops_what_runs(number, tmp_path):
    prepare(tmp_path)
    arguments = ["--plan", tmp_path / "plan.yaml", "--out", tmp_path, "--csv", tmp_path / "out.csv"]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments", *map(str, arguments)],
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


def test_an_interruption_of_the_comparison_is_told_too(tmp_path, monkeypatch):
    path = prepare(tmp_path)
    for run in plan.read(path, tmp_path):
        finish(run)

    def interrupted(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr(compare, "rows", interrupted)
    monkeypatch.setattr(signal, "signal", lambda *_: None)  # those of the tests stay
    places = ("--out", str(tmp_path), "--csv", str(tmp_path / "out.csv"))
    monkeypatch.setattr(sys, "argv", ["experiments", "--plan", str(path), *places])
    with pytest.raises(SystemExit, match="Interrupted"):
        run_all()
    assert len(collect.read(tmp_path / "out.csv")) == 4 * FIGURES  # what was found by then stays


def test_what_a_killed_program_leaves_behind_keeps_its_folder(tmp_path):
    path = prepare(tmp_path, PLAN.replace(', "{root}/{out}", "{task}{seed}"', ""))
    runs = plan.read(path, tmp_path)[:2]
    arguments = ["--plan", tmp_path / "plan.yaml", "--out", tmp_path, "--csv", tmp_path / "out.csv"]
    with subprocess.Popen(
        [sys.executable, "-m", "experiments", "--jobs", "2", *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.DEVNULL,
    ) as process:
        outputs = [run.folder / "train.out" for run in runs]
        while not all(out.exists() and "Training with" in out.read_text() for out in outputs):
            assert process.poll() is None
            time.sleep(0.1)
        process.kill()
    try:
        for run in runs:
            with (run.folder / "lock").open("w") as file, pytest.raises(BlockingIOError):
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    finally:
        subprocess.run(["pkill", "-KILL", "-f", str(tmp_path)])


PAGE = """# Results
<!-- tables of first -->
old
<!-- end of first -->
What it says.
<!-- tables of other -->
not of this plan
<!-- end of other -->
"""


def test_the_report_compares_seed_by_seed_with_the_first_arm(tmp_path, monkeypatch, capsys):
    path = prepare(tmp_path)
    reference = [
        f"{'abc'[i % 3]} man number {i} walks past {i % 7} red houses ." for i in range(60)
    ]
    for run in plan.read(path, tmp_path):
        finish(run)
        # `near` is right everywhere with seed 1, and just as wrong as `plain` with seed 2.
        right = run.arm == "near" and run.seed == 1
        lines = reference if right else [line.replace("red", "green") for line in reference]
        for name, written in (("test2016.ref", reference), ("test2016.txt", lines)):
            (run.folder / name).write_text("\n".join(written) + "\n")
        if right:
            text = run.evaluation.read_text().replace(" = 36.4 ", " = 42.5 ")
            run.evaluation.write_text(text + "length penalty: 1.4\n")
        else:
            run.evaluation.write_text(run.evaluation.read_text() + "length penalty: 1.0\n")
    assert results(tmp_path).returncode == 0
    for run in plan.read(path, tmp_path):
        shutil.rmtree(run.folder)  # not needed any more
    (tmp_path / "out.md").write_text(PAGE)
    monkeypatch.setattr(
        sys, "argv", ["report", "--plan", str(path), "--csv", str(tmp_path / "out.csv")]
    )
    tables.main()
    printed = capsys.readouterr().out
    assert printed.startswith("## first: translate\n\ntraining\n\n| arm | seeds | validation")
    page = (tmp_path / "out.md").read_text()
    made = printed.split("\n\n", 1)[1]
    assert page == PAGE.replace("old\n", f"\n{made}")
    assert (
        "| seconds an update | minutes of its own updates | updates to the baseline's best |"
        in printed
    )
    assert "| plain | 2 | 5.25 ± 0 | 240 ± 0 | 360 ± 0 | 1 ± 0 | 5.8 ± 0 | 180 ± 0 |" in printed
    assert "| near | 2 | 39.45 ± 4.3 | 0.959 ± 0 | 60.2 ± 0 |" in printed
    assert "| near | 2 | 1.4, 1 |" in printed
    assert "test\n\n| arm | seeds | words | accuracy | confidence | ECE |" in printed
    lines = printed[printed.index("test2016, difference to plain (p)") :].splitlines()
    assert lines[2] == "| arm | BLEU, seed 1 | chrF2, seed 1 | BLEU, seed 2 | chrF2, seed 2 |"
    arm, bleu, chrf, *same = lines[4].strip("| ").split(" | ")
    assert arm == "near"
    assert float(bleu.split()[0]) > 5
    assert float(chrf.split()[0]) > 5
    assert bleu.endswith("(p = 0.001)")
    assert all(cell.startswith("+0.0 (p = ") for cell in same)
    signatures = {row["signature"] for row in collect.read(tmp_path / "out-compared.csv")}
    assert any(s.startswith("BLEU|nrefs:1|bs:1000|seed:12345|case:lc|") for s in signatures)
    for name in ("out-first.svg", "out-first-curves.svg"):
        drawn = (tmp_path / name).read_text()
        assert ">near<" in drawn
        assert ">plain<" in drawn
    assert ">test2016 BLEU<" in (tmp_path / "out-first.svg").read_text()


def test_only_what_a_run_has_scored_is_compared(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)[:2]
    for run in runs:
        finish(run)
        (run.folder / "valid.ref").write_text("of another experiment\n")
        (run.folder / "valid.txt").write_text("of another experiment\n")
    measures = {row["measure"] for row in compare.rows(runs, runs)}
    assert measures == {compare.REACHED, "test2016 BLEU", "test2016 chrF2"}
    assert list(compare.rows(runs[1:], runs)) == []  # without the baseline


def test_what_never_reaches_the_baseline_has_no_updates_to_it(tmp_path):
    runs = plan.read(prepare(tmp_path), tmp_path)[:2]
    for run in runs:
        finish(run)
        run.evaluation.write_text("perplexities\n")
    log = runs[1].folder / "train.log"
    log.write_text(log.read_text().replace("ppl 5.25", "ppl 5.35"))
    (row,) = compare.rows(runs, runs)
    assert (row["arm"], row["measure"], row["value"]) == ("plain", compare.REACHED, 180)


def test_an_arm_that_lacks_figures_is_not_left_out(tmp_path):
    row = {"experiment": "e", "task": "t", "arm": "a", "seed": "2", "signature": ""}
    rows = [
        {**row, "seed": "1", "measure": "valid BLEU", "value": "30"},
        {**row, "measure": "valid BLEU", "value": "30"},
        {**row, "measure": "valid chrF2", "value": "50"},
        {**row, "arm": "b", "measure": "valid BLEU", "value": "31"},
    ]
    row = {**row, "arm": "b", "baseline": "a", "measure": "valid BLEU", "value": "1"}
    compared = [
        {**row, "p": "0.5"},
        {**row, "arm": "c", "seed": "1", "value": "-1.26", "p": ""},
        {**row, "arm": "c", "measure": "valid chrF2", "p": "0.25"},
    ]
    order = [("e", "b"), ("e", "a")]
    scores, differences = tables.tables(tables.sort(rows, order), compared)
    assert scores.splitlines()[2:] == [
        *("| arm | seeds | BLEU | chrF2 |", "|---|---|---|---|"),
        *("| b | 1 | 31 |  |", "| a | 2 | 30 ± 0 | 50 (1 of 2) |"),
    ]
    assert differences.splitlines()[2:] == [
        "| arm | BLEU, seed 1 | chrF2, seed 1 | BLEU, seed 2 | chrF2, seed 2 |",
        *("|---|---|---|---|---|", "| b |  |  | +1.0 (p = 0.500) |  |"),
        "| c | -1.3 |  |  | +1.0 (p = 0.250) |",
    ]


def test_what_all_seeds_have_in_common_is_the_last_table():
    figures = {
        ("a", "1"): {"test2016 BLEU": 30, "coco BLEU": 20, "test perplexity": 80},
        ("a", "2"): {"test2016 BLEU": 31, "coco BLEU": 21, "test perplexity": 50},
        ("b", "1"): {"test2016 BLEU": 32, "coco BLEU": 21, "test perplexity": 76},
        ("b", "2"): {"test2016 BLEU": 31, "coco BLEU": 20, "test perplexity": 51},
        ("c", "2"): {"test2016 BLEU": 31, "test perplexity": 49},
    }
    others = {"validation perplexity": 9, "length penalty 1.0, valid BLEU": 30, "coco nll": 2}
    rows = [
        {"arm": arm, "seed": seed, "measure": measure, "value": str(value)}
        for (arm, seed), found in figures.items()
        for measure, value in {**found, **others}.items()
    ]
    *_, last = tables.tables(rows, [])
    assert last.splitlines() == [
        *("difference to a, seed by seed", ""),
        "| arm | BLEU, seed 1 | BLEU, seed 2 | BLEU, mean | test perplexity, %, seed 1 | "
        "test perplexity, %, seed 2 | test perplexity, %, mean |",
        "|---|---|---|---|---|---|---|",
        "| b | +1.50 | -0.50 | +0.50 ± 1.41 | -5.00 | +2.00 | -1.50 ± 4.95 |",
        "| c |  |  |  |  | -2.00 | -2.00 |",
    ]
    of_one_seed = [row for row in rows if row["seed"] == "2"]
    assert not any("seed by seed" in made for made in tables.tables(of_one_seed, []))


def test_a_report_of_nothing_is_refused(tmp_path, monkeypatch):
    path = prepare(tmp_path)
    arguments = ["report", "--plan", str(path), "--csv", str(tmp_path / "none.csv")]
    monkeypatch.setattr(sys, "argv", arguments)
    with pytest.raises(SystemExit, match=r"no .*none\.csv; first: python -m experiments"):
        tables.main()
