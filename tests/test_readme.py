"""What the README says is so."""

import inspect
import re
import shutil
import sys

import pytest
import torch

from benchmarks import report
from experiments.figures import collect, summary, tables
from fairseq_skd.criterion import SelfKDCriterionConfig
from fairseq_skd.options import SelfKDOptions
from fairseq_skd.soft_targets import SelfTeacher
from tests.conftest import ROOT

README = (ROOT / "README.md").read_text(encoding="utf-8")
PERFORMANCE = (ROOT / "docs" / "performance.md").read_text(encoding="utf-8")


def test_the_example_without_fairseq_runs():
    page = (ROOT / "docs" / "sparse-targets.md").read_text(encoding="utf-8")
    code = re.findall(r"```python\n(.*?)```", page, re.DOTALL)[0]
    torch.manual_seed(0)
    scope = {}
    exec(code, scope)
    assert scope["alpha"] == 0.5
    assert scope["soft_target"].ids.shape == (32, 11)
    assert scope["embedding"].grad.abs().sum() > 0


def test_the_table_of_options_has_every_option_and_its_default():
    table = dict(re.findall(r"^\| `(--self-kd-[a-z-]+)` \| `?([^|`]+?)`? \|", README, re.MULTILINE))
    expected = {
        f"--self-kd-{name.replace('_', '-')}": "auto" if value is None else str(value)
        for name, value in vars(SelfKDOptions()).items()
    }
    expected["--self-kd-candidates"] = "auto"  # which means the neighbors
    expected["--self-kd-teacher"] = "none"
    assert table == expected
    assert SelfKDOptions().signature() in README


def test_the_teacher_has_the_same_defaults():
    teacher = inspect.signature(SelfTeacher).parameters
    # The past is no SelfTeacher.
    shared = [n for n in vars(SelfKDOptions()) if n in teacher and n != "candidates"]
    assert {name: teacher[name].default for name in shared} == {
        name: getattr(SelfKDOptions, name) for name in shared
    }
    assert set(teacher) - set(shared) == {"eligible", "candidates"}


def test_the_criterion_has_the_same_options():
    config = SelfKDCriterionConfig()
    for name, value in vars(SelfKDOptions()).items():
        configured = getattr(config, f"self_kd_{name}")
        automatic = value is None or name == "candidates"
        missing = "None" if name == "teacher" else "auto"
        assert str(configured) == (missing if automatic else str(value))


def test_the_benchmark_tables_are_those_of_the_measurement():
    rows = report.read()
    assert report.table(rows) in PERFORMANCE
    assert f"{rows[0]['device']}, {rows[0]['dtype']}" in PERFORMANCE
    for row in rows:
        if row["p20"]:  # times, not memory
            assert float(row["p20"]) <= float(row["median"]) <= float(row["p80"])


@pytest.mark.parametrize("name", ["results", "low-resource"])
def test_the_pages_of_results_have_the_tables_and_the_plots_of_their_csv(
    name, tmp_path, monkeypatch
):
    docs = ROOT / "docs" / "results"
    for path in docs.glob(f"{name}*.csv"):
        shutil.copy(path, tmp_path)
    experiments = {row["experiment"] for row in collect.read(docs / f"{name}.csv")}
    inside = re.compile(r"(<!-- tables of \w+ -->\n).*?(<!-- end)", re.DOTALL)
    pages = {e: (docs / f"{e}.md").read_text(encoding="utf-8") for e in experiments}
    for experiment, page in pages.items():
        emptied = inside.sub(r"\1\2", page)
        (tmp_path / f"{experiment}.md").write_text(emptied, encoding="utf-8")
    monkeypatch.setattr(sys, "argv", ["tables", "--csv", str(tmp_path / f"{name}.csv")])
    tables.main()
    for experiment, page in pages.items():
        assert (tmp_path / f"{experiment}.md").read_text(encoding="utf-8") == page
        assert "| label_smoothing |" in page or "| weight=0 |" in page
    plots = sorted(path.name for path in tmp_path.glob("*.svg"))
    assert plots == sorted(path.name for path in docs.glob(f"{name}-*.svg"))
    for plot in plots:
        drawn, shown = (
            re.findall(">([^<]+)</text>", (folder / plot).read_text(encoding="utf-8"))
            for folder in (tmp_path, docs)
        )
        assert drawn == shown
        assert any(f"]({plot})" in page for page in pages.values())


def test_the_summary_of_results_is_that_of_their_csv(tmp_path):
    found = {
        name: collect.read(summary.RESULTS / f"{name}.csv")
        for name in {line.csv for line in summary.LINES}
    }
    page = (ROOT / "docs" / "results.md").read_text(encoding="utf-8")
    assert f"\n{summary.summary(found)}<!-- end of summary -->" in page
    summary.draw(found, tmp_path / "summary.svg")
    drawn, shown = (
        re.findall(">([^<]+)</text>", (folder / "summary.svg").read_text(encoding="utf-8"))
        for folder in (tmp_path, summary.RESULTS)
    )
    assert drawn == shown


def test_pages_are_for_people_in_a_hurry():
    assert len(README.splitlines()) <= 180
    assert len((ROOT / "docs" / "results.md").read_text(encoding="utf-8").splitlines()) <= 150


def test_every_link_leads_to_something():
    pages = [ROOT / "README.md", *(ROOT / "docs").rglob("*.md"), *(ROOT / "examples").rglob("*.md")]
    for page in pages:
        for link, anchor in re.findall(r"\]\(([^)#\s]*)#?([^)\s]*)\)", page.read_text("utf-8")):
            if link.startswith("http"):
                continue
            to = page.parent / link if link else page
            assert to.exists(), f"{page.name}: {link}"
            if anchor:
                heads = re.findall(r"^#+ (.*)$", to.read_text("utf-8"), re.MULTILINE)
                slugs = [re.sub(r"[^\w -]", "", head).lower().replace(" ", "-") for head in heads]
                assert anchor in slugs, f"{page.name}: {link}#{anchor}"
