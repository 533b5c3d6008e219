"""The controls differ from the criterion in one thing; the plan is run; figures are read."""

import importlib
import json
import math
import os
import re
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from omegaconf import OmegaConf

from experiments import figures
from experiments import plan as plans
from fairseq_skd import SoftTarget, write_stored_targets
from fairseq_skd.compatibility import ordinary_words, text_layout
from fairseq_skd.criterion import SelfKDCriterion
from tests.conftest import ROOT, TINY, TINY_LM
from tests.test_criterion import LANGUAGE_MODELS, NOW

SETTINGS = ["--label-smoothing", 0.1, "--self-kd-top-k", 4, *NOW, "--self-kd-weight", 0.3]
MODELS = [
    (["--arch", "transformer", *TINY], False),
    (["--arch", "transformer_lm", *TINY_LM], True),
    (LANGUAGE_MODELS["lstm_lm"], True),  # whose loss begins with logits
]


@pytest.fixture(scope="module", autouse=True)
def registered():
    importlib.import_module("experiments.self_kd_controls")


@pytest.fixture
def taught(build, train_step, monkeypatch):
    """Train with a control; return what it was taught in every step, and the nearest words."""

    def run(model, lm, name, steps=1):
        given = []

        def seen(original):
            def compute(self, *arguments):
                given.append(arguments[-1])
                return original(self, *arguments)

            return compute

        built = build(*model, *SETTINGS, "--criterion", name, lm=lm)
        for loss in ("_linear_loss", "_loss"):
            monkeypatch.setattr(SelfKDCriterion, loss, seen(getattr(SelfKDCriterion, loss)))
        torch.manual_seed(1)
        for _ in range(steps):
            train_step(built, built.samples[0])
        (own,) = built.criterion.source.taught.values()
        target = built.samples[0]["target"].flatten()
        return built, given, own.teacher.soft_target(target), target

    return run


def test_random_words_get_the_masses_of_the_nearest(taught):
    built, (soft, again), near, target = taught(*MODELS[0], "self_kd_random", 2)
    assert (soft.ids == again.ids).all()
    assert soft.weights.equal(near.weights)
    assert (soft.ids[:, 0] == target).all()
    assert (soft.ids[:, 1:] != target[:, None]).all()
    eligible = torch.from_numpy(ordinary_words(built.task.target_dictionary))
    assert torch.isin(soft.ids[:, 1:], eligible).all()
    assert (soft.ids[:, 1:] == near.ids[:, 1:]).float().mean() < 0.5


@pytest.mark.parametrize(("model", "lm"), MODELS)
def test_words_by_their_counts(taught, model, lm):
    """As often as they stand in the text, or follow the word before; the mass is the nearest's."""
    for name in ("self_kd_unigram", "self_kd_bigram"):
        built, given, near, target = taught(model, lm, name, 60)
        dictionary = built.task.target_dictionary
        text, pairs = built.task.dataset("train"), Counter()
        words = set(ordinary_words(dictionary).tolist())
        for index in range(len(text)):
            after = text[index]["target"].tolist()
            before = text[index]["source"].tolist() if lm else [dictionary.eos(), *after[:-1]]
            if name == "self_kd_unigram":
                pairs.update((0, word) for word in after if word in words)
            else:
                pairs.update(zip(before, after))
        inputs = built.samples[0]["net_input"]
        before = inputs["src_tokens" if lm else "prev_output_tokens"].flatten()
        drawn = Counter()
        for soft in given:
            assert (soft.ids[:, 0] == target).all()
            masses = near.weights[:, 1:].sum(1, keepdim=True)
            torch.testing.assert_close(soft.weights[:, 1:], (masses / 4).expand(-1, 4))
            for place in (target != dictionary.pad()).nonzero().flatten().tolist():
                first = before[place].item() if name == "self_kd_bigram" else 0
                drawn.update((first, word) for word in soft.ids[place, 1:].tolist())
        total, draws = Counter(), Counter()
        for counted, sums in ((pairs, total), (drawn, draws)):
            for (first, _), count in counted.items():
                sums[first] += count
        for pair, count in drawn.items():
            expected, of_first = pairs[pair] / total[pair[0]], draws[pair[0]]
            assert expected > 0
            # Binomial: five standard deviations of a share, and one draw.
            bound = 5 * math.sqrt(expected * (1 - expected) / of_first) + 1 / of_first
            assert abs(count / of_first - expected) <= bound


