"""What finished models give to every word of a training text: the soft target `stored`.

The k words to which the mean of their probabilities, in evaluation mode, gives most. The teacher is
run once, and any number of trainings learn from the file for the price of a look-up: neither a
second model in memory nor a second forward pass. After Hinton, Vinyals and Dean, "Distilling the
Knowledge in a Neural Network" (2015), Freitag, Al-Onaizan and Sankaran, "Ensemble Distillation for
Neural Machine Translation" (2017), and Furlanello et al., "Born-Again Neural Networks" (ICML 2018).

It lies in a `word_file`, whose marks are checksums of the sentences.
"""

import hashlib
import json
import os
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Mapping, Optional, Tuple, Union

import numpy as np
import torch
from torch import Tensor

from fairseq_skd.soft_targets import LARGEST_SUM, SoftTarget
from fairseq_skd.word_file import (
    Sizes,
    TextLayout,
    WordFile,
    WordFileError,
    checksum,
    head_of,
    make,
    pack,
    write_head,
)

__all__ = ["StoredTargets", "TargetsWriter", "write_stored_targets"]


class StoredTargets:
    """The words of a teacher, from a file. It is read only: any number of trainings share it.

    Parameters
    ----------
    path : Path or str
        Written by ``fairseq-skd teach`` or `write_stored_targets`.

    Raises
    ------
    WordFileError
        If there is no such file, it is another one, or it is not finished.

    Examples
    --------
    >>> import tempfile, torch
    >>> from fairseq_skd import StoredTargets, write_stored_targets
    >>> path = tempfile.mkdtemp() + "/teacher.skd"
    >>> words, probabilities = torch.tensor([[3, 5], [7, 2]]), torch.tensor([[0.5, 0.25]] * 2)
    >>> write_stored_targets(path, [(words, probabilities), (words[:1], probabilities[:1])])
    >>> StoredTargets(path).read([1, 0], width=2).ids
    tensor([[3, 5],
            [0, 0],
            [3, 5],
            [7, 2]])
    """

    def __init__(self, path: Union[Path, str]) -> None:
        self.file = WordFile(Path(path))
        if self.file.head.get("kind") != "stored":
            raise WordFileError(
                f"{path} holds the past predictions of a training, and not the words of a teacher"
            )
        missing = int((self.file.marks == 0).sum())
        if missing:
            raise WordFileError(
                f"{path} is not finished: {missing} of {len(self)} sentences are missing. The same "
                "fairseq-skd teach command goes on (with --num-shards, that of every shard)"
            )

    def __len__(self) -> int:
        return len(self.file.marks)

    def __reduce__(self) -> Tuple[Any, ...]:  # to a process that loads data: it opens the file
        return StoredTargets, (self.file.path,)

    @property
    def top_k(self) -> int:
        """Words of a position."""
        return self.file.top_k

    @property
    def fingerprint(self) -> str:
        """Of all that the file holds, by its checksums: eight hexadecimal digits."""
        digest = hashlib.sha256(json.dumps(self.file.head, sort_keys=True).encode())
        digest.update(self.file.marks.tobytes())
        return digest.hexdigest()[:8]

    def belongs_to(self, layout: TextLayout) -> bool:
        """Return whether these are the words of a text; `write_stored_targets` knows lengths."""
        if not np.array_equal(np.diff(self.file.starts), layout.lengths):
            return False
        return self.file.head["text"] in (None, layout.fingerprint)

    def read(
        self,
        sentences: Any,
        width: int,
        device: Optional[torch.device] = None,
        skip: int = 0,
    ) -> SoftTarget:
        """Return the soft target of a batch.

        Parameters
        ----------
        sentences : array of int
            B: indices of sentences, in the order in which they were written.
        width : int
            T: positions of each in the batch, padding at the end.
        device : torch.device, optional
            Of the result. The copy does not wait for it.
        skip : int
            So many positions at the beginning of every sentence are left out.

        Returns
        -------
        SoftTarget
            Of B x (T - skip) positions: N x k, float32. ``share`` is 0 where the file has no words:
            at padding, and where the teacher gave none.
        """
        records = self.file.records(np.asarray(sentences, np.int64), width, skip)
        return self.file.read(records, records.real, device, share=_taught)


