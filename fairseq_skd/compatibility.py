"""What fairseq and torch do not offer, each with the reason and what would make it unnecessary.

Tried with ve-fairseq 0.12.3 (torch 2.13) and fairseq 0.12.2 (torch 2.5).
"""

import argparse
import functools
from typing import Any, Iterator, List, Optional

import numpy as np
import torch
from fairseq import utils
from fairseq.data import LanguagePairDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.models import BaseFairseqModel
from torch.torch_version import TorchVersion

__all__ = ["allow_fairseqs_checkpoints", "num_updates", "target_side_words", "unwrap"]


def allow_fairseqs_checkpoints() -> None:
    """Let torch's safe loader read what fairseq puts into a checkpoint.

    An `argparse.Namespace` always, and with ``--eval-bleu`` the counts of n-grams as numpy arrays
    and scalars, which hold numbers alone. torch >= 2.6 loads with ``weights_only=True`` and
    refuses classes that it does not know. Unnecessary once fairseq passes ``weights_only`` itself
    or stops saving them.
    """
    numbers = [np.int64(0), np.float64(0)]
    # Functions that numpy keeps under other names from version to version; an object knows its own.
    makers: List[Any] = [value.__reduce__()[0] for value in (np.zeros(0), *numbers)]
    dtypes = [type(value.dtype) for value in numbers]
    classes = [argparse.Namespace, np.ndarray, np.dtype, *dtypes]
    torch.serialization.add_safe_globals([*makers, *classes])
    if TorchVersion(torch.__version__) >= "2.6":  # takes a name beside each
        # The names in a checkpoint that was written with numpy 1, and with numpy 2.
        modules = ("numpy.core.multiarray", "numpy._core.multiarray")
        named: List[Any] = [(maker, f"{m}.{maker.__name__}") for maker in makers for m in modules]
        torch.serialization.add_safe_globals(named)


def remember_num_updates() -> None:
    """Make every fairseq model keep the update number that its task tells it.

    A task calls ``model.set_num_updates(n)`` before each forward pass, but a criterion is told
    nothing, and counting its own calls would be wrong under ``--update-freq``, after a resume and
    for dummy batches. A listener inside the model would come too late for the first update of a
    resumed run: the criterion first sees the model after that call. Unnecessary once fairseq
    passes the update number to criteria.
    """
    original = BaseFairseqModel.set_num_updates
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def set_num_updates(self: BaseFairseqModel, num_updates: int) -> None:
        self.self_kd_num_updates = num_updates
        original(self, num_updates)

    BaseFairseqModel.set_num_updates = set_num_updates


def num_updates(model: Any) -> Optional[int]:
    """Return the number of updates done, as last told to the model; None if it never was."""
    return getattr(unwrap(model), "self_kd_num_updates", None)


def unwrap(model: Any) -> Any:
    """Return the fairseq model inside wrappers for distributed training."""
    while not isinstance(model, BaseFairseqModel) and hasattr(model, "module"):
        model = model.module
    return model


def target_side_words(task: Any) -> Optional[np.ndarray]:
    """Return the ids that occur on the target side of the training data, where that is known.

    Only asked where source and target share one dictionary: then a part of it are words of the
    source language, which are no alternatives to a target word. It is known once the training
    set is loaded as pairs of memory-mapped files (fairseq's default), and not split into shards
    by epoch, of which only one is loaded at a time. Reads the file once: about a second for 100
    million tokens. Unnecessary once fairseq-preprocess keeps the counts of each side.

    Returns
    -------
    numpy.ndarray or None
        int64, ascending; None if it is not known.
    """
    pairs = getattr(task, "datasets", {}).get("train")
    if not isinstance(pairs, LanguagePairDataset) or pairs.src_dict != pairs.tgt_dict:
        return None
    if len(utils.split_paths(getattr(task.cfg, "data", None) or "")) != 1:
        return None
    counts = np.zeros(len(pairs.tgt_dict), dtype=np.int64)
    for indexed in _indexed_files(pairs.tgt):
        if indexed is None:
            return None
        tokens = np.frombuffer(indexed._bin_buffer, dtype=indexed._index.dtype)
        for start in range(0, len(tokens), 2**24):  # 128 MiB as bincount's int64
            counts += np.bincount(tokens[start : start + 2**24], minlength=len(counts))
    return np.flatnonzero(counts)


def _indexed_files(dataset: Any) -> Iterator[Optional[MMapIndexedDataset]]:
    """Yield the files beneath datasets that join or wrap others; None for any other kind."""
    if isinstance(dataset, MMapIndexedDataset):
        yield dataset
    elif hasattr(dataset, "datasets"):
        for part in dataset.datasets:
            yield from _indexed_files(part)
    elif hasattr(dataset, "dataset"):
        yield from _indexed_files(dataset.dataset)
    else:
        yield None
