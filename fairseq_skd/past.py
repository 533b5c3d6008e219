"""What a model gave to every word of its training text when it last saw it.

The soft target `past`: the k words to which the model itself gave most probability at a position
when it last saw this sentence, an epoch ago and under another dropout mask, with these
probabilities. It costs no second model and no second pass, only a look-up. After Kim, Ji, Yoon and
Hwang, "Self-Knowledge Distillation with Progressive Refinement of Targets" (ICCV 2021), who keep
the whole distribution; the k words, and sharing the rest among all, are this project's.

It lies in a `word_file`, whose marks are the updates in which sentences were seen.
"""

import fcntl
import os
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from fairseq_skd.loss import TopWords
from fairseq_skd.soft_targets import SoftTarget
from fairseq_skd.word_file import TextLayout, WordFile, WordFileError, head_of, make, pack

__all__ = ["PastError", "PastPredictions"]


class PastError(WordFileError):
    """The file of the past cannot be used or made; the message says what to do."""


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
        self._pending: List[_Record] = []
        head: Dict[str, Any] = {"kind": "past", "text": layout.fingerprint}
        head.update(top_k=top_k, skip=skip)
        advice = "--self-kd-past-file takes another place"
        try:
            if guards:
                path.parent.mkdir(parents=True, exist_ok=True)
                _guard(path)  # before anything in it is changed
            found = head_of(path)
            if found is not None and {name: found.get(name) for name in head} == head:
                say(f"going on with {path}")
            elif not guards:
                raise PastError(f"{path} is not what the first process of this run has made")
            elif found is not None and found.get("kind") != "past":
                raise WordFileError(f"{path} holds the words of a teacher, and is left alone")
            else:
                was = ""
                if found is not None:
                    was = " (what was there belongs to another text, dictionary, k or prefix)"
                    path.unlink()  # makes room; processes that still have it keep it
                smaller = f"{advice}, and a smaller --self-kd-top-k less of it"
                say(make(path, head, layout.lengths, smaller) + was)
            self.file = WordFile(path, writable=True)
        except OSError as error:
            raise PastError(
                f"{path} cannot be used for the model's past predictions: {error}. {advice}"
            ) from error
        except PastError:
            raise
        except WordFileError as error:
            raise PastError(f"{error} ({advice})") from error
        lost = self.file.marks > num_updates
        if guards and lost.any():
            self.file.marks[lost] = 0
            say(
                f"{lost.sum()} of {len(lost)} sentences in it were seen after update "
                f"{num_updates}, from where this run goes on: their past is dropped"
            )

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
        WordFileError
            If the batch is narrower than its sentences.
        """
        self.flush()
        records = self.file.records(sentences, width, self.skip)
        updates = self.file.marks[sentences]
        seen = ((updates > 0) & (updates <= num_updates))[:, None] & records.real
        return self.file.read(records, seen, device)

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
            rows, real = self.file.records(record.sentences, record.width, self.skip)
            shape = (*rows.shape, self.top_k)
            probabilities = record.probabilities.numpy().reshape(shape)
            ids = record.ids.numpy().reshape(shape)
            self.file.marks[record.sentences] = 0
            self.file.words[rows[real]] = pack(ids[real], probabilities[real])
            # What has overflowed must not come back an epoch later.
            finite = (np.isfinite(probabilities).all(2) | ~real).all(1)
            self.file.marks[record.sentences] = np.where(finite, record.num_updates + 1, 0)
        self._pending.clear()


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