class TargetsWriter:
    """Writes the words of a text's sentences in any order, and can be interrupted.

    Several processes, also of several machines, may write different sentences of one file: each is
    written with its checksum after it, so a kill costs the sentence that is being written. It
    writes to the file and not to its memory, of which machines on a network keep copies.

    Parameters
    ----------
    path : Path
        Made if it is not there; otherwise it has to be the same one, which is gone on with.
    head : mapping
        ``top_k`` and what is to be told of the teacher; the same for all processes.
    layout : TextLayout
        Of the text.
    say : callable
        Is told, in a line, what was found or made.

    Raises
    ------
    WordFileError
        If there is no room, or the file there is another one.
    """

    def __init__(
        self,
        path: Path,
        head: Mapping[str, Any],
        layout: TextLayout,
        say: Callable[[str], None] = lambda line: None,
    ) -> None:
        head = {"kind": "stored", "text": layout.fingerprint, **head}
        if head_of(path) is None:
            say(make(path, head, layout.lengths, "--output takes another place"))
        found, wanted = (_compared(one) for one in (head_of(path) or {}, head))
        different = [name for name in {**wanted, **found} if found.get(name) != wanted.get(name)]
        if different:
            names = {"text": "the text, dictionary or length of blocks", "top_k": "k"}
            which = ", ".join(names.get(name, name) for name in different)
            raise WordFileError(
                f"{path} is there already and is another one: it differs in {which}. Remove it, or "
                "choose another --output"
            )
        self.file = WordFile(path)
        self._handle = os.open(path, os.O_WRONLY)

    def missing(self, check: bool = False) -> np.ndarray:
        """Return the sentences that are not written yet, ascending; int64.

        With ``check`` also those that are not what was written, which after a loss of power can
        be: all of the file is read.
        """
        found = np.flatnonzero(self.file.marks == 0)
        return np.union1d(found, self.file.damaged()).astype(np.int64) if check else found

    def write(self, sentences: np.ndarray, ids: Tensor, probabilities: Tensor) -> None:
        """Write the words of a batch.

        Parameters
        ----------
        sentences : numpy.ndarray
            int64, B.
        ids, probabilities : Tensor
            B x T x k, padding at the end.
        """
        all_ids, all_probabilities = ids.cpu().numpy(), probabilities.float().cpu().numpy()
        lengths = self.file.lengths(sentences)
        for i, (sentence, length) in enumerate(zip(sentences, lengths)):
            if not np.isfinite(all_probabilities[i, :length]).all():
                raise WordFileError(
                    f"a teacher gives sentence {sentence} probabilities that are not finite; in "
                    "float16 its numbers may be too large: leave --fp16 out, or use --bf16, with "
                    f"another --output or without {self.file.path}"
                )
            words = pack(all_ids[i, :length], all_probabilities[i, :length])
            start = self.file.sizes.words + int(self.file.starts[sentence]) * words.itemsize
            _write_at(self._handle, words.tobytes(), start)
            mark = np.array(checksum(words), "<u4").tobytes()
            _write_at(self._handle, mark, self.file.sizes.marks + 4 * int(sentence))

    def close(self) -> None:
        """Have all of it on the disk."""
        os.fsync(self._handle)
        os.close(self._handle)


def write_stored_targets(
    path: Union[Path, str],
    sentences: Iterable[Tuple[Any, Any]],
    teacher: Optional[Mapping[str, Any]] = None,
) -> None:
    """Write a file of soft targets from anything that yields them, whole or not at all.

    Parameters
    ----------
    path : Path or str
        The file. What was there is replaced.
    sentences : iterable of (ids, probabilities)
        Of each sentence (or block) in turn: two tensors or arrays, T x k, with the same k. A place
        without a word holds any id with probability 0. They are kept as int32 and float16.
    teacher : mapping, optional
        What the file is to tell of its teacher, as JSON can.

    Raises
    ------
    ValueError
        If something is no distribution, or not of the shape.
    """
    path = Path(path)
    lengths: List[int] = []
    marks: List[int] = []
    top_k = 0
    handle, partial = tempfile.mkstemp(".partial", f"{path.name}.", path.parent)
    try:
        with os.fdopen(handle, "wb") as file:
            file.seek(Sizes.of(1, 0, 0).words)
            for number, pair in enumerate(sentences):
                ids = torch.as_tensor(pair[0]).cpu().numpy()
                probabilities = torch.as_tensor(pair[1]).float().cpu().numpy()
                if ids.shape == probabilities.shape:
                    ids = np.where(probabilities == 0, 0, ids)  # whatever stands there
                top_k = top_k or ids.shape[-1]
                _check(number, ids, probabilities, top_k)
                words = pack(ids, probabilities)
                file.write(words.tobytes())
                lengths.append(len(words))
                marks.append(checksum(words))
            sizes = Sizes.of(max(top_k, 1), len(lengths), sum(lengths))
            file.seek(sizes.starts)
            file.write(np.concatenate([[0], np.cumsum(lengths)]).astype("<i8").tobytes())
            file.write(np.array(marks, "<u4").tobytes())
            count = {"sentences": len(lengths), "positions": sum(lengths)}
            head = {"kind": "stored", "text": None, "top_k": max(top_k, 1), **count}
            write_head(file, {**head, "teacher": dict(teacher or {})})
        os.chmod(partial, 0o644)
        os.replace(partial, path)
    except BaseException:
        os.unlink(partial)
        raise


def _taught(weights: np.ndarray) -> np.ndarray:
    """Return at which positions a teacher gave words."""
    return np.asarray(weights.any(1))


def _check(number: int, ids: np.ndarray, probabilities: np.ndarray, top_k: int) -> None:
    shape = ids.shape
    if len(shape) != 2 or shape[1] != top_k or probabilities.shape != shape:
        raise ValueError(
            f"sentence {number} has ids of shape {shape} and probabilities of shape "
            f"{probabilities.shape}; T x {top_k} are needed"
        )
    if ids.size and not (ids.min() >= 0 and ids.max() < 2**31):
        raise ValueError(f"sentence {number} has ids from {ids.min()} to {ids.max()}")
    if not (probabilities >= 0).all() or (probabilities.sum(1) > LARGEST_SUM).any():
        raise ValueError(
            f"the probabilities of sentence {number} are no distribution: they must not be "
            "negative and add up to at most 1 (of log-probabilities take exp())"
        )


def _compared(head: Mapping[str, Any]) -> Dict[str, Any]:
    """Return what of a head tells whether it is the same file: models by their checksums alone."""
    told = dict(head.get("teacher") or {})
    checkpoints = told.pop("checkpoints", [])
    sums = sorted(str(one.get("sha256") if isinstance(one, dict) else one) for one in checkpoints)
    rest = {name: head.get(name) for name in ("kind", "text", "top_k")}
    return {**rest, "checkpoints": sums, **told}


def _write_at(handle: int, data: bytes, offset: int) -> None:
    while data:
        written = os.pwrite(handle, data, offset)
        data, offset = data[written:], offset + written
