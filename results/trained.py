"""A trained model and what it predicts, for the scripts that look into one."""

from pathlib import Path
from typing import Any, Iterator, NamedTuple, Tuple

import torch
from fairseq import checkpoint_utils, utils
from torch import Tensor

import fairseq_skd  # noqa: F401  (lets fairseq's checkpoints be loaded)


class Trained(NamedTuple):
    """A model with its task and the configuration of its training."""

    model: Any
    task: Any
    config: Any


def load(checkpoint: Path, data: str) -> Trained:
    """Load a translation or language model.

    Parameters
    ----------
    checkpoint : Path
        Of fairseq's.
    data : str
        Folder made by fairseq-preprocess.
    """
    if not checkpoint.exists():
        raise SystemExit(f"there is no checkpoint {checkpoint}")
    models, config, task = checkpoint_utils.load_model_ensemble_and_task(
        [str(checkpoint)], arg_overrides={"data": data}
    )
    model = models[0].eval()
    return Trained(model.cuda() if torch.cuda.is_available() else model, task, config)


def predictions(trained: Trained, subset: str) -> Iterator[Tuple[Tensor, Tensor]]:
    """Predict every target word of a text from the true words before it, without gradient.

    Yields
    ------
    lprobs : Tensor
        float32, N x V: log-probabilities of a batch of words.
    target : Tensor
        int64, N: the true words.
    """
    model, task, _ = trained
    task.load_dataset(subset)
    # Without a multiple of 1 fairseq 0.12.3 leaves sentences out.
    batches = task.get_batch_iterator(
        task.dataset(subset),
        max_tokens=2048,
        max_positions=utils.resolve_max_positions(task.max_positions(), model.max_positions()),
        ignore_invalid_inputs=True,
        required_batch_size_multiple=1,
    ).next_epoch_itr(shuffle=False)
    for batch in batches:
        if torch.cuda.is_available():
            batch = utils.move_to_cuda(batch)
        with torch.no_grad():
            output = model(**batch["net_input"])
            target = model.get_targets(batch, output)
            kept = target.ne(task.target_dictionary.pad())
            lprobs = model.get_normalized_probs(output, log_probs=True).float()[kept]
        yield lprobs, target[kept]
