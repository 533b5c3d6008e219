"""The likeliest words of several models together, without the logits of all positions.

Of an ensemble that is the mean of the models' probabilities, as fairseq's generator has it. Logits
exist for one block of positions at a time (`blocks`): at N = 4,096 and V = 32,768 all of them would
take 512 MiB a model.

The likeliest words alone say nothing of the others, and what they leave, given to all words alike,
is far from what the models think where it is much: in a language model 40 %. So some of the words
may be sampled from the rest instead, each for an equal part of it. What is kept is then, on average
over positions, what the models give: after Anshumann et al., "Sparse Logit Sampling" (ACL 2025,
arXiv 2503.16870), who sample all of the words.
"""

from typing import NamedTuple, Optional, Sequence, Tuple

import torch
from torch import Tensor

from fairseq_skd.blocks import GROUP, block_positions, largest_of, maxima_of, members_of, padded

__all__ = ["Likeliest", "likeliest_words"]


class Likeliest(NamedTuple):
    """What models give to every position.

    Attributes
    ----------
    ids : Tensor
        int64, N x k: the likeliest words first, then those that are sampled.
    probabilities : Tensor
        float32, N x k: of a sampled word its part of the rest, 0 where it stands already.
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
    sampled: int = 0,
    offsets: Optional[Tensor] = None,
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
        int64, N. At padding any other number, such as -100; ``of_target`` says nothing there.
    top_k : int
        k, 1 to V.
    temperature : float
        By which logits are divided, > 0.
    block_bytes : int, optional
        See `block_positions`.
    sampled : int
        So many of the k are sampled from the rest, 0 to k - 1.
    offsets : Tensor, optional
        Floating point, N, 0 to 1: to sample with, evenly spread. Default: random numbers.

    Raises
    ------
    ValueError
        If ``top_k`` or ``sampled`` is out of its range.

    Examples
    --------
    >>> logits = torch.tensor([[2.0, 1.0, 1.0, 1.0, 0.0]])
    >>> target = torch.tensor([0])
    >>> found = likeliest_words([logits], [None], target, top_k=2, sampled=1)
    >>> found.ids[0, 0].item(), found.probabilities.sum().item()  # the rest is another word's
    (0, 1.0)
    """
    like = features[0].t() if embeddings[0] is None else embeddings[0]
    num_words = len(like)
    if not 1 <= top_k <= num_words:
        raise ValueError(f"top_k is {top_k}; allowed: 1 to {num_words}, the words there are")
    if not 0 <= sampled < top_k:
        raise ValueError(f"sampled is {sampled}; allowed: 0 to {top_k - 1}, below top_k")
    target = target.clamp(0, num_words - 1)
    if sampled and offsets is None:
        offsets = torch.rand(len(target), device=features[0].device)
    step = block_positions(features[0], like, block_bytes)
    found = []
    for start in range(0, len(target), step):
        part = slice(start, start + step)
        total = None
        for x, embedding in zip(features, embeddings):
            given = probabilities_of(x[part], embedding, temperature)
            total = given if total is None else total.add_(given)
        assert total is not None
        of_target = total.t().gather(1, target[part].unsqueeze(1)).squeeze(1)
        ids, values = largest_of(total, maxima_of(total), top_k - sampled)
        if sampled:
            assert offsets is not None
            total.t().scatter_(1, ids, 0)
            more = sampled_from(total.clamp_(min=0), sampled, offsets[part])
            ids, values = (torch.cat(pair, 1) for pair in zip((ids, values), more))
        # Of fewer possible words than k some rows beyond the vocabulary may be found, with 0.
        found.append((ids.clamp_(max=num_words - 1), values.clamp_(min=0), of_target))
    if not found:
        empty = features[0].new_zeros(0, dtype=torch.float32)
        shape = 0, top_k
        return Likeliest(target.new_zeros(shape), empty.view(shape), empty)
    ids, values, of_target = (torch.cat(parts) for parts in zip(*found))
    return Likeliest(ids, values / len(features), of_target / len(features))


def sampled_from(rest: Tensor, count: int, offsets: Tensor) -> Tuple[Tensor, Tensor]:
    """Sample words as often as they are likely, and share what all have among them.

    Systematic sampling: the words lie side by side, each as wide as it is likely, and one is taken
    at every `count`-th part of the whole, from an offset on. So a word is sampled as often as is
    expected or once more or less, and in a dictionary by frequency frequent and rare ones each have
    their turn. (Madow, "On the Theory of Systematic Sampling, II", 1949.) In two levels as in
    `largest_of`: sums of groups of words, and of the words of the group that is met.

    Parameters
    ----------
    rest : Tensor
        Floating point, words x positions, not negative, in whole groups.
    count : int
        m, of a position.
    offsets : Tensor
        Positions, 0 to 1.

    Returns
    -------
    ids, shares : Tensor
        Positions x m: rows of ``rest``, ascending, and what they have of its sum. A row that is
        sampled again has all of it where it stands first, then 0.
    """
    # No rounding leads to a word without a part, beyond the last one that has something or before
    # the first: there are such words in every group, the likeliest among them.
    below_1 = 1 - 2**-20
    groups = rest.unflatten(0, (-1, GROUP)).sum(1).t().contiguous()
    upto = groups.cumsum(1)
    mass = upto[:, -1:]
    points = (torch.arange(count, device=rest.device) + offsets.unsqueeze(1)) * (mass / count)
    points = torch.minimum(points, mass * below_1)
    group = torch.searchsorted(upto, points, right=True).clamp_(max=groups.size(1) - 1)
    points = (points - (upto - groups).gather(1, group)).clamp_(min=0)
    members = members_of(group)
    within = rest.t().gather(1, members).unflatten(1, (-1, GROUP)).cumsum(2)
    points = torch.minimum(points.unsqueeze(2), within[..., -1:] * below_1)
    place = torch.searchsorted(within, points, right=True).clamp_(max=GROUP - 1)
    ids = group * GROUP + place.squeeze(2)
    same = ids.unsqueeze(2) == ids.unsqueeze(1)
    again = same.tril(-1).any(2)
    return ids, (same.sum(2) * (mass / count)).masked_fill(again, 0)


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
