"""The examples of docs/sparse-targets.md run, and print what the page says."""

import contextlib
import importlib.machinery
import re
import sys
import types

import pytest

from tests.conftest import ROOT

PAGE = (ROOT / "docs" / "sparse-targets.md").read_text(encoding="utf-8")
PLAIN, TRANSFORMERS = re.findall(r"```python\n([^`]*)```\n\n```\n(.*?)```", PAGE, re.DOTALL)


def numbers(text):
    return [float(number) for number in re.findall(r"\d+\.\d+", text)]


def run(example, tmp_path, monkeypatch, capsys):
    code, shown = example
    monkeypatch.chdir(tmp_path)
    exec(code, {"__name__": "example"})
    printed = [line for line in capsys.readouterr().out.splitlines() if not line.startswith("{")]
    # Of another processor or version the last digits may differ.
    assert numbers("\n".join(printed[-len(shown.splitlines()) :])) == pytest.approx(
        numbers(shown), rel=0.05
    )


def test_plain_pytorch(tmp_path, monkeypatch, capsys):
    run(PLAIN, tmp_path, monkeypatch, capsys)


def test_transformers(tmp_path, monkeypatch, capsys):
    transformers = pytest.importorskip("transformers")
    if not transformers.utils.is_torch_available():
        pytest.skip(f"transformers {transformers.__version__} wants a newer torch")
    try:
        with contextlib.suppress(ImportError):
            import torchaudio  # noqa: F401
    except OSError:
        # fairseq brings PyPI's, which does not load beside a torch built for the CPU, and
        # transformers imports it wherever it is found.
        module = types.ModuleType("torchaudio")
        module.__spec__ = importlib.machinery.ModuleSpec("torchaudio", None)
        monkeypatch.setitem(sys.modules, "torchaudio", module)
    run(TRANSFORMERS, tmp_path, monkeypatch, capsys)
