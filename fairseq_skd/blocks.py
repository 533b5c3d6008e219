"""Blocks of logits, words x positions: how large they are, and where their largest values are."""

from typing import Optional, Tuple

import torch
from torch import Tensor

__all__ = [
    "GROUP",
    "argmax",
    "block_positions",
    "largest_of",
    "maxima_of",
    "members_of",
    "padded",
]

# A float32 block of logits takes this much memory. On a CPU it should fit into the cache, and the C
# library keeps pieces of less than 32 MiB for the next step, where larger ones go back to the
# system and their pages are made anew. But few positions make the products slow, since all of W is
# read once a block: so it holds at least `_CPU_POSITIONS` (at V = 267,744: 163 MiB, where the
# gradient of W with d = 512 takes 523). On two cores with 32 MiB of cache and V = 10,152, blocks of
# 384 to 1,024 positions took 0.71 to 0.75 s, 160 positions 0.82 s.
_BLOCK_BYTES = {"cpu": 24 * 2**20, "cuda": 512 * 2**20}
_CPU_POSITIONS = 160

# Blocks hold multiples of this many positions: 125 made the products 1.2 times as slow as 128.
_ALIGNMENT = 32

#: Words in one group of the search for the largest logits.
GROUP = 32


def block_positions(features: Tensor, embedding: Tensor, block_bytes: Optional[int] = None) -> int:
    """Return for how many positions logits exist at a time.

    Parameters
    ----------
    features, embedding : Tensor
        N x d and V x d.
    block_bytes : int, optional
        Bound on a float32 block. Default: 24 MiB on a CPU, or 160 positions where that is more;
        elsewhere 512 MiB, or half of the float32 gradient of W where that is more.
    """
    position_bytes = 4 * len(embedding)
    if block_bytes is None:
        if features.device.type == "cpu":
            block_bytes = max(_BLOCK_BYTES["cpu"], _CPU_POSITIONS * position_bytes)
        else:
            block_bytes = max(_BLOCK_BYTES["cuda"], position_bytes * features.size(1) // 2)
    positions = block_bytes // position_bytes
    if positions > _ALIGNMENT:
        positions -= positions % _ALIGNMENT
    return max(1, min(positions, len(features)))


def padded(num_words: int) -> int:
    """Return how many rows a block has: whole groups of the search, the last ones without words."""
    return -(-num_words // GROUP) * GROUP


def maxima_of(block: Tensor) -> Tensor:
    """Return the largest value of every group of rows and column: V / 32 x B."""
    return block.unflatten(0, (-1, GROUP)).amax(1)


def argmax(block: Tensor, maxima: Tensor) -> Tensor:
    """Return the row of the largest value in every column; of equal ones the first.

    In two levels, since an argmax over rows takes 18 times as long as their maxima: the maxima of
    groups of rows, then the first of a column's best group that is equal to it. The number of
    rows is a multiple of the size of a group.
    """
    best = maxima.argmax(0)
    members = members_of(best.unsqueeze(1))
    return best * GROUP + block.t().gather(1, members).argmax(1)


def largest_of(block: Tensor, maxima: Tensor, k: int) -> Tuple[Tensor, Tensor]:
    """Return the rows of the k largest values in every column, and these: B x k each.

    They lie in the k groups whose maxima are largest, but for equal values.
    """
    groups = maxima.t().contiguous().topk(min(k, len(maxima)), 1).indices
    members = members_of(groups)
    values, places = block.t().gather(1, members).topk(k, 1)
    return members.gather(1, places), values


def members_of(groups: Tensor) -> Tensor:
    """Return the rows in groups: B x g to B x (g * size of a group)."""
    within = torch.arange(GROUP, device=groups.device)
    return (groups.unsqueeze(2) * GROUP + within).flatten(1)
