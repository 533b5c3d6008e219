"""What a model gave to every word of its training text when it last saw it.

The soft target `past`: the k words to which the model itself gave most probability at a position
when it last saw this sentence, an epoch ago and under another dropout mask, with these
probabilities. It costs no second model and no second pass, only a look-up. After Kim, Ji, Yoon and
Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets" (ICCV 2021), who keep
the whole distribution; the k words, and sharing the rest among all, are this project's.

All of it lies in one memory-mapped file, in which every sentence has a place of its own: so it does
not matter in which order, batch, epoch or process of the machine sentences come.
"""

import fcntl
import json
import os
import shutil
from pathlib import Path
from typing import BinaryIO, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from fairseq_skd.loss import TopWords
from fairseq_skd.soft_targets import SoftTarget

__all__ = ["PastError", "PastPredictions", "TextLayout"]

_FORMAT = "fairseq_skd past 1"
_HEAD_BYTES = 4096


class PastError(RuntimeError):
    """The file cannot be used or made; the message says what to do."""


class TextLayout(NamedTuple):
    """What decides where a sentence lies in the file.

    Attributes
    ----------
    lengths : numpy.ndarray
        int64: positions of every training sentence (or block of a language model), by its index
        in the data set.
    fingerprint : str
        Of the text and the dictionary: a file with another one is not used.
    """

    lengths: np.ndarray
    fingerprint: str


class _Record(NamedTuple):
    """What is still to be written; with an event, once the device has passed it."""

    sentences: np.ndarray
    width: int
    num_updates: int
    ids: Tensor
    probabilities: Tensor
    event: Optional[torch.cuda.Event]


