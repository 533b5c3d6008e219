"""What must not happen: code run by a checkpoint or a string, files outside a folder, network."""

import ast
import io
import os
import subprocess
import sys
import tarfile
import zipfile
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from torch.torch_version import TorchVersion

from fairseq_skd.checkpoints import faults_of_the_loader
from fairseq_skd.commands.doctor import _loader
from fairseq_skd.compatibility import allow_fairseqs_checkpoints
from tests.conftest import PLUGIN, ROOT, TINY, command

OLD_TORCH = TorchVersion(torch.__version__) < "2.6"


class Evil:
    def __reduce__(self):
        return (os.mkdir, (os.environ["OWNED"],))


@pytest.fixture
def evil(tmp_path, monkeypatch):
    """A file that makes a folder if it is loaded without care."""
    monkeypatch.setenv("OWNED", str(tmp_path / "owned"))
    path = tmp_path / "checkpoint_last.pt"
    torch.save({"model": {}, "args": Namespace(x=Evil()), "cfg": None}, path)
    return path


def test_a_malicious_checkpoint_is_refused_by_fairseqs_commands(evil, corpus, tmp_path):
    """With the plugin, on every torch that is allowed: to translate, and to go on from."""
    plugin = ["--user-dir", PLUGIN, "--cpu"]
    generate = ["fairseq-generate", corpus / "pair", "--path", evil, *plugin]
    printed = command(*generate, status=1)
    assert "Weights only load failed" in printed
    assert ("has no safe loader (CVE-2025-32434" in printed) == OLD_TORCH
    training = ["fairseq-train", corpus / "pair", "--arch", "transformer", *TINY, *plugin]
    training += ["--criterion", "self_kd", "--optimizer", "adam", "--max-tokens", 99]
    training += ["--save-dir", tmp_path]  # where fairseq looks for checkpoint_last.pt
    assert "Weights only load failed" in command(*training, status=1)
    assert not (tmp_path / "owned").exists()


@pytest.mark.parametrize(
    ("version", "faults"),
    [("2.4.1", 2), ("2.5.1+cu124", 2), ("2.6.0", 1), ("2.9.1", 1), ("2.10.0", 0), ("2.13.0", 0)],
)
def test_a_torch_whose_safe_loader_has_a_fault_is_called_unsafe(version, faults, monkeypatch):
    monkeypatch.delenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", raising=False)
    monkeypatch.setattr(torch, "__version__", version)
    assert len(faults_of_the_loader()) == faults
    assert _loader().startswith("UNSAFE: CVE-" if faults else "safe loader")
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")
    assert _loader().count("CVE-") == faults
    assert _loader().endswith("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, for fairseq's commands")


def test_with_an_old_torch_a_line_says_that_it_is_not_safe(monkeypatch, caplog):
    monkeypatch.setattr(torch, "__version__", "2.5.1")
    monkeypatch.setattr(torch.serialization, "add_safe_globals", lambda classes: None)
    monkeypatch.setenv("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
    allow_fairseqs_checkpoints()
    assert "torch 2.5.1 has no safe loader (CVE-2025-32434" in caplog.text


def test_a_checkpoint_of_self_kd_loads_without_the_plugin(corpus, tmp_path):
    """fairseq alone translates with it, once torch is told of argparse's Namespace."""
    options = ["--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200, "--max-update", 2]
    command(
        *("fairseq-train", corpus / "pair", "--arch", "transformer", *TINY, "--cpu", *options),
        *("--user-dir", PLUGIN, "--criterion", "self_kd", "--save-dir", tmp_path),
    )
    code = (
        "import argparse, sys, torch\n"
        "torch.serialization.add_safe_globals([argparse.Namespace])\n"
        "from fairseq.checkpoint_utils import load_model_ensemble\n"
        "(model,), config = load_model_ensemble([sys.argv[1]])\n"
        "assert 'fairseq_skd' not in sys.modules\n"
        "print(config.criterion._name, sum(p.numel() for p in model.parameters()))\n"
    )
    program = [sys.executable, "-c", code, str(tmp_path / "checkpoint_last.pt")]
    done = subprocess.run(program, capture_output=True, text=True, cwd=tmp_path)
    assert done.stdout.startswith("self_kd "), done.stderr


@pytest.mark.parametrize("kind", ["tgz", "zip"])
@pytest.mark.parametrize("member", ["../outside", "/{folder}/outside", "inside/../../outside"])
def test_an_archive_writes_nothing_outside_its_folder(tmp_path, kind, member):
    member = member.format(folder=str(tmp_path).lstrip("/"))
    archive = tmp_path / f"archive.{kind}"
    if kind == "zip":
        with zipfile.ZipFile(archive, "w") as file:
            file.writestr(member, "evil")
    else:
        with tarfile.open(archive, "w:gz") as file:
            info = tarfile.TarInfo(member)
            info.size = 4
            file.addfile(info, io.BytesIO(b"evil"))
    folder = tmp_path / "deep" / "unpacked"
    script = f"source {ROOT}/examples/recipe.sh; unpack {archive} {folder}"
    environment = {**os.environ, "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}"}
    subprocess.run(["bash", "-euc", script], env=environment, stdout=subprocess.DEVNULL)
    assert not list(tmp_path.glob("outside"))
    assert not list((tmp_path / "deep").glob("outside"))


def test_the_package_evaluates_no_string_and_opens_no_connection():
    forbidden = {"eval", "exec", "compile", "system", "popen", "__import__"}
    modules = {"socket", "urllib", "http", "requests", "subprocess", "pickle", "shelve", "marshal"}
    found = []
    for path in PLUGIN.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Call):
                name = getattr(node.func, "id", None) or getattr(node.func, "attr", "")
                plain = isinstance(node.func, ast.Name) or name in {"system", "popen"}
                if name in forbidden and plain:
                    found.append((path.name, name))
            names = [a.name for a in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            found += [(path.name, name) for name in names if name.split(".")[0] in modules]
    assert found == []
