"""The loss on logits: label smoothing and self-distillation as one sparse target.

For one position with logits z, log-probabilities log p = log softmax(z), target t and a soft
target q (`SoftTarget`), over V words:

    LS   = -(1 - eps - eps/(V-1)) log p_t - eps/(V-1) sum_v log p_v      (fairseq's smoothing)
    KD   = -sum_j q_j log p_j
    loss = (1 - alpha) LS + alpha KD

All of it is linear in log p. So the whole target is one weight on every word,
``u = (1 - alpha) eps/(V-1)``, and a few sparse ones, ``s_j = alpha q_j`` with
``(1 - alpha)(1 - eps - eps/(V-1))`` more on the target, and with ``c = sum_j s_j + V u``

    loss = c logsumexp(z) - sum_j s_j z_j - u sum_v z_v
    d loss / d z = c softmax(z) - s - u

`reference_loss` is the first set of equations, to be read and to be tested against.
`self_kd_cross_entropy` is the second.
"""

from typing import Any, NamedTuple, Optional, Tuple

import torch
from torch import Tensor

from fairseq_skd.soft_targets import SoftTarget

__all__ = [
    "Losses",
    "ends_in_product",
    "reference_loss",
    "self_kd_cross_entropy",
    "sparse_target",
    "uniform_weight",
]

# Rows are taken in blocks of about this many bytes in float32, so that what is written by one
# operation is still in the cache for the next, and half-precision logits are never all widened.
_BLOCK_BYTES = 16 * 2**20


class Losses(NamedTuple):
    """Per position (shape N, in nats, 0 where the target is ignored).

    Attributes
    ----------
    loss : Tensor
        What to train on. The others carry no gradient in `self_kd_cross_entropy`.
    nll_loss : Tensor
        Negative log-likelihood of the target.
    self_kd_loss : Tensor
        Cross-entropy to the soft target; zeros where there is none.
    """

    loss: Tensor
    nll_loss: Tensor
    self_kd_loss: Tensor


def reference_loss(
    lprobs: Tensor,
    target: Tensor,
    soft_target: Optional[SoftTarget] = None,
    label_smoothing: float = 0.0,
    weight: float = 0.0,
    ignore_index: Optional[int] = None,
) -> Losses:
    """Compute the loss from log-probabilities, term by term (slow, readable).

    Parameters
    ----------
    lprobs : Tensor
        N x V, normalised log-probabilities.
    target : Tensor
        int64, N.
    soft_target : SoftTarget, optional
        Needed if ``weight`` > 0.
    label_smoothing : float
        eps, as fairseq defines it: eps / (V - 1) on every word that is not the target.
    weight : float
        alpha, in [0, 1].
    ignore_index : int, optional
        Positions with this target count nothing.

    Returns
    -------
    Losses
        In the dtype of ``lprobs``.
    """
    ignored = torch.zeros_like(target) if ignore_index is None else target.eq(ignore_index)
    ignored = ignored.bool()
    target = target.masked_fill(ignored, 0)
    eps_i = label_smoothing / (lprobs.size(1) - 1)
    nll = -lprobs.gather(1, target.unsqueeze(1)).squeeze(1)
    smoothed = (1 - label_smoothing - eps_i) * nll - eps_i * lprobs.sum(1)
    if soft_target is None:
        kd = torch.zeros_like(nll)
    else:
        kd = -(soft_target.weights.to(lprobs) * lprobs.gather(1, soft_target.ids)).sum(1)
    loss = (1 - weight) * smoothed + weight * kd
    return Losses(*(x.masked_fill(ignored, 0) for x in (loss, nll, kd)))


def uniform_weight(label_smoothing: float, weight: float, num_words: int) -> float:
    """Return u, the part of the training target that every word has: (1 - alpha) eps / (V - 1)."""
    return (1 - weight) * label_smoothing / (num_words - 1)


def sparse_target(
    target: Tensor,
    soft_target: Optional[SoftTarget],
    label_smoothing: float,
    weight: float,
    num_words: int,
    dtype: torch.dtype = torch.float32,
) -> Tuple[Tensor, Tensor]:
    """Return the sparse part of the training target: ids and their weights s, N x C each.

    Column 0 is the target itself. Weights have the given ``dtype``; `uniform_weight` is the rest.
    """
    uniform = uniform_weight(label_smoothing, weight, num_words)
    on_target = (1 - weight) * (1 - label_smoothing) - uniform
    if soft_target is None:
        ids = target.unsqueeze(1)
        return ids, torch.full_like(ids, on_target, dtype=dtype)
    weights = weight * soft_target.weights.to(dtype)
    weights[:, 0] += on_target
    return soft_target.ids, weights


