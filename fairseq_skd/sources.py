"""Where the soft targets of a training come from: neighbours, the past, a teacher's file.

One small interface (`Source`), so that the criterion asks none for its name: it hands over what it
knows of a batch, gets the targets, and hands back what the model said. Nothing here knows fairseq:
what only fairseq can tell comes by way of a `Host`.
"""

import atexit
import functools
from pathlib import Path
from typing import Any, Callable, ClassVar, Dict, List, NamedTuple, Optional, Tuple, Type, Union

import numpy as np
import torch
from torch import Tensor

from fairseq_skd.loss import TopWords
from fairseq_skd.options import SelfKDOptions
from fairseq_skd.past import PastPredictions
from fairseq_skd.schedule import UNKNOWN, TrainingLength
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget
from fairseq_skd.stored import StoredTargets
from fairseq_skd.word_file import TextLayout, WordFile, WordFileError, check_sentences

__all__ = [
    "Batch",
    "Host",
    "NeighborsSource",
    "PastSource",
    "Source",
    "StoredSource",
    "Text",
    "described",
]


class Text(NamedTuple):
    """Which sentences a batch has.

    Attributes
    ----------
    sentences : numpy.ndarray
        int64, B: their indices in the data set.
    lengths : numpy.ndarray
        int64, B: words of each in the batch, without padding.
    """

    sentences: np.ndarray
    lengths: np.ndarray


class Batch(NamedTuple):
    """What is known of a batch before its loss is computed.

    Attributes
    ----------
    target : Tensor
        int64, N: B x (T - skip) words.
    width : int
        T.
    text : Text, optional
        None for a dummy batch, whose gradient is ignored; and if the source does not need it.
    num_updates : int
        Updates done.
    weight : float
        alpha.
    weight_matrix : Tensor
        The output projection W, V x d.
    dictionary, owner : object
        Of W: whose words its rows are, and what stays the same as long as it does.
    """

    target: Tensor
    width: int
    text: Optional[Text]
    num_updates: int
    weight: float
    weight_matrix: Tensor
    dictionary: Any
    owner: Any


class Host(NamedTuple):
    """What a source asks of the trainer.

    Attributes
    ----------
    say : callable
        Logs a line.
    eligible : callable
        Of a dictionary, the ids of the words that may get probability, int64, ascending; and
        whether these are those of the target side of a joined one.
    data : callable
        Returns an object that is another one as soon as another text has been loaded.
    layout : callable
        Returns the `TextLayout` of the training text; raises ValueError with the reason if its
        sentences have no places of their own.
    shards : callable
        Returns in how many parts the text is, of which every epoch has another one.
    place : callable
        Of a file's name, a path in the folder of the run; raises RuntimeError if nobody knows it.
    machine : callable
        Returns the name of this machine if the run has several, and whether this process is the
        first one here. Of all processes at once.
    first_alone : callable
        Calls a function in the first processes, then in the others. Of all at once.
    skip : int
        Positions at the beginning of every sentence that are not learnt.
    """

    say: Callable[[str], None]
    eligible: Callable[[Any], Tuple[np.ndarray, bool]]
    data: Callable[[], Any]
    layout: Callable[[], TextLayout]
    shards: Callable[[], int]
    place: Callable[[str], Path]
    machine: Callable[[], Tuple[str, bool]]
    first_alone: Callable[[bool, Callable[[], Any]], Any]
    skip: int = 0


