"""What fairseq and torch do not offer, each with the reason and what would make it unnecessary.

Tried with ve-fairseq 0.12.3 and fairseq 0.12.2, and with torch as docs/reliability.md says.
"""

import argparse
import codecs
import contextlib
import functools
import hashlib
import logging
import os
import re
from platform import node
from typing import Any, Callable, Iterator, List, NamedTuple, Optional, Tuple

import numpy as np
import torch
from fairseq import utils
from fairseq.data import BucketPadLengthDataset, Dictionary, LanguagePairDataset, MonolingualDataset
from fairseq.data.indexed_dataset import MMapIndexedDataset
from fairseq.models import BaseFairseqModel, FairseqLanguageModel
from fairseq.modules.transformer_layer import TransformerEncoderLayerBase
from fairseq.trainer import Trainer
from torch.torch_version import TorchVersion

from fairseq_skd.checkpoints import faults_of_the_loader
from fairseq_skd.schedule import TrainingLength
from fairseq_skd.word_file import TextLayout

__all__ = [
    "allow_fairseqs_checkpoints",
    "do_without_the_fused_encoder_layer",
    "eligible_words",
    "first_alone",
    "machine",
    "ordinary_words",
    "remember_words_from_files",
    "settings_of",
    "shards",
    "target_side_words",
    "tell_criteria_of_updates",
    "text_layout",
    "training_length",
    "training_set",
    "unwrap",
]

logger = logging.getLogger(__name__)

_FILLER = re.compile(r"madeupword\d{4,}")


def allow_fairseqs_checkpoints() -> None:
    """Let torch's safe loader read what fairseq puts into a checkpoint.

    An `argparse.Namespace` always, and with ``--eval-bleu`` the counts of n-grams as numpy arrays
    and scalars, which hold numbers alone. torch >= 2.6 loads with ``weights_only=True`` and
    refuses classes that it does not know; an older one is told to do so too. That one can be
    tricked all the same, and whoever uses it is told. Unnecessary once fairseq passes
    ``weights_only`` itself or stops saving them.
    """
    numbers = [np.int64(0), np.float64(0)]
    # Functions that numpy keeps under other names from version to version; an object knows its own.
    makers: List[Any] = [value.__reduce__()[0] for value in (np.zeros(0), *numbers)]
    dtypes = [type(value.dtype) for value in numbers]
    classes = [argparse.Namespace, np.ndarray, np.dtype, *dtypes]
    torch.serialization.add_safe_globals([*makers, *classes])
    # The names in a checkpoint that was written with numpy 1, and with numpy 2.
    modules = ("numpy.core.multiarray", "numpy._core.multiarray")
    named: List[Any] = [(maker, module) for maker in makers for module in modules]
    if TorchVersion(torch.__version__) < "2.6":
        logger.warning(
            f"torch {torch.__version__} has no safe loader ({faults_of_the_loader()[0]}): load "
            "checkpoints of people whom you trust, or use torch 2.10 or newer (Python 3.10 on)"
        )
        # It loads whatever a file asks for, and knows a function by the name that it has.
        os.environ.setdefault("TORCH_FORCE_WEIGHTS_ONLY_LOAD", "1")
        torch.serialization.add_safe_globals([_named_as_of(*each) for each in named])
        # In pickles the bytes of a number; torch 2.5 and newer know it.
        torch.serialization.add_safe_globals([codecs.encode])
    else:
        torch.serialization.add_safe_globals([(f, f"{m}.{f.__name__}") for f, m in named])


def _named_as_of(function: Any, module: str) -> Any:
    def named(*args: Any) -> Any:
        return function(*args)

    named.__name__, named.__module__ = function.__name__, module
    return named


def tell_criteria_of_updates() -> None:
    """Make fairseq's trainer tell a criterion of ours that an update begins, and of what text.

    A criterion is told nothing, and counting its own calls would be wrong under ``--update-freq``,
    after a resume and for dummy batches. Most tasks call ``model.set_num_updates``, some never do
    (``multilingual_translation``, ``semisupervised_translation``), so the trainer's own count is
    the one to follow. Unnecessary once fairseq passes the update number to criteria.
    """
    original = Trainer.train_step
    if hasattr(original, "tells_criteria"):  # wrapped already, and so by fairseq itself
        return

    @functools.wraps(original)
    def train_step(self: Trainer, samples: List[Any], *args: Any, **kwargs: Any) -> Any:
        criterion = self.get_criterion()
        if hasattr(criterion, "begin_update"):
            if self.is_fsdp:
                raise ValueError(
                    "--ddp-backend is fully_sharded; allowed with self-KD: legacy_ddp, "
                    "pytorch_ddp. Each process has a part of the output projection there, and no "
                    "table of all words"
                )
            criterion.begin_update(
                self.get_num_updates(), samples, self.cfg.checkpoint.save_dir, training_length(self)
            )
        return original(self, samples, *args, **kwargs)

    train_step.tells_criteria = True  # type: ignore[attr-defined]
    Trainer.train_step = train_step
    get_train_iterator = Trainer.get_train_iterator

    @functools.wraps(get_train_iterator)
    def remembering(self: Trainer, *args: Any, **kwargs: Any) -> Any:
        self.task.self_kd_train_subset = self.cfg.dataset.train_subset
        self.self_kd_iterator = get_train_iterator(self, *args, **kwargs)
        return self.self_kd_iterator

    Trainer.get_train_iterator = remembering


