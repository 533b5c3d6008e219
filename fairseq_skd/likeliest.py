"""The likeliest words of several models together, without the logits of all positions.

Of an ensemble that is the mean of the models' probabilities, as fairseq's generator has it. Logits
exist for one block of positions at a time (`blocks`): at N = 4,096 and V = 32,768 all of them would
take 512 MiB a model.
"""

from typing import NamedTuple, Optional, Sequence

import torch
from torch import Tensor

from fairseq_skd.blocks import block_positions, largest_of, maxima_of, padded

__all__ = ["Likeliest", "likeliest_words"]


class Likeliest(NamedTuple):
    """What models give to every position.

    Attributes
    ----------
    ids : Tensor
        int64, N x k: the likeliest words first.
    probabilities : Tensor
        float32, N x k.
    of_target : Tensor
        float32, N: probability of the true word.
    """

    ids: Tensor
    probabilities: Tensor
    of_target: Tensor


@torch.no_grad()
def likeliest_words(
    features: Sequence[Tensor],
    embeddings: Sequence[Optional[Tensor]],
    target: Tensor,
    top_k: int,
    temperature: float = 1.0,
    block_bytes: Optional[int] = None,
) -> Likeliest:
    """Return the words to which the mean of models' probabilities gives most.

    Parameters
    ----------
    features : sequence of Tensor
        Of each model, N x d: what its output projection is applied to. The d may differ.
    embeddings : sequence of Tensor or None
        Of each model, the output projection W, V x d, of the features' dtype and device. None: the
        features are its logits, N x V.
    target : Tensor
        int64, N.
    top_k : int
        k, 1 to V.
    temperature : float
        By which logits are divided, > 0.
    block_bytes : int, optional
        See `block_positions`.
    """
    like = features[0].t() if embeddings[0] is None else embeddings[0]
    num_words, step = len(like), block_positions(features[0], like, block_bytes)
    found = []
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        total = None
        for x, embedding in zip(features, embeddings):
            given = probabilities_of(x[part], embedding, temperature)
            total = given if total is None else total.add_(given)
        assert total is not None
        of_target = total.t().gather(1, target[part].unsqueeze(1)).squeeze(1)
        ids, values = largest_of(total, maxima_of(total), top_k)
        # Of fewer possible words than k some rows beyond the vocabulary may be found, with 0.
        found.append((ids.clamp_(max=num_words - 1), values.clamp_(min=0), of_target))
    if not found:
        empty = features[0].new_zeros(0, dtype=torch.float32)
        shape = 0, top_k
        return Likeliest(target.new_zeros(shape), empty.view(shape), empty)
    ids, values, of_target = (torch.cat(parts) for parts in zip(*found))
    return Likeliest(ids, values / len(features), of_target / len(features))


def probabilities_of(features: Tensor, embedding: Optional[Tensor], temperature: float) -> Tensor:
    """Return a block of probabilities, float32, words x positions; below all words -1."""
    num_words = features.size(1) if embedding is None else len(embedding)
    shape = padded(num_words), len(features)
    # The products are faster words x positions on a CPU (`linear_loss`).
    on_cpu = features.device.type == "cpu"
    block = features.new_empty(shape if on_cpu else shape[::-1])
    block = block if on_cpu else block.t()
    if embedding is None:
        block[:num_words] = features.t()
    else:
        torch.mm(embedding, features.t(), out=block[:num_words])
    block = block.float()
    block[num_words:] = -1
    logits = block[:num_words]
    if temperature != 1:
        logits.div_(temperature)
    logits.sub_(logits.amax(0)).exp_()
    logits.div_(logits.sum(0))
    return block