def self_kd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    soft_target: Optional[SoftTarget] = None,
    label_smoothing: float = 0.0,
    weight: float = 0.0,
    ignore_index: Optional[int] = None,
    overwrite_logits: bool = False,
) -> Losses:
    """Compute the loss from logits in closed form: one pass forward, one backward.

    Without a soft target this is label-smoothed cross-entropy (without smoothing:
    cross-entropy), in less time and memory than through log-probabilities: nothing of size N x V
    is made besides the gradient.

    Parameters
    ----------
    logits : Tensor
        N x V, float16, bfloat16, float32 or float64. Half-precision logits are read as they are
        and computed with in float32.
    target : Tensor
        int64, N.
    soft_target : SoftTarget, optional
        Needed if ``weight`` > 0.
    label_smoothing : float
        eps, as fairseq defines it: eps / (V - 1) on every word that is not the target.
    weight : float
        alpha, the share of the distillation term, in [0, 1].
    ignore_index : int, optional
        Positions with this target (padding) count nothing and get no gradient.
    overwrite_logits : bool
        Let the backward pass write the gradient into the memory of ``logits``, which saves a
        tensor of N x V. For logits that nothing else reads after the backward pass has begun;
        where autograd still needs them, it raises an error.

    Returns
    -------
    Losses
        float32 (float64 for float64 logits). Only ``loss`` has a gradient, which reaches only
        the logits: the soft target is a constant.

    Raises
    ------
    ValueError
        If ``weight`` > 0 without a soft target.

    Examples
    --------
    >>> import torch
    >>> from fairseq_skd import SelfTeacher, self_kd_cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> embedding = torch.nn.Parameter(torch.randn(100, 16))       # 100 words
    >>> features, target = torch.randn(8, 16), torch.randint(100, (8,))
    >>> teacher = SelfTeacher(top_k=5)
    >>> teacher.refresh(embedding)
    >>> losses = self_kd_cross_entropy(
    ...     features @ embedding.t(), target, teacher.soft_target(target), weight=0.3
    ... )
    >>> losses.loss.mean().backward()
    """
    if soft_target is None and weight > 0:
        raise ValueError(f"weight is {weight}, but there is no soft target")
    ignored = None if ignore_index is None else target.eq(ignore_index)
    if ignored is not None:
        target = target.masked_fill(ignored, 0)
    wide = torch.promote_types(logits.dtype, torch.float32)
    num_words = logits.size(1)
    ids, weights = sparse_target(target, soft_target, label_smoothing, weight, num_words, wide)
    uniform = uniform_weight(label_smoothing, weight, num_words)
    if ignored is not None:
        weights = weights.masked_fill(ignored.unsqueeze(1), 0)
    kept = torch.ones_like(weights[:, 0]) if ignored is None else (~ignored).to(weights)
    loss, log_normalizer, chosen = _ClosedForm.apply(
        logits, ids, weights, uniform, kept, overwrite_logits
    )
    nll = kept * (log_normalizer - chosen[:, 0])
    if soft_target is None:
        return Losses(loss, nll, torch.zeros_like(nll))
    expected = (soft_target.weights.to(chosen) * chosen).sum(1)
    return Losses(loss, nll, kept * (log_normalizer - expected))


class _ClosedForm(torch.autograd.Function):
    """loss = kept (c logsumexp(z) - u sum z) - sum_j s_j z_j, with its gradient."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        ids: Tensor,
        weights: Tensor,
        uniform: float,
        kept: Tensor,
        overwrite: bool,
    ) -> Tuple[Tensor, Tensor, Tensor]:
        wide = weights.dtype
        chosen = logits.gather(1, ids).to(wide)
        log_normalizer = torch.empty_like(kept)
        total = torch.zeros_like(kept)
        for rows in _row_blocks(logits):
            block = logits[rows].to(wide)
            log_normalizer[rows] = torch.logsumexp(block, 1)
            if uniform:
                total[rows] = block.sum(1)
        coefficient = weights.sum(1) + kept * (logits.size(1) * uniform)
        loss = coefficient * log_normalizer - (weights * chosen).sum(1) - kept * uniform * total
        ctx.save_for_backward(logits, ids, weights, kept, log_normalizer, coefficient)
        ctx.uniform, ctx.overwrite = uniform, overwrite
        ctx.mark_non_differentiable(log_normalizer, chosen)
        return loss, log_normalizer, chosen

    @staticmethod
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        logits, ids, weights, kept, log_normalizer, coefficient = ctx.saved_tensors
        result = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        scale = (coefficient * grad).unsqueeze(1)
        sparse = weights * -grad.unsqueeze(1)
        everywhere = (kept * grad).unsqueeze(1) * ctx.uniform
        for rows in _row_blocks(logits):
            block = logits[rows] - log_normalizer[rows].unsqueeze(1)  # wide, and never logits
            block.exp_().mul_(scale[rows])
            if ctx.uniform:
                block.sub_(everywhere[rows])
            result[rows] = block.scatter_add_(1, ids[rows], sparse[rows])
        return result, None, None, None, None, None


def _row_blocks(logits: Tensor) -> Tuple[slice, ...]:
    rows = max(1, _BLOCK_BYTES // (4 * logits.size(1)))
    return tuple(slice(start, start + rows) for start in range(0, logits.size(0), rows))


def ends_in_product(logits: Tensor) -> bool:
    """Whether logits come straight from a matrix product, whose gradient does not need them.

    Then their memory may be overwritten once the backward pass has begun.
    """
    node = logits.grad_fn
    while node is not None and "View" in node.name():
        node = node.next_functions[0][0]
    return node is not None and node.name() in ("MmBackward0", "AddmmBackward0")
