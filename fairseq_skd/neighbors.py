"""Exact nearest neighbours of words in an embedding matrix, in blocks of rows.

One product of a block of rows with all eligible rows gives approximate squared distances
(``|a|^2 + |b|^2 - 2ab`` loses digits where rows are close). They only choose a shortlist that is
a few words longer than k; the distances of the shortlist are then computed from differences, in
float32, and these decide. Nothing of size V x V exists at any time and no row is sorted.

Everything is on the device of the matrix, and nothing waits for it.
"""

import contextlib
from typing import Iterator, NamedTuple, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["SIMILARITIES", "Neighbors", "embedding_space", "nearest_neighbors"]

SIMILARITIES = ("euclidean", "cosine")

# A shortlist has this many words more than the k that are asked for and the word itself, so that
# the rounding of the product cannot push a true neighbour out: float32 confuses words whose
# squared distances differ by less than about 1e-6 of the squared norms, and seldom two in a row.
_SLACK = 5

# Columns in one group of the two-level selection. 32 measured best on two cores and keeps the
# second level, k + 6 groups of 32, far below V.
_GROUP = 32


class Neighbors(NamedTuple):
    """The k nearest eligible words of every word.

    Attributes
    ----------
    ids : Tensor
        int64, V x k: nearest first; of equally near words the smaller id first.
    distances : Tensor
        float32, V x k: Euclidean distances (of the normalised rows, where they are normalised).
    """

    ids: Tensor
    distances: Tensor


def embedding_space(embedding: Tensor, similarity: str) -> Tensor:
    """Return the float32 vectors between which distances are measured, without gradient.

    Parameters
    ----------
    embedding : Tensor
        Any floating dtype, ... x d.
    similarity : {"euclidean", "cosine"}
        ``cosine`` scales every vector to length 1 first, so that the squared distance is
        ``2 - 2 cos``. A zero vector stays zero.

    Raises
    ------
    ValueError
        For an unknown ``similarity``.
    """
    if similarity not in SIMILARITIES:
        raise ValueError(f"similarity is {similarity!r}; allowed: {', '.join(SIMILARITIES)}")
    vectors = embedding.detach().float()
    return F.normalize(vectors, dim=-1) if similarity == "cosine" else vectors


