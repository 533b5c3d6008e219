"""Read a fairseq checkpoint, and nothing that a checkpoint could do besides."""

from pathlib import Path
from typing import Any, Dict

import torch

__all__ = ["CheckpointError", "read_checkpoint"]


class CheckpointError(Exception):
    """A file is no checkpoint, or not the one that is needed; the message names it."""


def read_checkpoint(path: Path, mmap: bool = False) -> Dict[str, Any]:
    """Return what a fairseq checkpoint holds, on the CPU, by torch's safe loader.

    It makes tensors, numbers, strings and containers of them, and the few classes that fairseq
    saves; a file that asks for anything else is refused unread. (Importing `fairseq_skd` has told
    it about these classes.)

    Parameters
    ----------
    path : Path
        The file.
    mmap : bool
        Leave tensors in the file until they are looked at. It must stay there meanwhile.

    Raises
    ------
    CheckpointError
        If there is no such file, it cannot be read, or it holds no model.
    """
    if not path.is_file():
        raise CheckpointError(f"{path}: there is no such file")
    try:
        state = torch.load(path, map_location="cpu", weights_only=True, mmap=mmap)
    except Exception as error:
        reason = str(error).strip().split("\n")[0]
        raise CheckpointError(f"{path} cannot be read as a checkpoint: {reason}") from error
    if not isinstance(state, dict) or not isinstance(state.get("model"), dict):
        raise CheckpointError(f"{path} is no fairseq checkpoint: it holds no model")
    return state
