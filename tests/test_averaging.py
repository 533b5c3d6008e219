"""The mean of checkpoints, as a function and as the command."""

import re
from argparse import Namespace

import numpy as np
import pytest
import torch

from fairseq_skd.averaging import CheckpointError, average_checkpoints


def checkpoint(path, value, dtype=torch.float32, **others):
    model = {
        "weight": torch.full((2, 3), value, dtype=dtype),
        "version": torch.tensor([int(value)]),
    }
    state = {"args": Namespace(arch="tiny"), "model": {**model, **others}, "best": value}
    torch.save({**state, "last_optimizer_state": {"step": 3}}, path)
    return path


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_the_mean_of_parameters_and_the_rest_of_the_last(tmp_path, dtype):
    paths = [checkpoint(tmp_path / f"{v}.pt", v, dtype) for v in (1.0, 2.0, 6.0)]
    lines = []
    average_checkpoints(paths, tmp_path / "mean.pt", lines.append)
    state = torch.load(tmp_path / "mean.pt", weights_only=True)
    assert state["model"]["weight"].dtype == dtype
    assert (state["model"]["weight"] == 3).all()
    assert state["model"]["version"].tolist() == [6]
    assert state["best"] == 6
    assert "last_optimizer_state" not in state
    assert len(lines) == 3
    assert sorted(p.name for p in tmp_path.iterdir()) == ["1.0.pt", "2.0.pt", "6.0.pt", "mean.pt"]


def test_half_precision_is_added_up_in_float32(tmp_path):
    """In float16 the sum of these would be infinite."""
    paths = [checkpoint(tmp_path / f"{i}.pt", 4e4, torch.float16) for i in range(3)]
    average_checkpoints(paths, tmp_path / "mean.pt")
    weight = torch.load(tmp_path / "mean.pt", weights_only=True)["model"]["weight"]
    assert (weight == torch.tensor(4e4, dtype=torch.float16)).all()


def test_files_that_cannot_be_averaged_are_named(tmp_path):
    good = checkpoint(tmp_path / "good.pt", 1.0)
    other = checkpoint(tmp_path / "other.pt", 1.0, extra=torch.zeros(1))
    text, plain = tmp_path / "text.pt", tmp_path / "plain.pt"
    text.write_text("no checkpoint")
    torch.save({"weight": torch.zeros(1)}, plain)
    output = tmp_path / "mean.pt"
    for paths, message in [
        ([], "no checkpoints"),
        ([good, tmp_path / "none.pt"], r"none\.pt: there is no such file"),
        ([good, text], r"text\.pt cannot be read"),
        ([good, plain], r"plain\.pt is no fairseq checkpoint"),
        ([good, other], r"other\.pt has another model than .*good\.pt: they differ in extra"),
    ]:
        with pytest.raises(CheckpointError, match=message):
            average_checkpoints(paths, output)
    assert not output.exists()


@pytest.mark.parametrize("module", [b"numpy.core.multiarray", b"numpy._core.multiarray"])
def test_numpys_numbers_under_the_names_of_numpy_1_and_2(tmp_path, module):
    """fairseq's --eval-bleu puts them into a checkpoint."""
    path = tmp_path / "numbers.pt"
    numbers = {"model": {}, "scalar": np.int64(7), "array": np.arange(3)}
    torch.save(numbers, path, _use_new_zipfile_serialization=False)
    written = path.read_bytes()
    assert b"numpy._core.multiarray" in written or b"numpy.core.multiarray" in written
    path.write_bytes(re.sub(rb"numpy\._?core\.multiarray", module, written))
    found = torch.load(path, weights_only=True)
    assert found["scalar"] == 7
    assert found["array"].tolist() == [0, 1, 2]