class Source:
    """Where soft targets come from.

    Parameters
    ----------
    options : SelfKDOptions
        The settings.
    host : Host
        What the trainer knows.
    """

    #: Whether a batch has to come with its `Text`.
    needs_text: ClassVar[bool] = False
    #: Whether the words that the model holds for likeliest are to be noted.
    notes: ClassVar[bool] = False

    def __init__(self, options: SelfKDOptions, host: Host) -> None:
        self.options = options
        self.host = host

    def schedule(
        self, length: Optional[TrainingLength], start: Optional[int] = None
    ) -> Tuple[int, int]:
        """Return start and ramp, in updates, that are `auto` in a training of that length.

        They are what they were when they were measured (docs/results.md); of a training whose
        length nobody knows 1,000 updates each. With a ``start`` that somebody chose, a ramp to the
        end of the training begins there.
        """
        raise NotImplementedError

    def check_words(self, count: int) -> None:
        """Refuse settings that cannot work with so many ordinary words in the dictionary."""
        self.options.check_top_k(count)

    def described(self) -> str:
        """Return what the signature says of the teacher; "" if the options say it all."""
        return ""

    def open(self, num_updates: int) -> None:
        """Get ready before a batch, or refuse: in every process at once, whatever its batch is."""

    def expect(self, text: Text) -> None:
        """Take note that a batch will ask for these sentences soon."""

    def targets(self, batch: Batch) -> Union[SoftTarget, SelfTeacher, None]:
        """Return the soft targets of a batch, or who makes them; None if there is nothing yet."""
        raise NotImplementedError

    def note(self, batch: Batch, top: TopWords) -> None:
        """Take note of what the model gives to its likeliest words."""


class _Taught:
    """A projection, its teacher, and for which interval of updates that was last refreshed."""

    def __init__(self, owner: Any, teacher: SelfTeacher) -> None:
        self.owner = owner  # kept alive, so that no other one gets its id
        self.teacher = teacher
        self.interval = -1