def training_length(trainer: Any) -> TrainingLength:
    """Return how long a training will be: by ``--max-update``, else by ``--max-epoch``.

    What an epoch has is known of the first one that is loaded (of a resumed run the present one).
    """
    known = getattr(trainer, "self_kd_length", None)
    if known is not None:
        return known
    options = trainer.cfg.optimization
    warmup = getattr(trainer.cfg.lr_scheduler, "warmup_updates", 0) or 0
    updates, source = None, "neither --max-update nor --max-epoch"
    if options.max_update:
        updates, source = int(options.max_update), f"--max-update {options.max_update}"
    iterator = getattr(trainer, "self_kd_iterator", None)
    if options.max_epoch and iterator is not None:
        frequencies = list(options.update_freq)
        with contextlib.suppress(NotImplementedError):  # of data that streams
            batches = len(iterator)
            by_epochs = sum(
                -(-batches // frequencies[min(epoch, len(frequencies) - 1)])
                for epoch in range(int(options.max_epoch))
            )
            if updates is None or by_epochs < updates:
                updates, source = by_epochs, f"--max-epoch {options.max_epoch}"
    alone = isinstance(unwrap(trainer.model), FairseqLanguageModel)
    trainer.self_kd_length = TrainingLength(updates, int(warmup), source, alone)
    return trainer.self_kd_length


def remember_words_from_files() -> None:
    """Make fairseq's dictionaries remember how many of their words came from a file.

    What a task adds afterwards are symbols of its own: language tags, masks. Unnecessary once a
    Dictionary tells them from words.
    """
    original = Dictionary.add_from_file
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def add_from_file(self: Dictionary, f: Any) -> None:
        original(self, f)
        self.self_kd_words_end = len(self)

    Dictionary.add_from_file = add_from_file


def do_without_the_fused_encoder_layer() -> None:
    """Keep fairseq 0.12.2 from a shortcut in evaluation that torch 2.0 and newer refuse.

    It gives PyTorch's fused encoder layer a mask without its kind ("Mask Type should be defined"),
    so that no Transformer encoder can translate a padded batch. Later versions do not have it.
    """
    original = TransformerEncoderLayerBase.__init__
    if hasattr(original, "__wrapped__"):
        return

    @functools.wraps(original)
    def __init__(self: TransformerEncoderLayerBase, *args: Any, **kwargs: Any) -> None:
        original(self, *args, **kwargs)
        if hasattr(self, "can_use_fastpath"):
            self.can_use_fastpath = False

    TransformerEncoderLayerBase.__init__ = __init__


def ordinary_words(dictionary: Any) -> np.ndarray:
    """Return the ids of a fairseq dictionary that are words of the text, ascending, int64.

    All but padding, beginning and end of sentence, unknown, the special symbols with which the
    dictionary was made, those that a task added after it was read (language tags, ``<mask>``), and
    the ``madeupword`` fillers, with a count of 0, that fairseq-preprocess adds.
    """
    special = {dictionary.pad(), dictionary.bos(), dictionary.eos(), dictionary.unk()}
    begin = getattr(dictionary, "nspecial", 0)
    end = getattr(dictionary, "self_kd_words_end", len(dictionary))
    return np.array(
        [
            i
            for i in range(begin, end)
            if i not in special
            and not (dictionary.count[i] == 0 and _FILLER.fullmatch(dictionary.symbols[i]))
        ],
        dtype=np.int64,
    )


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
    pairs = training_set(task)
    if not isinstance(pairs, LanguagePairDataset) or pairs.src_dict != pairs.tgt_dict:
        return None
    if shards(task) != 1:
        return None
    counts = np.zeros(len(pairs.tgt_dict), dtype=np.int64)
    for indexed in _indexed_files(pairs.tgt):
        if indexed is None:
            return None
        tokens = np.frombuffer(indexed._bin_buffer, dtype=indexed._index.dtype)
        for start in range(0, len(tokens), 2**24):  # 128 MiB as bincount's int64
            counts += np.bincount(tokens[start : start + 2**24], minlength=len(counts))
    return np.flatnonzero(counts)


def training_set(task: Any) -> Any:
    """Return the training set that is loaded, None if there is none."""
    # Which one it is only the trainer knows: see `tell_criteria_of_updates`.
    return getattr(task, "datasets", {}).get(getattr(task, "self_kd_train_subset", "train"))


def eligible_words(dictionary: Any, task: Any) -> Tuple[np.ndarray, bool]:
    """Return the ids of the words that may get probability, ascending, int64.

    `ordinary_words`, and of a joined dictionary those of the target side; and whether that is so.
    """
    words, on_target_side = ordinary_words(dictionary), target_side_words(task)
    if on_target_side is None:
        return words, False
    return np.intersect1d(words, on_target_side), True


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


def settings_of(task: Any) -> Any:
    """Return a task's configuration, which those of fairseq's older kind keep as ``args``."""
    settings = getattr(task, "cfg", None)
    return getattr(task, "args", None) if settings is None else settings


def shards(task: Any) -> int:
    """Return in how many parts the data is, of which every epoch has another one."""
    return len(utils.split_paths(getattr(settings_of(task), "data", None) or ""))


def text_layout(task: Any) -> TextLayout:
    """Return the lengths of the training text that is loaded, and a fingerprint of it.

    What only pads batches does not count: ``--num-batch-buckets``, ``--required-seq-len-multiple``.

    Parameters
    ----------
    task : FairseqTask
        With its training set loaded.

    Raises
    ------
    ValueError
        If a sentence has no place of its own, or words are not where it has them: the reason.
    """
    dataset = training_set(task)
    reason = None
    if isinstance(dataset, LanguagePairDataset):
        lengths, text, dictionary = dataset.tgt_sizes, dataset.tgt, dataset.tgt_dict
        if isinstance(text, BucketPadLengthDataset):
            lengths, text = text.dataset.sizes, text.dataset
        if dataset.left_pad_target:
            reason = "--left-pad-target is on, and it must be off"
    elif isinstance(dataset, MonolingualDataset):
        lengths, text, dictionary = dataset.sizes, dataset.dataset, dataset.tgt_vocab
        if getattr(dataset, "add_bos_token", False):
            reason = "--add-bos-token is on, which moves the words"
    else:
        reason = f"the training data is a {type(dataset).__name__}"
    if reason is not None:
        raise ValueError(f"{reason}; pairs of sentences or blocks of one text are needed")
    digest = hashlib.sha256(np.ascontiguousarray(lengths, dtype=np.int64).tobytes())
    digest.update("\n".join(dictionary.symbols).encode())
    for index in np.linspace(0, len(lengths) - 1, min(len(lengths), 1000), dtype=np.int64):
        part = text[int(index)]
        part = part[1] if isinstance(part, tuple) else part
        digest.update(part.numpy().tobytes())
    return TextLayout(np.asarray(lengths, dtype=np.int64), digest.hexdigest())


class Machine(NamedTuple):
    """Where a process of a run is.

    Attributes
    ----------
    name : str
        The machine's, if the run is on several; "" if it is on one.
    first : bool
        Whether the process is the first one of the run on this machine.
    """

    name: str
    first: bool


def machine() -> Machine:
    """Return where this process is; to be called by all processes of a distributed run at once."""
    if not _distributed():
        return Machine("", True)
    names = _gathered(node())
    first = names.index(node()) == torch.distributed.get_rank()
    return Machine(node() if len(set(names)) > 1 else "", first)


def first_alone(first: bool, action: Callable[[], Any]) -> Any:
    """Return what a function gives, called by the first processes, then by the others.

    To be called by all processes of a distributed run at once. If it fails in a first process it
    is not called in the others: all of them raise, so that none waits for one that has ended.

    Raises
    ------
    RuntimeError
        In other processes than the one in which it failed, with its message.
    """
    if not _distributed():
        return action()
    result, error = None, None
    if first:
        try:
            result = action()
        except Exception as problem:
            error = problem
    messages = _gathered("" if error is None else str(error) or repr(error))
    if error is not None:
        raise error
    for message in filter(None, messages):
        raise RuntimeError(message)
    return result if first else action()


def _distributed() -> bool:
    return torch.distributed.is_available() and torch.distributed.is_initialized()


def _gathered(value: str) -> List[str]:
    """Return what every process of a distributed run has passed, by rank."""
    values: List[Any] = [None] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(values, value)
    return values