def nearest_neighbors(
    embedding: Tensor,
    k: int,
    eligible: Optional[Tensor] = None,
    similarity: str = "euclidean",
    block_bytes: int = 16 * 2**20,
    words: Optional[Tensor] = None,
) -> Neighbors:
    """Find the k nearest eligible words of every word, exactly.

    Parameters
    ----------
    embedding : Tensor
        W, V x d, any floating dtype, any device. No gradient flows into it.
    k : int
        Neighbours a word, at least 1 and fewer than there are eligible words (a word is never
        its own neighbour).
    eligible : Tensor, optional
        int64, the ids of the words that may be neighbours, ascending, without repetition; on any
        device. Default: all. Every word *has* neighbours, eligible or not.
    similarity : {"euclidean", "cosine"}
        See `embedding_space`.
    block_bytes : int
        Bound on the block of distances. Beside it there are a float32 copy of the eligible rows,
        the result (12 bytes a neighbour) and, in a block of B rows, B x (k + 6) x d floats of
        differences, for which B is bounded too. At least one row is always taken.
    words : Tensor, optional
        int64, M: the words whose neighbours are sought. Default: all V.

    Returns
    -------
    Neighbors
        V x k, or M x k. Of equally near words the one with the smaller id wins, on every device, so
        that all workers of a distributed run get the same table from the same weights.

    Raises
    ------
    ValueError
        If ``k`` is out of range, ``embedding`` is not a matrix, or ``similarity`` is unknown.
    RuntimeError
        If a value of ``embedding`` is NaN or infinite. (On CUDA the message comes from the
        device, at the next wait for it: the check itself does not wait.)
    """
    if embedding.dim() != 2:
        raise ValueError(f"embedding has shape {tuple(embedding.shape)}; a V x d matrix is needed")
    embedding = embedding.detach()
    num_words, dim = embedding.shape
    device = embedding.device
    if eligible is None:
        eligible = torch.arange(num_words, device=device)
    eligible = eligible.to(device, non_blocking=True)
    num_eligible = eligible.numel()
    if not 1 <= k < num_eligible:
        raise ValueError(
            f"k is {k}; with {num_eligible} eligible words it must be at least 1 and at most "
            f"{num_eligible - 1}"
        )
    columns = embedding_space(embedding[eligible], similarity)
    squared_norms = columns.square().sum(1)
    shortlist = min(k + 1 + _SLACK, num_eligible)
    groups = -(-num_eligible // _GROUP)
    row_bytes = 4 * max(groups * _GROUP, 2 * shortlist * dim)
    block_rows = min(num_words, max(1, block_bytes // row_bytes))

    finite = [torch.isfinite(part).all() for part in embedding.split(block_rows)]
    torch._assert_async(
        torch.stack(finite).all(),
        "self-KD: the output projection holds NaN or infinite values, so there are no distances "
        "between words; training has diverged (try a lower learning rate, more warm-up or "
        "gradient clipping)",
    )

    if words is None:
        words = torch.arange(num_words, device=device)
    ids = torch.empty(len(words), k, dtype=torch.int64, device=device)
    distances = torch.empty(len(words), k, dtype=torch.float32, device=device)
    # The last group is filled up with infinities, written once.
    block = columns.new_full((block_rows, groups * _GROUP), float("inf"))
    for start in range(0, len(words), block_rows):
        row_ids = words[start : start + block_rows]
        # Rows are widened and normalised here, so that no copy of the whole table is made.
        rows = embedding_space(embedding[row_ids], similarity)
        approximate = block[: len(rows)]
        distances_to = approximate[:, :num_eligible]
        with _full_precision():
            torch.addmm(squared_norms, rows, columns.t(), alpha=-2, out=distances_to)
        approximate = _smallest(approximate, rows.square().sum(1, keepdim=True), shortlist)
        candidates = eligible[approximate]
        exact = (rows.unsqueeze(1) - columns[approximate]).square_().sum(2)
        exact.masked_fill_(candidates == row_ids.unsqueeze(1), float("inf"))
        nearest = _keys(exact, candidates).topk(k, largest=False).values
        ids[start : start + block_rows] = nearest & 0xFFFFFFFF
        distances[start : start + block_rows] = (nearest >> 32).int().view(torch.float32).sqrt()
    return Neighbors(ids, distances)


@contextlib.contextmanager
def _full_precision() -> Iterator[None]:
    """Keep the user's permission for rounded products (TF32, bfloat16) away from the shortlist.

    TF32 keeps 10 of float32's 23 bits, and then `_SLACK` would not be enough. The setting belongs
    to the process; what is launched meanwhile keeps it, so nothing waits for the device. Under
    autocast there is nothing to do: it leaves products with ``out=`` alone.
    """
    if not hasattr(torch.backends.cuda.matmul, "fp32_precision"):  # torch < 2.9
        allowed = torch.get_float32_matmul_precision()
        torch.set_float32_matmul_precision("highest")
        try:
            yield
        finally:
            torch.set_float32_matmul_precision(allowed)
        return
    settings = torch.backends.cuda.matmul, torch.backends.mkldnn.matmul  # type: ignore[attr-defined]
    before = [setting.fp32_precision for setting in settings]
    try:
        for setting in settings:
            setting.fp32_precision = "ieee"
        yield
    finally:
        for setting, value in zip(settings, before):
            setting.fp32_precision = value


def _smallest(block: Tensor, offset: Tensor, count: int) -> Tensor:
    """Return the columns of the ``count`` smallest values of every row, in two levels.

    The values sought lie in the ``count`` groups whose minima are smallest: every other group
    has ``count`` values before each of its own. So one pass over the block for the minima and a
    top-k among few values replace a top-k over the row. Ties go to the smaller column at both
    levels, which keeps that argument true for equal values.

    ``offset`` (a column) makes the values non-negative up to rounding, as `_keys` needs.
    """
    rows, width = block.shape
    grouped = block.view(rows, width // _GROUP, _GROUP)
    minima = (grouped.amin(2) + offset).clamp_(min=0)
    count_groups = min(count, minima.size(1))
    groups = torch.arange(minima.size(1), device=block.device)
    groups = _keys(minima, groups).topk(count_groups, largest=False).values & 0xFFFFFFFF
    columns = groups.unsqueeze(2) * _GROUP + torch.arange(_GROUP, device=block.device)
    values = grouped.gather(1, groups.unsqueeze(2).expand_as(columns))
    values = (values.flatten(1) + offset).clamp_(min=0)
    return _keys(values, columns.flatten(1)).topk(count, largest=False).values & 0xFFFFFFFF


def _keys(values: Tensor, ids: Tensor) -> Tensor:
    """Return int64 keys that sort by value, then by id.

    The bits of a non-negative float32 sort like the number, so they become the upper half of the
    key and the id the lower. Keys are unique: no two devices can break a tie differently.
    """
    return (values.view(torch.int32).long() << 32) | ids
