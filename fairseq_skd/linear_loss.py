"""Output projection and loss together: logits exist for one block of positions at a time.

The gradient of the loss with respect to the logits is known as soon as they are (`loss`), up to
the factor that comes from above. So each block of logits is made, turned into its gradient in
place, multiplied into the gradients of the features and of the projection, and forgotten. The
work is the three matrix products that training needs anyway, and a few passes over the block. The
memory is one block, where logits, log-probabilities and their gradient would take 3 N x V floats.

What is uniform over the vocabulary needs no pass at all: sum_v z_v = x . sum_v W_v, and its
gradient is sum_v W_v for the features and the same vector, sum_i x_i, for every row of W.

A block is transposed, words x positions. A product writes tiles of its result, and in rows of a
few hundred positions a tile is one compact piece of memory; in rows of V words each of its lines
lies in another page. On two cores (AVX2, MKL, d = 512 and 256) the product that makes the logits of
160 to 320 positions ran 1.2 to 1.4 times as fast this way at V = 32,768 and 100,000, and the three
products together about 1.1 times.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_skd.loss import sparse_target, uniform_weight
from fairseq_skd.soft_targets import SelfTeacher

__all__ = ["LinearLosses", "self_kd_linear_cross_entropy"]

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

# Words in one group of the search for the largest logit.
_GROUP = 32


class LinearLosses(NamedTuple):
    """Sums over all positions that count (scalars, losses in nats).

    Attributes
    ----------
    loss : Tensor
        What to train on. The others carry no gradient.
    nll_loss : Tensor
        Negative log-likelihood of the targets.
    self_kd_loss : Tensor
        Cross-entropy to the soft targets; 0 without a teacher.
    mass : Tensor
        Probability given to words other than the target; 0 without a teacher.
    correct : Tensor, optional
        Positions whose largest logit is the target, if asked for.
    """

    loss: Tensor
    nll_loss: Tensor
    self_kd_loss: Tensor
    mass: Tensor
    correct: Optional[Tensor]


def self_kd_linear_cross_entropy(
    features: Tensor,
    embedding: Tensor,
    target: Tensor,
    teacher: Optional[SelfTeacher] = None,
    label_smoothing: float = 0.0,
    weight: float = 0.0,
    ignore_index: Optional[int] = None,
    count_correct: bool = False,
    block_bytes: Optional[int] = None,
) -> LinearLosses:
    """Compute what `self_kd_cross_entropy` gives for ``features @ embedding.t()``, summed.

    The gradients are computed in the forward pass and multiplied by the gradient of the sum in
    the backward pass. That is why only the sum has one, and why float16 is refused: without the
    loss scale, which is known only in the backward pass, small gradients would be lost.

    Parameters
    ----------
    features : Tensor
        N x d, bfloat16, float32 or float64.
    embedding : Tensor
        The output projection W, V x d, of the same dtype and device.
    target : Tensor
        int64, N.
    teacher : SelfTeacher, optional
        Refreshed; needed if ``weight`` > 0.
    label_smoothing, weight, ignore_index
        As for `self_kd_cross_entropy`.
    count_correct : bool
        Also count the positions at which the model's first choice is the target.
    block_bytes : int, optional
        Bound on a float32 block of logits. Default: 24 MiB on a CPU, or 160 positions where that
        is more; 512 MiB elsewhere. At least one position is always taken.

    Returns
    -------
    LinearLosses
        float32 (float64 for float64).

    Raises
    ------
    ValueError
        If ``weight`` > 0 without a teacher, or the dtype is not supported.
    """
    if teacher is None and weight > 0:
        raise ValueError(f"weight is {weight}, but there is no teacher")
    if features.dtype == torch.float16 or features.dtype != embedding.dtype:
        raise ValueError(
            f"features are {features.dtype} and the embedding is {embedding.dtype}; both must be "
            "bfloat16, float32 or float64 (for float16 use self_kd_cross_entropy)"
        )
    loss, nll, kd, mass, correct = _LinearLoss.apply(
        features,
        embedding,
        target,
        None if weight == 0 else teacher,
        label_smoothing,
        weight,
        ignore_index,
        count_correct,
        _block_positions(features, embedding, block_bytes),
    )
    return LinearLosses(loss, nll, kd, mass, correct if count_correct else None)


def _block_positions(features: Tensor, embedding: Tensor, block_bytes: Optional[int]) -> int:
    position_bytes = 4 * len(embedding)
    if block_bytes is None:
        on_cpu = features.device.type == "cpu"
        block_bytes = _BLOCK_BYTES["cpu" if on_cpu else "cuda"]
        if on_cpu:
            block_bytes = max(block_bytes, _CPU_POSITIONS * position_bytes)
    positions = block_bytes // position_bytes
    if positions > _ALIGNMENT:
        positions -= positions % _ALIGNMENT
    return max(1, min(positions, len(features)))


def _argmax(padded: Tensor) -> Tensor:
    """Return the row of the largest value in every column; of equal ones the first.

    In two levels, since an argmax over rows takes 18 times as long as their maxima: the maxima of
    groups of rows, then the first of a column's best group that is equal to it. The number of
    rows is a multiple of the size of a group.
    """
    best = padded.view(-1, _GROUP, padded.size(1)).amax(1).argmax(0)
    members = best * _GROUP + torch.arange(_GROUP, device=padded.device).unsqueeze(1)
    first = padded.gather(0, members).argmax(0, keepdim=True)
    return members.gather(0, first).squeeze(0)


class _LinearLoss(torch.autograd.Function):
    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        features: Tensor,
        embedding: Tensor,
        target: Tensor,
        teacher: Optional[SelfTeacher],
        label_smoothing: float,
        weight: float,
        ignore_index: Optional[int],
        count_correct: bool,
        block_positions: int,
    ) -> Tuple[Tensor, ...]:
        num_words = len(embedding)
        wide = torch.promote_types(features.dtype, torch.float32)
        for_features, for_embedding = ctx.needs_input_grad[:2]
        kept = torch.ones_like(target, dtype=wide)
        if ignore_index is not None:
            ignored = target.eq(ignore_index)
            target = target.masked_fill(ignored, 0)
            kept.masked_fill_(ignored, 0)

        uniform = uniform_weight(label_smoothing, weight, num_words)
        row_sum = embedding.sum(0, dtype=wide) if uniform else None
        # (loss, nll, kd, mass, correct)
        sums = features.new_zeros(5, dtype=wide)
        grad_features = features.new_empty(features.shape, dtype=wide) if for_features else None
        grad_embedding = None
        if for_embedding:
            # - u sum_i x_i in every row
            column = -uniform * (kept.unsqueeze(1) * features).sum(0, dtype=wide)
            grad_embedding = column.repeat(num_words, 1)

        # Rows beyond the vocabulary fill the last group of `_argmax`; no product writes them.
        padded_words = -(-num_words // _GROUP) * _GROUP
        buffer = features.new_empty(padded_words, block_positions)
        buffer[num_words:] = float("-inf")
        for start in range(0, len(features), block_positions):
            part = slice(start, start + block_positions)
            x, mask = features[part], kept[part]
            torch.mm(embedding, x.t(), out=buffer[:num_words, : len(x)])
            padded = buffer[:, : len(x)].to(wide)
            logits = padded[:num_words]
            largest = logits.amax(0)
            prediction = soft = None
            if count_correct or (teacher is not None and teacher.needs_prediction):
                prediction = _argmax(padded)
                sums[4] += (prediction.eq(target[part]) * mask).sum()
            if teacher is not None:
                soft = teacher.soft_target(target[part], prediction, embedding)
            ids, weights = sparse_target(
                target[part], soft, label_smoothing, weight, num_words, wide
            )
            ids, weights = ids.t(), weights.t()
            chosen = logits.gather(0, ids)

            exponentials = logits.sub_(largest).exp_()
            normalizer = exponentials.sum(0)
            log_normalizer = normalizer.log() + largest
            coefficient = weights.sum(0) + num_words * uniform
            loss = coefficient * log_normalizer - (weights * chosen).sum(0)
            if row_sum is not None:
                loss -= uniform * (x.to(wide) @ row_sum)
            sums[0] += (mask * loss).sum()
            sums[1] += (mask * (log_normalizer - chosen[0])).sum()
            if soft is not None:
                kd = log_normalizer - (soft.weights.t().to(wide) * chosen).sum(0)
                sums[2] += (mask * kd).sum()
                sums[3] += (mask * soft.mass).sum()

            # The gradient c softmax(z) - s is a column of exponentials less s * normalizer / c,
            # all times c / normalizer: that factor goes to the narrow side of both products.
            factor = (mask * coefficient / normalizer).unsqueeze(1)
            sparse = weights * (-normalizer / coefficient)
            gradient = exponentials.scatter_add_(0, ids, sparse).to(features.dtype)
            if grad_features is not None:
                grad_x = torch.mm(gradient.t(), embedding).to(wide).mul_(factor)
                if row_sum is not None:
                    grad_x.addcmul_(mask.unsqueeze(1), row_sum, value=-uniform)
                grad_features[part] = grad_x
            if grad_embedding is not None:
                scaled = (factor * x).to(features.dtype)
                if wide == features.dtype:
                    grad_embedding.addmm_(gradient, scaled)
                else:
                    grad_embedding += torch.mm(gradient, scaled)
        ctx.gradients = grad_features, grad_embedding
        ctx.dtype = features.dtype
        # Copies, not views of one tensor: fairseq scales the loss in place.
        loss, *others = (x.clone() for x in sums)
        ctx.mark_non_differentiable(*others)
        return (loss, *others)

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        if ctx.gradients is None:
            raise RuntimeError(
                "self_kd_linear_cross_entropy: a second backward pass through the same loss; "
                "compute the loss again"
            )
        # Handed over, not kept: autograd can then take W's gradient without a copy.
        gradients, ctx.gradients = ctx.gradients, None
        scaled = (g if g is None else g.mul_(grad).to(ctx.dtype) for g in gradients)
        return (*scaled, None, None, None, None, None, None, None)
