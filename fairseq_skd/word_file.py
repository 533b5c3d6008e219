"""A file with k words and their probabilities for every position of a text.

Who writes it differs: a training that notes what its model says (`past`), or models that are
finished (`stored`). The file and its reader are one. It is mapped into memory and never read whole:

    head    JSON, 64 KiB: whose words these are, of which text, how many
    words   a record a position: k ids (int32), then k probabilities (float16), 6 k bytes
    starts  int64, one a sentence and one more: where its records begin
    marks   uint32, one a sentence: 0 where nothing is written; else what its writer likes, in
            `past` the update, in `stored` a checksum

A sentence (a block of a language model) has a place of its own, so it does not matter in which
order, batch, epoch or process sentences come. Its records lie together: a batch from a cold disk
costs a few pages a sentence.
"""

import contextlib
import errno
import fcntl
import json
import mmap
import os
import shutil
import tempfile
import zlib
from pathlib import Path
from typing import Any, BinaryIO, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from torch import Tensor

from fairseq_skd.soft_targets import SoftTarget

__all__ = ["FORMAT", "TextLayout", "WordFile", "WordFileError", "head_of", "make"]

FORMAT = "fairseq_skd words 2"
_FORMER = "fairseq_skd past 1"  # of version 0.1
_HEAD_BYTES = 2**16


class WordFileError(RuntimeError):
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


class Records(NamedTuple):
    """Where the records of a batch are.

    Attributes
    ----------
    rows : numpy.ndarray
        int64, B x T: the number of each position's record; 0 where there is none.
    real : numpy.ndarray
        bool, B x T: whether there is one; the others are padding.
    """

    rows: np.ndarray
    real: np.ndarray


def record_type(top_k: int) -> np.dtype:
    """Return the type of one position's record, little-endian."""
    return np.dtype([("ids", "<i4", (top_k,)), ("probabilities", "<f2", (top_k,))])


class Sizes(NamedTuple):
    """Where the parts of a file begin, in bytes, and where it ends."""

    words: int
    starts: int
    marks: int
    end: int

    @classmethod
    def of(cls, top_k: int, sentences: int, positions: int) -> "Sizes":
        """Return those of a file."""
        starts = _HEAD_BYTES + record_type(top_k).itemsize * positions
        starts += -starts % 8
        marks = starts + 8 * (sentences + 1)
        return cls(_HEAD_BYTES, starts, marks, marks + 4 * sentences)


def head_of(path: Path) -> Optional[Dict[str, Any]]:
    """Return a file's head; None if there is no file.

    Raises
    ------
    WordFileError
        If it is something else, or of a version that this one does not read.
    """
    if not path.is_file():
        return None
    with path.open("rb") as file:
        try:
            head = json.loads(file.read(_HEAD_BYTES))
        except ValueError:
            head = None
    form = head.get("format") if isinstance(head, dict) else None
    if form == FORMAT:
        return head
    if form == _FORMER:
        raise WordFileError(
            f"{path} was written by version 0.1 of fairseq_skd, whose files this one does not "
            "read. Remove it, and the past is recorded anew from the next epoch on"
        )
    if isinstance(form, str) and form.startswith("fairseq_skd "):
        raise WordFileError(f"{path} is a file of another version ({form}); this reads {FORMAT!r}")
    raise WordFileError(f"{path} is no file of words and probabilities, so it is left alone")


def write_head(file: BinaryIO, head: Dict[str, Any]) -> None:
    """Write the head at the beginning of a file."""
    text = json.dumps({"format": FORMAT, **head}).encode()
    if len(text) > _HEAD_BYTES:
        raise WordFileError(f"what describes the file takes {len(text)} bytes, not {_HEAD_BYTES}")
    file.seek(0)
    file.write(text.ljust(_HEAD_BYTES))