class NeighborsSource(Source):
    """Words near the target in the output projection, or the model's prediction, or both.

    Neighbours are as fresh as the update number asks for. A table belongs to a projection and an
    interval of update numbers: all workers measure it at the same update, and the passes of one
    update share it, also those of several models with one projection.
    """

    #: What makes the soft targets.
    teacher_class: ClassVar[Type[SelfTeacher]] = SelfTeacher

    def __init__(self, options: SelfKDOptions, host: Host) -> None:
        super().__init__(options, host)
        self.taught: Dict[int, _Taught] = {}

    def schedule(
        self, length: Optional[TrainingLength], start: Optional[int] = None
    ) -> Tuple[int, int]:
        """Begin after the warm-up and a quarter of the training, in translation after half of it.

        Neighbours mean nothing until the words have found their places. A language model then
        learns from them with a ramp of a twelfth; a translation, whose source says more than they
        do, with alpha growing to the last update: begun earlier they cost short trainings
        perplexity (docs/results/translation.md).
        """
        if length is None or length.updates is None:
            return UNKNOWN
        updates, warmup = length.updates, length.warmup_updates
        if length.language_model:
            return max(warmup, updates // 4), updates // 12
        start = max(warmup, updates // 2) if start is None else start
        return start, max(updates - start, 0)

    def check_words(self, count: int) -> None:
        """Refuse a k that somebody chose and that is too large; the default's becomes smaller."""
        if self.options.top_k != SelfKDOptions.top_k:
            self.options.check_top_k(count)

    def targets(self, batch: Batch) -> Optional[SelfTeacher]:
        """Return the projection's teacher; None if no word can be a neighbour of another.

        It is made at the first batch, so that settings that cannot work are refused then, and
        refreshed when there is something to teach.
        """
        if self.options.weight == 0:
            return None
        taught = self.taught.get(id(batch.owner))
        if taught is None:
            teacher = self.new_teacher(batch)
            taught = self.taught[id(batch.owner)] = _Taught(batch.owner, teacher)
        if batch.weight == 0 or taught.teacher.top_k == 0:
            return None
        interval = batch.num_updates // self.options.refresh_interval
        if interval != taught.interval:
            if taught.interval < 0:
                self.host.say(
                    f"distillation has begun; at update {batch.num_updates} the neighbors of "
                    f"{len(batch.weight_matrix)} words are measured for the first time"
                )
            taught.teacher.refresh(batch.weight_matrix)
            taught.interval = interval
        return taught.teacher

    def new_teacher(self, batch: Batch) -> SelfTeacher:
        """Return a teacher for a projection."""
        options = self.options
        eligible, on_target_side = self.host.eligible(batch.dictionary)
        self.check_words(len(eligible))
        top_k = max(min(options.top_k, len(eligible) - 1), 0)  # of DNA there are four words
        if top_k < options.top_k:
            self.host.say(f"{len(eligible)} words can be neighbors: k is {top_k}")
        side = " (joined dictionary: those of the target side)" if on_target_side else ""
        self.host.say(f"{len(eligible)} of {len(batch.dictionary)} words are eligible{side}")
        return self.teacher_class(
            candidates=options.candidates,
            top_k=top_k,
            similarity=options.similarity,
            sigma=options.sigma,
            sigma_scale=options.sigma_scale,
            max_mass=options.max_mass,
            eligible=torch.from_numpy(eligible).to(batch.weight_matrix.device),
        )


class _FileSource(Source):
    """Words from a file in which every sentence of the training text has its place."""

    needs_text = True

    def layout(self) -> TextLayout:
        """Return where the sentences of the training text are."""
        try:
            return self.host.layout()
        except ValueError as error:
            raise ValueError(
                f"--self-kd-candidates is {self.options.candidates}; allowed: neighbors, "
                f"prediction, both, since {error}"
            ) from error

    def file(self) -> WordFile:
        """Return the open file."""
        raise NotImplementedError

    def read(self, batch: Batch, text: Text) -> SoftTarget:
        """Return the words of a batch."""
        raise NotImplementedError

    def expect(self, text: Text) -> None:
        """Refuse sentences that are not those of the file, and have the others read meanwhile."""
        check_sentences(self.file(), *text)
        self.file().expect(text.sentences)

    def targets(self, batch: Batch) -> Optional[SoftTarget]:
        """Return the words of a batch; None for a dummy one."""
        if batch.weight == 0 or batch.text is None:
            return None
        return _padded(self.read(batch, batch.text), len(batch.target))


def _padded(soft: SoftTarget, positions: int) -> SoftTarget:
    """Return it with more positions at the end, without words: rows that fill up a batch."""
    more = positions - len(soft.ids)
    if not more:
        return soft
    ids, weights, share = (
        None if part is None else torch.cat([part, part.new_zeros(more, *part.shape[1:])])
        for part in soft
    )
    assert ids is not None
    assert weights is not None
    return SoftTarget(ids, weights, share)


class PastSource(_FileSource):
    """What the model itself gave to each position when it last saw the sentence."""

    notes = True
    #: What keeps it.
    past_class: ClassVar[Type[PastPredictions]] = PastPredictions

    def __init__(self, options: SelfKDOptions, host: Host) -> None:
        super().__init__(options, host)
        self._past: Optional[PastPredictions] = None

    @property
    def past(self) -> PastPredictions:
        """What is kept, once it is open."""
        assert self._past is not None
        return self._past

    def schedule(
        self, length: Optional[TrainingLength], start: Optional[int] = None
    ) -> Tuple[int, int]:
        """Grow through all of the training; before a sentence was seen nothing is learnt of it."""
        if length is None or length.updates is None:
            return UNKNOWN
        start = start or 0
        return start, max(length.updates - start, 0)

    def open(self, num_updates: int) -> None:
        """Open the file at the first batch: only then all processes are there, and the text."""
        if self._past is not None or self.options.weight == 0:
            return
        path = self.options.past_file
        place = self.host.place("self_kd_past.bin") if path is None else Path(path)
        if self.host.shards() != 1:
            raise ValueError(
                "--self-kd-candidates is past, and the training data is in shards, so that every "
                "epoch has another text; allowed: neighbors, prediction, both, stored"
            )
        machine, first = self.host.machine()
        if machine:
            # A network's file system would not keep the memory of two machines the same.
            place = place.with_name(f"{place.stem}.{machine}{place.suffix}")
        opened = functools.partial(
            self.past_class,
            place,
            self.layout(),
            self.options.top_k,
            num_updates,
            self.host.skip,
            self.host.say,
            first,
        )
        # None writes before those that guard a file have dropped what is of no use.
        self._past = self.host.first_alone(first, opened)
        atexit.register(self._past.flush)  # what is still being copied from a GPU

    def file(self) -> WordFile:
        """Return the open file."""
        return self.past.file

    def read(self, batch: Batch, text: Text) -> SoftTarget:
        """Return what was recorded, as far as it was right."""
        device = batch.target.device
        soft = self.past.read(text.sentences, batch.width, batch.num_updates, device)
        return self.trust(soft, batch.target[: len(soft.ids)])

    def trust(self, soft: SoftTarget, target: Tensor) -> SoftTarget:
        """Say how far the past is to be believed at every position."""
        return soft.trusted(target)

    def note(self, batch: Batch, top: TopWords) -> None:
        """Record what the model gives now."""
        if batch.text is not None:
            sentences = batch.text.sentences
            positions = len(sentences) * max(batch.width - self.host.skip, 0)
            top = TopWords(*(x[:positions] for x in top))
            self.past.write(sentences, batch.width, top, batch.num_updates)


class StoredSource(_FileSource):
    """What finished models give to each position: `fairseq_skd.stored`."""

    def __init__(self, options: SelfKDOptions, host: Host) -> None:
        super().__init__(options, host)
        self._teachers: List[StoredTargets] = []
        self._data: Any = None  # the text that the teacher below belongs to
        self._teacher: Optional[StoredTargets] = None

    @property
    def teachers(self) -> List[StoredTargets]:
        """The files, in the order in which they were given; opened when they are asked for."""
        if not self._teachers:
            names = str(self.options.teacher).split(":")
            self._teachers = [StoredTargets(name) for name in names]
        return self._teachers

    def check_words(self, count: int) -> None:
        """Whatever the file holds is right."""

    def schedule(
        self, length: Optional[TrainingLength], start: Optional[int] = None
    ) -> Tuple[int, int]:
        """Learn from the first update on: the teacher is finished."""
        return 0, 0

    def described(self) -> str:
        """Return how many models the teacher is, its words, temperature and fingerprint."""
        try:
            return "+".join(map(described, self.teachers))
        except (WordFileError, OSError):  # said at the first batch: validation does without it
            return "missing"

    def open(self, num_updates: int) -> None:
        """Take the file that belongs to the text that is loaded, or refuse."""
        if self.options.weight == 0:
            return
        data = self.host.data()
        if self._teacher is not None and data is self._data:
            return
        files, shards = self.teachers, self.host.shards()
        if len(files) != shards:
            raise ValueError(
                f"--self-kd-teacher names {len(files)} files, and the training data has {shards} "
                "parts; a file for each is needed, with colons between. Several teachers go into "
                "one file: fairseq-skd teach --path A.pt:B.pt"
            )
        layout = self.layout()
        for teacher in files:
            if teacher.belongs_to(layout):
                self._teacher, self._data = teacher, data
                return
        head, words = files[0].file.head, int(layout.lengths.sum())
        found, ours = (head["sentences"], head["positions"]), (len(layout.lengths), words)
        differs = (
            "it has as many sentences and words as the training text, but others"
            if found == ours
            else f"it has {found[0]} sentences of {found[1]} words, and the training text has "
            f"{ours[0]} of {ours[1]}"
        )
        raise ValueError(
            f"--self-kd-teacher is {self.options.teacher}, which was made for another text, "
            f"dictionary or length of blocks: {differs}. fairseq-skd teach makes one from this data"
        )

    def file(self) -> WordFile:
        """Return the open file."""
        assert self._teacher is not None
        return self._teacher.file

    def read(self, batch: Batch, text: Text) -> SoftTarget:
        """Return the teacher's words."""
        assert self._teacher is not None
        device = batch.target.device
        return self._teacher.read(text.sentences, batch.width, device, self.host.skip)


def described(teacher: StoredTargets) -> str:
    """Return a teacher's models, words, temperature and fingerprint: ``2x10@1#1f0c33aa``.

    Of words that are partly sampled, ``2x5+5@1#1f0c33aa``.
    """
    told = teacher.file.head.get("teacher") or {}
    checkpoints, temperature = told.get("checkpoints"), told.get("temperature", 1)
    models = len(checkpoints) if isinstance(checkpoints, list) else "?"
    if isinstance(temperature, float):
        temperature = f"{temperature:g}"
    words, sampled = str(teacher.top_k), told.get("sampled")
    if isinstance(sampled, int):
        words = f"{teacher.top_k - sampled}+{sampled}"
    return f"{models}x{words}@{temperature}#{teacher.fingerprint}"


#: By the name of the candidates.
SOURCES: Dict[str, Type[Source]] = {
    "neighbors": NeighborsSource,
    "prediction": NeighborsSource,
    "both": NeighborsSource,
    "past": PastSource,
    "stored": StoredSource,
}