@pytest.fixture
def told(build, train_step, tmp_path, monkeypatch):
    """Return the first batch's targets, and what a control makes of two words everywhere."""

    def run(name):
        model = ["--arch", "transformer", *TINY]
        layout = text_layout(build(*model, *SETTINGS, "--criterion", "self_kd").task)
        row = torch.tensor([0.4, 0.2]), torch.tensor([5, 6])
        words = [(row[1].expand(n, 2), row[0].expand(n, 2)) for n in layout.lengths.tolist()]
        write_stored_targets(tmp_path / "t", words)
        stored = ["--self-kd-candidates", "stored", "--self-kd-teacher", tmp_path / "t"]
        built = build(*model, *SETTINGS, "--criterion", name, *stored)
        given = []
        monkeypatch.setattr(
            SelfKDCriterion, "_linear_loss", lambda *a: given.append(a[-1]) or 1 / 0
        )
        with pytest.raises(ZeroDivisionError):
            train_step(built, built.samples[0])
        assert isinstance(given[0], SoftTarget)
        return built.samples[0]["target"].flatten(), given[0]

    return run


def test_scaled_words_leave_nothing_to_others(told):
    _, soft = told("self_kd_scaled")
    torch.testing.assert_close(soft.weights[0], torch.tensor([2 / 3, 1 / 3]), rtol=1e-3, atol=0)


def test_a_teacher_is_trusted_as_far_as_it_is_right(told):
    target, soft = told("self_kd_trusted")
    right = torch.zeros(len(target))
    right[target == 5], right[target == 6] = 0.4, 0.2
    assert 0 < right.count_nonzero() < len(target)
    torch.testing.assert_close(soft.share, right, rtol=1e-3, atol=0)


PLAN = {
    "tasks": {
        "toy": {"recipe": "translation/multi30k", "data": "toy", "options": [["--x", 1], "--y"]},
        "translated": {
            "recipe": "translation/multi30k",
            "data": "other",
            "translated_by": {"task": "toy", "arm": "label_smoothing", "seeds": [2]},
        },
    },
    "arms": {
        "label_smoothing": {"criterion": "label_smoothed_cross_entropy"},
        "taught": {
            "criterion": "self_kd",
            "options": ["--seed-is", "{seed}", "--self-kd-candidates", "stored"],
            "teachers": {"task": "toy", "arm": "label_smoothing", "seeds": [1, 2]},
        },
        "third": {
            "criterion": "self_kd",
            "teachers": {"task": "toy", "arm": "taught", "seeds": [1]},
        },
        "itself": {
            "criterion": "self_kd",
            "teachers": {
                "task": "toy",
                "arm": "label_smoothing",
                "seeds": ["own"],
                "teach": ["--top-k", 50],
            },
        },
    },
    "experiments": [
        {"name": "first", "task": "toy", "seeds": [1, 2], "arms": ["label_smoothing", "taught"]},
        {"name": "last", "task": "toy", "seeds": [2], "arms": ["third"]},
        {"name": "sequence", "task": "translated", "seeds": [1], "arms": ["taught"]},
        {"name": "itself", "task": "toy", "seeds": [2], "arms": ["itself"]},
    ],
}
SCRIPT = """#!/bin/bash
set -eu
echo "$(basename "$0") $*" >> "$CALLS"
while [ $# -gt 0 ]; do
    case $1 in --out) out=$2 ;; --name) name=$2 ;; esac
    shift
done
if [ "$(basename "$0")" = train.sh ]; then
    valid='{"epoch": 1, "valid_loss": "4", "valid_ppl": "9.5", "valid_num_updates": "7"}'
    echo "x | INFO | valid | $valid" > "$out/$name/train.log"
    [ -z "${FAILS:-}" ] || { echo "out of coffee" >&2; exit 3; }
else
    echo "one, detokenised text (the figure to quote):"
    echo "  BLEU|nrefs:1 = 30.25 62.3/36.1/23.4/15.4 (BP = 1.000 ratio = 1.000 hyp_len = 1)"
    echo "chrF2|nrefs:1 = 52.5"
    echo "one, tokenised text:"
    echo "BLEU|nrefs:1 = 99.9 (BP = 1.000 ratio = 1.000 hyp_len = 1)"
    echo "test: perplexity 12.5 a word, with at least 64 words before it"
fi
"""


