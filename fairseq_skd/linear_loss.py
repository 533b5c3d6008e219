"""Output projection and loss together: logits exist for one block of positions at a time.

The gradient of the loss with respect to the logits is known as soon as they are (`loss`), up to
the factor that comes from above. So each block of logits is made, turned into its gradient in
place, multiplied into the gradients of the features and of the projection, and forgotten. The
work is the three matrix products that training needs anyway, and a few passes over a block that
is still in the cache. The memory is one block, where logits, log-probabilities and their
gradient would take 3 N x V floats.

What is uniform over the vocabulary needs no pass at all: sum_v z_v = x . sum_v W_v, and its
gradient is sum_v W_v for the features and the same vector, sum_i x_i, for every row of W.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_skd.loss import sparse_target
from fairseq_skd.soft_targets import SelfTeacher

__all__ = ["LinearLosses", "self_kd_linear_cross_entropy"]

# One float32 block of logits. Few rows make the products slow, many rows cost memory: at
# V = 100,000 these are 125 rows, and the gradient of W (V x d floats) is twice as large.
_BLOCK_BYTES = {"cpu": 48 * 2**20, "cuda": 512 * 2**20}


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
        Bound on a float32 block of logits. Default: 48 MiB on a CPU, 512 MiB elsewhere. At least
        one row is always taken.

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
    if block_bytes is None:
        block_bytes = _BLOCK_BYTES.get(features.device.type, _BLOCK_BYTES["cuda"])
    block_rows = max(1, block_bytes // (4 * len(embedding)))
    loss, nll, kd, mass, correct = _LinearLoss.apply(
        features,
        embedding,
        target,
        None if weight == 0 else teacher,
        label_smoothing,
        weight,
        ignore_index,
        count_correct,
        block_rows,
    )
    return LinearLosses(loss, nll, kd, mass, correct if count_correct else None)


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
        block_rows: int,
    ) -> Tuple[Tensor, ...]:
        num_words = len(embedding)
        wide = torch.promote_types(features.dtype, torch.float32)
        for_features, for_embedding = ctx.needs_input_grad[:2]
        kept = torch.ones_like(target, dtype=wide)
        if ignore_index is not None:
            ignored = target.eq(ignore_index)
            target = target.masked_fill(ignored, 0)
            kept.masked_fill_(ignored, 0)
        kept = kept.unsqueeze(1)

        uniform = 0.0
        if label_smoothing:
            uniform = (1 - weight) * label_smoothing / (num_words - 1)
            row_sum = embedding.sum(0, dtype=wide)
        # (loss, nll, kd, mass, correct)
        sums = features.new_zeros(5, dtype=wide)
        grad_features = features.new_empty(features.shape, dtype=wide) if for_features else None
        grad_embedding = None
        if for_embedding:
            # - u sum_i x_i in every row
            column = -uniform * (kept.to(features.dtype) * features).sum(0, dtype=wide)
            grad_embedding = column.repeat(num_words, 1)

        buffer = features.new_empty(min(block_rows, len(features)), num_words)
        for start in range(0, len(features), block_rows):
            rows = slice(start, start + block_rows)
            x, mask = features[rows], kept[rows]
            logits = torch.mm(x, embedding.t(), out=buffer[: len(x)]).to(wide)
            if count_correct or (teacher is not None and teacher.needs_prediction):
                largest, prediction = logits.max(1, keepdim=True)
                prediction = prediction.squeeze(1)
                sums[4] += (prediction.eq(target[rows]) * mask.squeeze(1)).sum()
            else:
                largest, prediction = logits.amax(1, keepdim=True), None
            soft = None
            if teacher is not None:
                soft = teacher.soft_target(target[rows], prediction, embedding)
            ids, weights, _ = sparse_target(
                target[rows], soft, label_smoothing, weight, num_words, wide
            )
            chosen = logits.gather(1, ids)

            exponentials = logits.sub_(largest).exp_()
            normalizer = exponentials.sum(1, keepdim=True)
            log_normalizer = normalizer.log() + largest
            coefficient = weights.sum(1, keepdim=True) + num_words * uniform
            loss = coefficient * log_normalizer - (weights * chosen).sum(1, keepdim=True)
            if uniform:
                loss -= uniform * (x.to(wide) @ row_sum).unsqueeze(1)
            sums[0] += (mask * loss).sum()
            sums[1] += (mask * (log_normalizer - chosen[:, :1])).sum()
            if soft is not None:
                kd = log_normalizer - (soft.weights.to(wide) * chosen).sum(1, keepdim=True)
                sums[2] += (mask * kd).sum()
                sums[3] += (mask.squeeze(1) * soft.mass).sum()

            # The gradient c softmax(z) - s is a row of exponentials less s * normalizer / c, all
            # times c / normalizer: that factor goes to the narrow side of both products.
            factor = mask * coefficient / normalizer
            sparse = weights * (-normalizer / coefficient)
            gradient = exponentials.scatter_add_(1, ids, sparse).to(features.dtype)
            if grad_features is not None:
                grad_x = torch.mm(gradient, embedding).to(wide).mul_(factor)
                if uniform:
                    grad_x -= mask * (uniform * row_sum)
                grad_features[rows] = grad_x
            if grad_embedding is not None:
                scaled = (factor * x).to(features.dtype)
                if wide == features.dtype:
                    grad_embedding.addmm_(gradient.t(), scaled)
                else:
                    grad_embedding += torch.mm(gradient.t(), scaled)
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
