"""The mean of several checkpoints of one run, whose translations are usually better than theirs.

fairseq has this as a script in its repository, which its package does not contain.
"""

from pathlib import Path
from typing import Any, Callable, Dict, Sequence

import torch
from torch import Tensor

from fairseq_skd.checkpoints import CheckpointError, read_checkpoint

__all__ = ["average_checkpoints"]


def average_checkpoints(
    paths: Sequence[Path], output: Path, progress: Callable[[str], None] = lambda line: None
) -> None:
    """Write a checkpoint with the mean of the parameters of others.

    Everything but the parameters is that of the last one given; its optimizer state, which does
    not belong to the mean, is left out. Means are computed in float32 (float64 for float64) and
    stored in the parameters' own type; what is not a floating-point number is that of the last.

    Parameters
    ----------
    paths : sequence of Path
        fairseq checkpoints of one model, at least one. One at a time is in memory, with its
        optimizer state while it is read, beside the sums.
    output : Path
        Written whole or not at all.
    progress : callable
        Is told a line for every checkpoint read.

    Raises
    ------
    CheckpointError
        If a file is missing, is no fairseq checkpoint, or has other parameters than the first, or
        if ``output`` cannot be written: that is found before anything is read.
    """
    if not paths:
        raise CheckpointError("no checkpoints were given")
    if output.is_dir() or not output.name:
        raise CheckpointError(f"--output is {output}, a folder; allowed: the name of a file")
    if not output.parent.is_dir():
        raise CheckpointError(f"--output is {output}, and there is no folder {output.parent}")
    totals: Dict[str, Tensor] = {}
    expected: Dict[str, torch.Size] = {}
    state: Dict[str, Any] = {}
    for number, path in enumerate(paths, start=1):
        progress(f"reading {path} ({number} of {len(paths)})")
        state.clear()  # before the next one is read
        state = read_checkpoint(path)
        state.pop("last_optimizer_state", None)
        shapes = {name: value.shape for name, value in state["model"].items()}
        if number == 1:
            expected = shapes
        elif shapes != expected:
            names = [n for n in {**expected, **shapes} if expected.get(n) != shapes.get(n)]
            raise CheckpointError(
                f"{path} has another model than {paths[0]}: they differ in {', '.join(names[:5])}"
            )
        _add(state["model"], totals)
    state["model"] = {
        name: (totals[name] / len(paths)).to(value.dtype) if value.is_floating_point() else value
        for name, value in state["model"].items()
    }
    partial = output.with_name(output.name + ".partial")
    torch.save(state, partial)
    partial.replace(output)


def _add(model: Dict[str, Tensor], totals: Dict[str, Tensor]) -> None:
    for name, value in model.items():
        if name not in totals:
            # A copy: tied parameters share their memory, and each is added to under its own name.
            totals[name] = _wide(value).clone()
        elif value.is_floating_point():
            totals[name] += _wide(value)


def _wide(value: Tensor) -> Tensor:
    if not value.is_floating_point():
        return value
    return value.to(torch.promote_types(value.dtype, torch.float32))