class PastPredictions:
    """The k likeliest words of every position of a training text, on disk.

    A sentence's record is marked as missing while it is written. So a kill at any moment costs
    that sentence's past and nothing else.

    Parameters
    ----------
    path : Path
        The file. It is made if it is missing, or is that of another text, dictionary, k or skip.
        The processes of a run on one machine share it. Two machines must not: a network's file
        system does not keep their memory the same. Beside it lies an empty one, ``.lock``.
    layout : TextLayout
        Of the training text.
    top_k : int
        k.
    num_updates : int
        Updates done when the run (or the resumed run) begins. What was recorded in later ones is
        dropped: it belongs to another run, or to a part of this one that was lost.
    skip : int
        So many positions at the beginning of every sentence are left out of all batches.
    say : callable
        Is told, in a line, what was found or made.
    guards : bool
        Whether this process makes the file and keeps it from other runs as long as it lives: the
        first process of a run on a machine. The others open it after that, as it is.

    Raises
    ------
    PastError
        If there is no room for the file, no permission, or another run uses it; without
        ``guards``, if there is no file of this kind.
    """

    def __init__(
        self,
        path: Path,
        layout: TextLayout,
        top_k: int,
        num_updates: int = 0,
        skip: int = 0,
        say: Callable[[str], None] = lambda line: None,
        guards: bool = True,
    ) -> None:
        self.path = path
        self.top_k = top_k
        self.skip = skip
        self._lengths = layout.lengths.astype(np.int64)
        self._starts = np.cumsum(self._lengths) - self._lengths
        self._pending: List[_Record] = []
        sentences, positions = len(self._lengths), int(self._lengths.sum())
        sizes = {"updates": 4 * sentences, "ids": 4 * top_k * positions}
        sizes["probabilities"] = 2 * top_k * positions
        total = _HEAD_BYTES + sum(sizes.values())
        head: Dict[str, object] = {"format": _FORMAT, "fingerprint": layout.fingerprint}
        head.update(top_k=top_k, skip=skip)
        try:
            if guards:
                path.parent.mkdir(parents=True, exist_ok=True)
                _guard(path)  # before anything in it is changed
            if _head_of(path) == head and path.stat().st_size == total:
                say(f"going on with {path}")
            elif guards:
                say(self._make(path, head, total))
            else:
                raise PastError(f"{path} is not what the first process of this run has made")
            places = self._map(path, sizes, positions)
            self._updates, self._ids, self._probabilities = places
            lost = self._updates > num_updates
            if guards and lost.any():
                self._updates[lost] = 0
                say(
                    f"{lost.sum()} of {sentences} sentences in it were seen after update "
                    f"{num_updates}, from where this run goes on: their past is dropped"
                )
        except OSError as error:
            raise PastError(
                f"{path} cannot be used for the model's past predictions: {error}. "
                "--self-kd-past-file takes another place"
            ) from error

    def _make(self, path: Path, head: Dict[str, object], total: int) -> str:
        was = ""
        if path.exists():
            was = " (what was there belongs to another text, dictionary, k or prefix)"
            path.unlink()  # makes room; processes that still have it keep it
        free = shutil.disk_usage(path.parent).free
        needed = f"{total / 1e9:.2f} GB ({len(self._lengths)} sentences, k = {self.top_k})"
        if total > free:
            raise PastError(
                f"the model's past predictions need {needed}, and {path.parent} has "
                f"{free / 1e9:.2f} GB free; --self-kd-past-file takes another place, and a smaller "
                "--self-kd-top-k less of it"
            )
        partial = path.with_name(path.name + ".partial")
        try:
            with partial.open("wb") as file:
                file.write(json.dumps(head).encode().ljust(_HEAD_BYTES))
                # Reserved now, so that it cannot run out in the middle of the training.
                os.posix_fallocate(file.fileno(), 0, total)
            partial.replace(path)
        finally:
            if partial.exists():  # something went wrong
                partial.unlink()
        return f"{path} made for {needed}; {free / 1e9:.1f} GB were free{was}"

    def _map(
        self, path: Path, sizes: Dict[str, int], positions: int
    ) -> Tuple[np.ndarray, np.ndarray, np.ndarray]:
        shape = positions, self.top_k
        offset = _HEAD_BYTES
        arrays = []
        for name, kind, form in (
            ("updates", np.uint32, (len(self._lengths),)),
            ("ids", np.int32, shape),
            ("probabilities", np.float16, shape),
        ):
            if 0 in form:  # nothing can be mapped there
                arrays.append(np.zeros(form, kind))
            else:
                arrays.append(np.memmap(path, kind, "r+", offset, form))
            offset += sizes[name]
        updates, ids, probabilities = arrays
        return updates, ids, probabilities

    def read(
        self,
        sentences: np.ndarray,
        width: int,
        num_updates: int,
        device: Optional[torch.device] = None,
    ) -> SoftTarget:
        """Return what was recorded of a batch before the update that is being computed.

        Parameters
        ----------
        sentences : numpy.ndarray
            int64, B: their indices.
        width : int
            T: positions of each in the batch, padding at the end.
        num_updates : int
            Updates done. A record of this update does not count: fairseq computes one again after
            an overflow, and would learn from the attempt before.
        device : torch.device, optional
            Of the result. The copy does not wait for it.

        Returns
        -------
        SoftTarget
            Of B x (T - skip) positions: N x k. ``share`` is 0 where nothing was recorded, or
            something that is not finite.

        Raises
        ------
        PastError
            If the batch is longer or shorter than its sentences.
        """
        self.flush()
        rows, real = self._rows(sentences, width)
        updates = self._updates[sentences]
        seen = ((updates > 0) & (updates <= num_updates))[:, None] & real
        ids = np.where(seen[..., None], self._ids[rows], 0).reshape(-1, self.top_k)
        probabilities = np.where(seen[..., None], self._probabilities[rows], 0)
        arrays = (
            ids.astype(np.int64),
            probabilities.reshape(-1, self.top_k).astype(np.float32),
            seen.reshape(-1).astype(np.float32),
        )
        return SoftTarget(*(_to(torch.from_numpy(array), device) for array in arrays))

    def write(self, sentences: np.ndarray, width: int, top: TopWords, num_updates: int) -> None:
        """Record what the model gives to the words of a batch now.

        From a GPU it is copied meanwhile, and written at the next call (or `flush`).

        Parameters
        ----------
        sentences, width
            As for `read`.
        top : TopWords
            N x k.
        num_updates : int
            Updates done before the one that is being computed.
        """
        self.flush()
        ids, probabilities = top.ids.int(), top.lprobs.exp().half()
        event = None
        if ids.device.type == "cuda":
            ids, probabilities = (
                torch.empty(x.shape, dtype=x.dtype, pin_memory=True).copy_(x, non_blocking=True)
                for x in (ids, probabilities)
            )
            event = torch.cuda.Event()
            event.record()
        record = _Record(sentences, width, num_updates, ids, probabilities, event)
        self._pending.append(record)
        if event is None:
            self.flush()

    def flush(self) -> None:
        """Write what has been copied from the device since the last call."""
        for record in self._pending:
            if record.event is not None:
                # Of the batch before. At most its forward pass is waited for.
                record.event.synchronize()
            rows, real = self._rows(record.sentences, record.width)
            shape = (*rows.shape, self.top_k)
            probabilities = record.probabilities.numpy().reshape(shape)
            self._updates[record.sentences] = 0
            self._ids[rows[real]] = record.ids.numpy().reshape(shape)[real]
            self._probabilities[rows[real]] = probabilities[real]
            # What has overflowed must not come back an epoch later.
            finite = (np.isfinite(probabilities).all(2) | ~real).all(1)
            self._updates[record.sentences] = np.where(finite, record.num_updates + 1, 0)
        self._pending.clear()

    def _rows(self, sentences: np.ndarray, width: int) -> Tuple[np.ndarray, np.ndarray]:
        """Return the file's row of every position (B x T), and whether there is one."""
        lengths = self._lengths[sentences]
        if len(sentences) and lengths.max() != width:
            raise PastError(
                f"a batch has {width} positions a sentence, and its longest one {lengths.max()} in "
                "the data set: --self-kd-candidates past needs text that is the same in every "
                "epoch, as long as in the data set (no --add-bos-token or "
                "--required-seq-len-multiple)"
            )
        places = np.arange(self.skip, max(width, self.skip))
        real = places < lengths[:, None]
        return np.where(real, self._starts[sentences][:, None] + places, 0), real