@pytest.fixture
def toy(tmp_path, monkeypatch):
    """A plan whose recipe is a stand-in; returns what runs it, and the calls of its scripts."""
    recipe = tmp_path / "recipe"
    recipe.mkdir()
    for name in ("train.sh", "evaluate.sh"):
        (recipe / name).write_text(SCRIPT)
        (recipe / name).chmod(0o755)
    OmegaConf.save(PLAN, tmp_path / "plan.yaml")
    (tmp_path / "toy" / "data").mkdir(parents=True)
    calls = tmp_path / "calls"
    program = (
        "import os, sys, time\nfrom pathlib import Path\n"
        "from experiments import plan, __main__ as program\n"
        f"read, recipe = plan.read, Path({str(recipe)!r})\n"
        "def stand_in(run):\n"
        "    made = [\n"
        "        replace(m, runs=list(map(stand_in, m.runs)), command=[*command, *m.command])\n"
        "        for m in run.made\n"
        "    ]\n"
        "    return replace(run, recipe=recipe, made=made)\n"
        "from dataclasses import replace\n"
        "program.read = lambda *a: [stand_in(run) for run in read(*a)]\n"
        f"command = ['bash', '-c', 'echo $(basename $1) \"${{@:2}}\" >> {calls}', 'made']\n"
        "if os.environ.get('FAILS'):  # hear of a failure long after it\n"
        "    futures = program.concurrent.futures\n"
        "    as_completed = futures.as_completed\n"
        "    futures.as_completed = lambda all: as_completed(time.sleep(1) or all)\n"
        "program.main()\n"
    )

    def run(*options, status=0, **environment):
        arguments = ["--plan", "plan.yaml", "--out", ".", "--csv", "out.csv", *options]
        done = subprocess.run(
            [sys.executable, "-c", program, *arguments],
            cwd=tmp_path,
            env={**os.environ, "CALLS": str(calls), "PYTHONPATH": str(ROOT), **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        assert done.returncode == status, done.stdout
        return done.stdout, calls.read_text().splitlines() if calls.exists() else []

    return run


def test_a_plan_is_run_teachers_first_and_its_figures_are_collected(toy, tmp_path):
    printed, calls = toy("--jobs", "2", "--only", "first", "last")
    assert "5 of 5 runs are complete" in printed
    first, last = (
        next(i for i, call in enumerate(calls) if call.endswith(f"/toy/{file}"))
        for file in ("toy-label_smoothing-seeds1+2.skd", "toy-taught-seeds1.skd")
    )
    data = tmp_path / "toy"
    paths = ":".join(f"{data}/toy-label_smoothing-seed{n}/checkpoint_best.pt" for n in (1, 2))
    assert calls[first].startswith(f"fairseq-skd teach {data}/data --path {paths} --output")
    arms = "label_smoothing", "taught", "third"
    trained = {
        arm: [
            i for i, call in enumerate(calls) if "train.sh" in call and f"--name toy-{arm}-" in call
        ]
        for arm in arms
    }
    assert max(trained["label_smoothing"][:2]) < first < min(trained["taught"])
    assert trained["taught"][0] < last < trained["third"][0]
    assert sum("evaluate.sh" in call for call in calls) == 5
    assert "--x 1 --y --seed-is 2 --self-kd-candidates stored --self-kd-teacher" in "".join(calls)
    found = figures.read(tmp_path / "out.csv")
    assert [(row["measure"], row["value"]) for row in found[:4]] == [
        ("validation perplexity", "9.5"),
        ("one BLEU", "30.25"),
        ("one chrF2", "52.5"),
        ("test perplexity", "12.5"),
    ]
    before = (tmp_path / "out.csv").read_text()
    _, again = toy("--only", "first", "last")  # train.sh and teach know that nothing is to do
    assert sum("evaluate.sh" in call for call in again) == 5
    assert (tmp_path / "out.csv").read_text() == before


def test_teachers_of_teachers_come_first(toy):
    printed, calls = toy("--only", "last")
    assert "1 of 1 runs are complete" in printed
    assert in_short(calls) == [
        "toy-label_smoothing-seed1",
        "toy-label_smoothing-seed2",
        "toy-label_smoothing-seeds1+2.skd",
        "toy-taught-seed1",
        "toy-taught-seeds1.skd",
        "toy-third-seed2",  # trained, then scored
        "toy-third-seed2",
    ]


def test_a_student_of_its_own_seed_and_other_options_of_the_teacher(toy, tmp_path):
    _, calls = toy("--only", "itself")
    data = tmp_path / "toy"
    assert calls[1] == (
        f"fairseq-skd teach {data}/data --path {data}/toy-label_smoothing-seed2/checkpoint_best.pt "
        f"--output {data}/toy-label_smoothing-seeds2-top-k50.skd --top-k 50"
    )
    assert f"--self-kd-teacher {data}/toy-label_smoothing-seeds2-top-k50.skd" in calls[2]


def test_a_text_is_translated_before_it_is_taught(toy, tmp_path):
    """Its teachers are trained on the text as it was, and teach on the new one."""
    printed, calls = toy("--only", "sequence")
    assert "1 of 1 runs are complete" in printed
    assert in_short(calls) == [
        "toy-label_smoothing-seed2",
        "other",
        "toy-label_smoothing-seed1",
        "toy-label_smoothing-seed2",  # train.sh knows that there is nothing to do
        "toy-label_smoothing-seeds1+2.skd",
        "translated-taught-seed1",
        "translated-taught-seed1",
    ]
    old, new = tmp_path / "toy", tmp_path / "other"
    translate = f"translate.sh multi30k toy-label_smoothing-seed2 --out {old} --into {new}"
    assert calls[1] == translate
    assert calls[4].startswith(f"fairseq-skd teach {new}/data --path {old}/toy-label")
    assert calls[5].endswith(f"--self-kd-teacher {new}/{in_short(calls)[4]}")
    (old / "data").rmdir()
    assert "/toy/data is missing; first:" in toy("--only", "sequence", status=1)[0]


def in_short(calls):
    """Return the run of each call, or what is made."""
    names = (re.sub(r".*--name (\S+) .*", r"\1", call) for call in calls)
    return [re.sub(r".*--(output|into) \S+/", "", name) for name in names]


def test_a_failure_is_shown_and_ends_all(toy):
    printed, calls = toy(status=1, FAILS="yes")
    assert "out of coffee" in printed
    assert len(calls) == 1


def test_what_is_not_declared_or_prepared_is_refused(toy, tmp_path):
    (tmp_path / "toy" / "data").rmdir()
    printed, calls = toy(status=1)
    assert "toy/data is missing; first:" in printed
    assert calls == []
    printed, _ = toy("--only", "second", status=2)
    assert "--only is second; allowed: first" in printed
    other = json.loads(json.dumps(PLAN))
    other["experiments"][0]["arms"] = ["absent"]
    OmegaConf.save(other, tmp_path / "plan.yaml")
    printed, _ = toy(status=1)
    assert "the arm is absent; allowed: label_smoothing, taught" in printed
    other = json.loads(json.dumps(PLAN))
    other["tasks"]["strange"] = {**other["tasks"]["toy"], "data": "strange"}
    other["experiments"][1]["task"] = "strange"
    OmegaConf.save(other, tmp_path / "plan.yaml")
    printed, _ = toy(status=1)
    assert "the teachers of third have other data than strange" in printed
    other = json.loads(json.dumps(PLAN))
    other["experiments"][2]["name"] = "first"
    OmegaConf.save(other, tmp_path / "plan.yaml")
    printed, _ = toy(status=1)
    assert "the experiment first has an arm taught of toy and one of translated" in printed


def test_the_plan_of_the_project_is_valid():
    runs = plans.read(ROOT / "experiments" / "plan.yaml", Path("/nowhere"))
    for run in runs:
        assert (run.recipe / "train.sh").exists()
        assert "{" not in " ".join(run.train)
        for made in run.made:
            assert Path(made.command[0]).exists()
            assert str(made.path if made.path.suffix else made.path.parent) in made.command
    programs = {Path(made.command[0]).name for run in runs for made in run.made}
    assert programs == {"fairseq-skd", "translate.sh"}
    declared = {(run.experiment, run.arm) for run in runs}
    for line in figures.LINES:
        for arm in (line.arm, line.baseline):
            assert line.experiment.startswith("quickstart_") or (line.experiment, arm) in declared


def test_the_table_of_the_page_is_that_of_its_csv():
    page = figures.PAGE.read_text(encoding="utf-8")
    assert figures.placed(page, figures.table(figures.read(figures.CSV))) == page


def test_differences_are_paired_by_seed():
    line = figures.Line("task", "page#part", "ours", "e", "b", "a")

    def row(arm, seed, measure, value):
        return {"experiment": "e", "arm": arm, "seed": seed, "measure": measure, "value": value}

    ppl, bleu = "validation perplexity", "one BLEU"
    rows = [row("a", "1", ppl, "10"), row("b", "1", ppl, "9")]
    rows += [row("a", "2", ppl, "20"), row("b", "2", ppl, "16")]
    rows += [row("a", "3", ppl, "5")]  # b is not there yet
    rows += [row("a", "1", bleu, "20"), row("a", "1", "two BLEU", "30")]
    rows += [row("b", "1", bleu, "21"), row("b", "1", "two BLEU", "32")]
    assert figures.paired(rows, line, "perplexity") == pytest.approx([-10, -20])
    assert figures.paired(rows, line, "BLEU") == pytest.approx([1.5])
    expected = "| [task](results/page.md#part) | ours | 2 | -15.0 % (-78.5 to +48.5) | +1.50 |  |"
    assert expected in figures.table(rows, [line])
