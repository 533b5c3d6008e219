"""A trained model, its dictionary and its settings, and what it predicts."""

from argparse import Namespace
from pathlib import Path
from typing import Any, Callable, Iterator, NamedTuple, Optional, Sequence, Tuple

import torch
from fairseq import checkpoint_utils, utils
from torch import Tensor

from fairseq_skd import compatibility
from fairseq_skd.checkpoints import read_checkpoint
from fairseq_skd.commands import CommandError
from fairseq_skd.commands.output import progress, waiting
from fairseq_skd.criterion import options_of
from fairseq_skd.options import SelfKDOptions
from fairseq_skd.output_projection import (
    OutputProjection,
    UnsupportedModelError,
    find_output_projection,
)

__all__ = ["Trained", "data_of", "load", "readable", "word_ids"]


class Trained(NamedTuple):
    """A model with its task and the configuration of its training.

    Attributes
    ----------
    model, task, config : object
        fairseq's. The model is in evaluation mode, on the GPU if there is one.
    path : Path
        Of the checkpoint.
    """

    model: Any
    task: Any
    config: Any
    path: Path

    @property
    def projection(self) -> OutputProjection:
        """The output projection.

        Raises
        ------
        CommandError
            If the model has none that self-distillation could read.
        """
        try:
            return find_output_projection(self.model, self.task.target_dictionary)
        except UnsupportedModelError as error:
            raise CommandError(f"{self.path}: {error}") from error

    @property
    def options(self) -> Optional[SelfKDOptions]:
        """The settings of its self-distillation; None if it was trained with another criterion."""
        criterion = getattr(self.config, "criterion", None)
        if not str(getattr(criterion, "_name", "")).startswith("self_kd"):
            return None
        return options_of(criterion)

    @property
    def label_smoothing(self) -> float:
        """Of its training; 0 for a criterion that has none."""
        return float(getattr(self.config.criterion, "label_smoothing", 0) or 0)

    def dataset(self, subset: str, training: bool = False) -> Any:
        """Load a text, with ``training`` in all its parts (train, train1, ...) as a training does.

        Raises
        ------
        CommandError
            If the data has no such text.
        """
        try:
            self.task.load_dataset(subset, combine=training)
        except FileNotFoundError as error:
            folder = compatibility.settings_of(self.task).data
            raise CommandError(
                f"{folder} has no text {subset!r} ({error}); pass the folder that "
                "fairseq-preprocess has made, and the name of a text in it"
            ) from error
        return self.task.dataset(subset)

    def eligible(self) -> Tuple[Tensor, str]:
        """Return the ids of the words that may get probability, and which these are."""
        which = "all of the dictionary but special symbols"
        try:
            self.task.load_dataset("train", combine=True)
        except FileNotFoundError:
            which += " (no training text is there to tell the target's side)"
        words, on_target_side = compatibility.eligible_words(self.projection.dictionary, self.task)
        if on_target_side:
            which = "those of the training text's target side"
        return torch.from_numpy(words), which

    def predictions(self, subset: str) -> Iterator[Tuple[Tensor, Tensor]]:
        """Predict every target word of a text from the true words before it, without gradient.

        A language model reads blocks of the length that it was trained with, each without the
        words before it.

        Yields
        ------
        lprobs : Tensor
            float32, N x V: log-probabilities of a batch of words.
        target : Tensor
            int64, N: the true words.
        """
        dataset = self.dataset(subset)
        limits = self.task.max_positions(), self.model.max_positions()
        # Half a GiB of log-probabilities, or those of the longest sentence.
        longest = max(map(dataset.num_tokens, range(len(dataset))), default=1)
        most = max(int(longest), min(2048, 2**27 // len(self.task.target_dictionary)))
        # Without a multiple of 1 fairseq 0.12.3 leaves sentences out.
        batches = self.task.get_batch_iterator(
            dataset,
            max_tokens=most,
            max_positions=utils.resolve_max_positions(*limits),
            ignore_invalid_inputs=True,
            required_batch_size_multiple=1,
        ).next_epoch_itr(shuffle=False)
        for batch in progress(batches, f"predicting {subset}", len(batches)):
            yield self.predict(batch)

    def predict(self, batch: Any) -> Tuple[Tensor, Tensor]:
        """Predict the target words of a batch; see `predictions`."""
        if torch.cuda.is_available():
            batch = utils.move_to_cuda(batch)
        with torch.no_grad():
            output = self.model(**batch["net_input"])
            target = self.model.get_targets(batch, output)
            kept = target.ne(self.task.target_dictionary.pad())
            lprobs = self.model.get_normalized_probs(output, log_probs=True).float()[kept]
        return lprobs, target[kept]


def load(
    checkpoint: Path,
    data: Optional[Path] = None,
    user_dir: Optional[Path] = None,
    on_gpu: bool = True,
) -> Trained:
    """Load a translation or language model, by torch's safe loader.

    Parameters
    ----------
    checkpoint : Path
        Of fairseq's, trained with the plugin or without.
    data : Path, optional
        Folder made by fairseq-preprocess, with the dictionary. Default: that of the training.
    user_dir : Path, optional
        Of another plugin that the model needs.
    on_gpu : bool
        Put the model on the GPU if there is one.

    Raises
    ------
    CheckpointError
        If it is no checkpoint.
    CommandError
        If it cannot be loaded: what is missing, or does not fit.
    """
    state = read_checkpoint(checkpoint, mmap=True)
    folder = data or data_of(state)
    if folder is None or not list(folder.glob("dict*.txt")):
        raise CommandError(
            f"{folder} holds no dictionary (dict.txt, dict.LANGUAGE.txt); pass the folder "
            f"that fairseq-preprocess made for {checkpoint}"
        )
    del state
    utils.import_user_module(Namespace(user_dir=user_dir and str(user_dir)))
    try:
        with waiting(f"loading {checkpoint}"):
            models, config, task = checkpoint_utils.load_model_ensemble_and_task(
                [str(checkpoint)], arg_overrides={"data": str(folder)}
            )
    except RuntimeError as error:
        if "size mismatch" in str(error):
            raise CommandError(
                f"the dictionary in {folder} has another size than the words of {checkpoint}; "
                "it needs the folder that it was trained with"
            ) from error
        raise CommandError(f"{checkpoint} cannot be loaded: {error}") from error
    except Exception as error:  # whatever fairseq meets: another plugin's task, a file that is gone
        raise CommandError(
            f"{checkpoint} cannot be loaded: {type(error).__name__}: {error}"
        ) from error
    model = models[0].eval()
    on_gpu = on_gpu and torch.cuda.is_available()
    return Trained(model.cuda() if on_gpu else model, task, config, checkpoint)


def data_of(state: Any) -> Optional[Path]:
    """Return the folder of the data that a checkpoint names."""
    config = state.get("cfg")
    task = config.get("task") if isinstance(config, dict) else state.get("args")
    found = task.get("data") if isinstance(task, dict) else getattr(task, "data", None)
    return Path(utils.split_paths(found)[0]) if found else None


def readable(dictionary: Any) -> Callable[[int], str]:
    """Return what shows a word of a dictionary to a person.

    Pieces by sentencepiece begin with an ellipsis if they go on with a word, and those by BPE end
    with one if the word goes on after them.
    """
    symbols = dictionary.symbols
    pieces = any(symbol.startswith("\u2581") for symbol in symbols)
    bpe = any(symbol.endswith("@@") for symbol in symbols)
    special = {dictionary.pad(), dictionary.bos(), dictionary.eos(), dictionary.unk()}

    def show(index: int) -> str:
        symbol: str = dictionary[index]
        if index in special:
            return symbol
        if pieces:
            return symbol[1:] or "\u2423" if symbol.startswith("\u2581") else f"\u2026{symbol}"
        if bpe and symbol.endswith("@@"):
            return f"{symbol[:-2]}\u2026"
        return symbol

    return show


def word_ids(dictionary: Any, words: Sequence[str]) -> Tensor:
    """Return the ids of words as a person writes them; int64.

    A piece that begins a word needs no ``\u2581``, and one that ends in ``@@`` can go without. What
    `readable` shows is understood too.

    Raises
    ------
    CommandError
        For words that are not in the dictionary.
    """
    ids, unknown = [], []
    for word in words:
        if word.startswith("\u2026"):
            tried = [word[1:]]
        elif word.endswith("\u2026"):
            tried = [f"{word[:-1]}@@"]
        else:
            tried = [f"\u2581{word}", word, f"{word}@@"]
        forms = [form for form in tried if form in dictionary]
        if forms:
            ids.append(dictionary.index(forms[0]))
        else:
            unknown.append(word)
    if unknown:
        raise CommandError(
            f"--words: {', '.join(unknown)} not in the dictionary of {len(dictionary)} words"
        )
    return torch.tensor(ids, dtype=torch.int64)
