"""What the README says is so."""

import inspect
import re

import torch

from benchmarks import report
from fairseq_skd.criterion import SelfKDCriterionConfig
from fairseq_skd.options import SelfKDOptions
from fairseq_skd.soft_targets import SelfTeacher
from fairseq_skd.version import __version__
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
    assert report.summary(rows) in PERFORMANCE
    assert f"{rows[0]['device']}, {rows[0]['dtype']}" in PERFORMANCE
    for row in rows:
        if row["p20"]:  # times, not memory
            assert float(row["p20"]) <= float(row["median"]) <= float(row["p80"])


def test_pages_are_for_people_in_a_hurry():
    assert len(README.splitlines()) <= 140
    assert len((ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8").splitlines()) <= 80
    results = [ROOT / "docs" / "results.md", *(ROOT / "docs" / "results").glob("*.md")]
    assert len(results) <= 5
    assert sum(len(page.read_text(encoding="utf-8").split()) for page in results) <= 8000


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


def test_the_newest_version_of_the_changelog_is_this_one():
    changes = (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")
    assert changes.startswith("# Changelog\n\n## Unreleased\n")
    versions = re.findall(r"^## (\d\S+) \(\d{4}-\d{2}-\d{2}", changes, re.MULTILINE)
    assert versions[0] == __version__
    assert f"version:{__version__}" in README
