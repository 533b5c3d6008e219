"""Read a fairseq checkpoint by torch's safe loader, and say how safe that is."""

from pathlib import Path
from typing import Any, Dict, List

import torch
from torch.torch_version import TorchVersion

__all__ = ["CheckpointError", "faults_of_the_loader", "read_checkpoint"]

# Faults of torch's safe loader: the first version without, and what a file can do before it.
_FAULTS = [
    ("2.6", "CVE-2025-32434: a file can run code"),
    ("2.10", "CVE-2026-24747: a file can damage memory, and perhaps run code"),
]


class CheckpointError(Exception):
    """A file is no checkpoint, or not the one that is needed; the message names it."""


def faults_of_the_loader() -> List[str]:
    """Return what is publicly known to be wrong with the safe loader of this torch.

    Sources: the advisories GHSA-53q9-r3pm-6pq6 and GHSA-63cw-57p8-fm3p of pytorch/pytorch.
    """
    return [what for mended, what in _FAULTS if TorchVersion(torch.__version__) < mended]


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