def make(path: Path, head: Dict[str, Any], lengths: np.ndarray, advice: str) -> str:
    """Make a file in which nothing is written yet, whole or not at all.

    If another process, also of another machine, makes it at the same time, its file stays (on a
    file system without links unless both come within the same moment). Those of one machine wait
    for each other: together they would reserve the room of as many files.

    Parameters
    ----------
    path : Path
        The file, which is not there yet.
    head : dict
        With ``top_k``; ``sentences`` and ``positions`` are added.
    lengths : numpy.ndarray
        int64: positions of every sentence.
    advice : str
        What to do if there is no room.

    Returns
    -------
    str
        Its size and the room that there was, to be logged.

    Raises
    ------
    WordFileError
        If there is no room: all of it is reserved now, so that it cannot run out later.
    """
    sentences, positions, top_k = len(lengths), int(lengths.sum()), head["top_k"]
    sizes = Sizes.of(top_k, sentences, positions)
    path.parent.mkdir(parents=True, exist_ok=True)
    needed = f"{sizes.end / 1e9:.2f} GB ({sentences} sentences, k = {top_k})"
    with _one_at_a_time(path.parent):
        if path.exists():
            return f"{path} was made by another process meanwhile"
        free = shutil.disk_usage(path.parent).free
        too_small = WordFileError(
            f"{path} needs {needed}, and {path.parent} has {free / 1e9:.2f} GB free; {advice}"
        )
        if sizes.end > free:
            raise too_small
        handle, partial = tempfile.mkstemp(".partial", f"{path.name}.", path.parent)
        try:
            with os.fdopen(handle, "wb") as file:
                write_head(file, {**head, "sentences": sentences, "positions": positions})
                os.posix_fallocate(file.fileno(), 0, sizes.end)
                file.seek(sizes.starts)
                file.write(np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tobytes())
            os.chmod(partial, 0o644)
            try:
                os.link(partial, path)
            except FileExistsError:
                pass
            except OSError:  # a file system without links; somebody else's may be there meanwhile
                if not path.exists():
                    os.replace(partial, path)
        except OSError as error:  # others filled the disk meanwhile, or a quota is smaller
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise too_small from error
            raise
        finally:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(partial)
    return f"{path} made for {needed}; {free / 1e9:.1f} GB were free"