def _to(tensor: Tensor, device: Optional[torch.device]) -> Tensor:
    if device is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def _head_of(path: Path) -> Optional[Dict[str, object]]:
    if not path.is_file():
        return None
    with path.open("rb") as file:
        try:
            head = json.loads(file.read(_HEAD_BYTES))
        except ValueError:
            head = None
    if not isinstance(head, dict) or head.get("format") != _FORMAT:
        raise PastError(
            f"{path} is not a file of past predictions, so it is left alone; --self-kd-past-file "
            "takes another place"
        )
    return head


#: The locks of this process, by process, device and inode. They are open until it ends: closing a
#: file anywhere in a process gives up its locks, so that none is opened a second time.
_LOCKS: Dict[Tuple[int, int, int], BinaryIO] = {}


def _guard(path: Path) -> None:
    """Keep other processes from guarding the file until this one ends.

    The lock is on a file of its own, which nothing maps. It is one of the process and not of the
    open file: workers that load data inherit the latter, and would keep it for seconds after a kill
    of the training, which could not go on at once.
    """
    place = path.resolve()
    place = place.with_name(place.name + ".lock")
    if place.exists() and _key(os.stat(place)) in _LOCKS:
        return
    file = place.open("ab")
    try:
        fcntl.lockf(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except (BlockingIOError, PermissionError) as error:  # which one depends on the system
        file.close()
        raise PastError(
            f"{path} is used by another training now, and both would learn from each other's "
            "predictions; --self-kd-past-file takes another place (by default it is in --save-dir)"
        ) from error
    _LOCKS[_key(os.fstat(file.fileno()))] = file


def _key(status: os.stat_result) -> Tuple[int, int, int]:
    return os.getpid(), status.st_dev, status.st_ino