@contextlib.contextmanager
def _one_at_a_time(folder: Path) -> Iterator[None]:
    """Wait for the other processes that make a file in a folder, where the file system can."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):  # over a network folders have no locks
            fcntl.flock(handle, fcntl.LOCK_EX)
        yield
    finally:
        os.close(handle)


class WordFile:
    """An open file.

    Parameters
    ----------
    path : Path
        The file.
    writable : bool
        Whether `words` and `marks` can be assigned to.

    Attributes
    ----------
    head : dict
        What its writer says of it: ``top_k``, ``sentences``, ``positions`` and more.
    words : numpy.ndarray
        Records, one a position: fields ``ids`` and ``probabilities``.
    starts : numpy.ndarray
        int64, one a sentence and one more.
    marks : numpy.ndarray
        uint32, one a sentence.

    Raises
    ------
    WordFileError
        If there is none, it is something else, or a part of it is missing.
    """

    def __init__(self, path: Path, writable: bool = False) -> None:
        head = head_of(path)
        if head is None:
            raise WordFileError(f"there is no file {path}")
        self.path, self.head, self.top_k = path, head, int(head["top_k"])
        sentences, positions = int(head["sentences"]), int(head["positions"])
        self.sizes = sizes = Sizes.of(self.top_k, sentences, positions)
        found = path.stat().st_size
        if found != sizes.end:
            raise WordFileError(
                f"{path} has {found} bytes instead of {sizes.end}: it is cut off. Remove it, and "
                "make it anew"
            )
        access = mmap.ACCESS_WRITE if writable else mmap.ACCESS_READ
        with path.open("r+b" if writable else "rb") as file:
            self._memory = mmap.mmap(file.fileno(), 0, access=access)
        # The system would read 128 KiB and more around each of the few pages of a sentence.
        self._memory.madvise(mmap.MADV_RANDOM)
        self.words = self._part(record_type(self.top_k), sizes.words, positions)
        self.starts = self._part(np.dtype("<i8"), sizes.starts, sentences + 1)
        self.marks = self._part(np.dtype("<u4"), sizes.marks, sentences)

    def _part(self, kind: np.dtype, offset: int, count: int) -> np.ndarray:
        return np.frombuffer(self._memory, kind, count, offset)

    def lengths(self, sentences: np.ndarray) -> np.ndarray:
        """Return how many positions sentences have."""
        return self.starts[sentences + 1] - self.starts[sentences]

    def damaged(self) -> List[int]:
        """Return the sentences whose mark is not their checksum, but for those without a mark."""
        self._memory.madvise(mmap.MADV_SEQUENTIAL)
        wrong = [
            i
            for i, (begin, end) in enumerate(zip(self.starts, self.starts[1:]))
            if self.marks[i] not in (0, checksum(self.words[begin:end]))
        ]
        self._memory.madvise(mmap.MADV_RANDOM)
        return wrong

    def empty(self) -> np.ndarray:
        """Return the sentences that have no words, if marks are checksums: by those of nothing."""
        lengths, which = np.unique(np.diff(self.starts), return_inverse=True)
        nothing = [checksum(np.zeros(length, self.words.dtype)) for length in lengths]
        return np.flatnonzero(self.marks == np.array(nothing, np.uint32)[which])

    def expect(self, sentences: np.ndarray) -> None:
        """Let the system read what a batch will ask for, all at once and meanwhile."""
        page = mmap.PAGESIZE
        size = self.words.itemsize
        for first, last in zip(self.starts[sentences], self.starts[sentences + 1]):
            begin = (self.sizes.words + int(first) * size) // page * page
            end = self.sizes.words + int(last) * size
            if end > begin:
                self._memory.madvise(mmap.MADV_WILLNEED, begin, end - begin)

    def records(self, sentences: np.ndarray, width: int, skip: int = 0) -> Records:
        """Return where the records of a batch are.

        Parameters
        ----------
        sentences : numpy.ndarray
            int64, B.
        width : int
            Positions of each in the batch, padding at the end; more than the longest has are
            padding, too.
        skip : int
            So many positions at the beginning are left out.

        Raises
        ------
        WordFileError
            If the batch is narrower than its longest sentence, or there is no such sentence.
        """
        known = len(self.marks)
        if len(sentences) and not 0 <= sentences.min() <= sentences.max() < known:
            raise WordFileError(
                f"sentence {sentences.max()} is not in {self.path}, which has {known}"
            )
        lengths = self.lengths(sentences)
        if len(sentences) and lengths.max() > width:
            raise WordFileError(
                f"a batch has {width} positions a sentence, and its longest one {lengths.max()} in "
                f"{self.path}: the text must be the same in every epoch"
            )
        places = np.arange(skip, max(width, skip))
        real = places < lengths[:, None]
        return Records(np.where(real, self.starts[sentences][:, None] + places, 0), real)

    def read(
        self,
        records: Records,
        wanted: np.ndarray,
        device: Optional[torch.device] = None,
        share: Optional[Callable[[np.ndarray], np.ndarray]] = None,
    ) -> SoftTarget:
        """Return the words of a batch's positions.

        Parameters
        ----------
        records : Records
            Of the batch.
        wanted : numpy.ndarray
            bool, B x T: the others have no words, ids and weights of 0.
        device : torch.device, optional
            Of the result. The copy does not wait for it.
        share : callable, optional
            Of the positions, N, from the weights, N x k. Default: 1 where they are wanted.

        Returns
        -------
        SoftTarget
            N x k; rows add up to at most 1, but for float16's rounding.
        """
        found = self.words[records.rows.reshape(-1)]
        flat = wanted.reshape(-1)
        ids = np.where(flat[:, None], found["ids"], 0).astype(np.int64)
        weights = np.where(flat[:, None], found["probabilities"], 0).astype(np.float32)
        shares = (flat if share is None else share(weights)).astype(np.float32)
        return SoftTarget(*(_to(torch.from_numpy(x), device) for x in (ids, weights, shares)))


def pack(ids: np.ndarray, probabilities: np.ndarray) -> np.ndarray:
    """Return records: N x k ids and probabilities, of any types, as the file has them."""
    packed = np.empty(len(ids), record_type(ids.shape[-1]))
    packed["ids"], packed["probabilities"] = ids, probabilities
    return packed


def checksum(words: np.ndarray) -> int:
    """Return the CRC-32 of records, and 1 instead of 0, which means that nothing is written."""
    return zlib.crc32(words.tobytes()) or 1


def _to(tensor: Tensor, device: Optional[torch.device]) -> Tensor:
    if device is None or device.type == "cpu":
        return tensor
    return tensor.pin_memory().to(device, non_blocking=True)


def check_sentences(file: WordFile, sentences: np.ndarray, counts: np.ndarray) -> None:
    """Refuse a batch whose sentences are not as long as in the file.

    Raises
    ------
    WordFileError
        With the first one.
    """
    wrong: Tuple[np.ndarray, ...] = np.nonzero(file.lengths(sentences) != counts)
    for place in wrong[0][:1]:
        raise WordFileError(
            f"sentence {sentences[place]} has {counts[place]} words in a batch and "
            f"{file.lengths(sentences)[place]} in {file.path}: the text must be the same in every "
            "epoch, as it was when the file was made"
        )
