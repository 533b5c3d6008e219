"""The loss on logits: label smoothing and distillation as one sparse target.

For one position with logits z, log-probabilities log p = log softmax(z), target t and a soft
target q (`SoftTarget`), over V words:

    LS   = -(1 - eps - eps/(V-1)) log p_t - eps/(V-1) sum_v log p_v      (fairseq's smoothing)
    KD   = -sum_j q_j log p_j - (1 - sum_j q_j)/V sum_v log p_v          (what is left is shared)
    loss = (1 - alpha) LS + alpha KD

All of it is linear in log p, and the weights of LS and of KD each add up to 1. So the whole target
is one weight on every word, ``u = (1 - alpha) eps/(V-1) + alpha (1 - sum_j q_j)/V``, and a few
sparse ones, ``s_j = alpha q_j`` with ``(1 - alpha)(1 - eps - eps/(V-1))`` more on the target, and

    loss = logsumexp(z) - sum_j s_j z_j - u sum_v z_v
    d loss / d z = softmax(z) - s - u

The largest logit is subtracted from all of them first, which changes nothing in these equations:
a loss near 0 is then the logarithm of a sum near 1, and no difference of two large numbers.

`reference_loss` is the first set of equations, to be read and to be tested against.
`self_kd_cross_entropy` is the second.
"""

from typing import Any, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from fairseq_skd.soft_targets import LARGEST_SUM, SelfTeacher, SoftTarget

__all__ = [
    "Losses",
    "TopWords",
    "TrainingTarget",
    "ends_in_product",
    "reference_loss",
    "self_kd_cross_entropy",
    "training_target",
]

# Rows are taken in blocks of about this many bytes in float32, so that what is written by one
# operation is still in the cache for the next, and half-precision logits are never all widened.
_BLOCK_BYTES = 16 * 2**20


class TopWords(NamedTuple):
    """The k words to which the model gives most probability, at every position.

    Attributes
    ----------
    ids : Tensor
        int64, N x k, the likeliest first.
    lprobs : Tensor
        float32 (float64 for float64), N x k: log-probabilities, in nats, without gradient.
    """

    ids: Tensor
    lprobs: Tensor


class Losses(NamedTuple):
    """Per position (shape N, in nats, 0 where the target is ignored).

    Attributes
    ----------
    loss : Tensor
        What to train on, multiplied by the position's weight. The others are not, and carry no
        gradient in `self_kd_cross_entropy`.
    nll_loss : Tensor
        Negative log-likelihood of the target.
    self_kd_loss : Tensor
        Cross-entropy to the soft target (times its `share`); zeros where there is none.
    mass : Tensor
        Probability that the soft target gives to words other than the target (times its `share`).
    top : TopWords, optional
        If asked for.
    """

    loss: Tensor
    nll_loss: Tensor
    self_kd_loss: Tensor
    mass: Tensor
    top: Optional[TopWords] = None


def reference_loss(
    lprobs: Tensor,
    target: Tensor,
    soft_target: Optional[SoftTarget] = None,
    label_smoothing: float = 0.0,
    weight: float = 0.0,
    ignore_index: int = -100,
    position_weights: Optional[Tensor] = None,
) -> Losses:
    """Compute the loss from log-probabilities, term by term (slow, readable).

    Parameters
    ----------
    lprobs : Tensor
        N x V, normalised log-probabilities. Minus infinity is allowed for a word that gets no
        weight.
    target : Tensor
        int64, N.
    soft_target : SoftTarget, optional
        Needed if ``weight`` > 0.
    label_smoothing : float
        eps, as fairseq defines it: eps / (V - 1) on every word that is not the target.
    weight : float
        alpha, in [0, 1].
    ignore_index : int
        Positions with this target count nothing.
    position_weights : Tensor, optional
        N, factors on the loss of each position.

    Returns
    -------
    Losses
        In the dtype of ``lprobs``, without `top`.
    """
    num_words = lprobs.size(1)
    ignored = target.eq(ignore_index)
    lprobs = lprobs.masked_fill(ignored.unsqueeze(1), 0)
    target = target.masked_fill(ignored, 0)
    eps_i = label_smoothing / max(num_words - 1, 1)
    nll = -lprobs.gather(1, target.unsqueeze(1)).squeeze(1)
    loss = (1 - label_smoothing - eps_i) * nll - _weighed(eps_i, lprobs).sum(1)
    kd = mass = torch.zeros_like(nll)
    if soft_target is not None:
        soft_target = known_soft_target(soft_target, ignored, num_words)
        share = 1 if soft_target.share is None else soft_target.share.to(lprobs)
        weights = soft_target.weights.to(lprobs)
        rest = soft_target.rest.unsqueeze(1).to(lprobs) / num_words
        chosen = lprobs.gather(1, soft_target.ids)
        kd = share * -(_weighed(weights, chosen).sum(1) + _weighed(rest, lprobs).sum(1))
        on_target = weights.masked_fill(soft_target.ids != target.unsqueeze(1), 0).sum(1)
        mass = share * (1 - on_target - rest.squeeze(1))
        loss = (1 - weight * share) * loss + weight * kd
    if position_weights is not None:
        loss = position_weights.to(loss) * loss
    loss, nll, kd, mass = (x.masked_fill(ignored, 0) for x in (loss, nll, kd, mass))
    return Losses(loss, nll, kd, mass)


def _weighed(weights: Union[float, Tensor], values: Tensor) -> Tensor:
    """Multiply, with 0 times minus infinity being 0: what is never trained may be impossible."""
    if not isinstance(weights, Tensor):
        return weights * values if weights else torch.zeros_like(values)
    return weights * values.masked_fill(weights == 0, 0)


class TrainingTarget(NamedTuple):
    """All that is learnt at every position: sparse weights, and one that every word has.

    Attributes
    ----------
    ids : Tensor
        int64, N x (1 + C). Column 0 is the target; a word may stand in several columns.
    weights : Tensor
        N x (1 + C): s. With V times ``uniform`` they add up to 1.
    uniform : Tensor, optional
        N: u. None if it is 0 everywhere.
    """

    ids: Tensor
    weights: Tensor
    uniform: Optional[Tensor]


def training_target(
    target: Tensor,
    soft_target: Optional[SoftTarget],
    label_smoothing: float,
    weight: float,
    num_words: int,
    dtype: torch.dtype = torch.float32,
) -> TrainingTarget:
    """Mix the label-smoothed target and the soft target; weights have the given ``dtype``."""
    on_others = label_smoothing / max(num_words - 1, 1)
    on_target = 1 - label_smoothing - on_others
    ids = target.unsqueeze(1)
    if soft_target is None:
        uniform = torch.full_like(target, on_others, dtype=dtype) if label_smoothing else None
        return TrainingTarget(ids, torch.full_like(ids, on_target, dtype=dtype), uniform)
    alpha = torch.full_like(target, weight, dtype=dtype)
    if soft_target.share is not None:
        alpha = alpha * soft_target.share.to(dtype)
    soft = soft_target.weights.to(dtype)
    weights = [((1 - alpha) * on_target).unsqueeze(1), alpha.unsqueeze(1) * soft]
    uniform = (1 - alpha) * on_others + alpha * soft_target.rest.to(dtype) / num_words
    return TrainingTarget(torch.cat([ids, soft_target.ids], 1), torch.cat(weights, 1), uniform)


def distilled(
    soft_target: SoftTarget,
    target: Tensor,
    log_normalizer: Tensor,
    chosen: Tensor,
    total: Tensor,
    num_words: int,
) -> Tuple[Tensor, Tensor]:
    """Return the cross-entropy to the soft target and the mass, each times the share.

    ``chosen`` are the logits of the soft target's words (N x C), ``total`` the sum of all, and
    ``log_normalizer`` their logsumexp: all of them, or none, less the largest logit.
    """
    weights = soft_target.weights.to(chosen)
    rest = soft_target.rest.to(chosen) / num_words
    kd = log_normalizer - _weighed(weights, chosen).sum(1) - _weighed(rest, total)
    mass = 1 - soft_target.given_to(target).to(chosen) - rest
    if soft_target.share is None:
        return kd, mass
    share = soft_target.share.to(kd)
    return share * kd, share * mass


def check_arguments(
    positions: int,
    target: Tensor,
    soft_target: Union[SoftTarget, SelfTeacher, None],
    weight: float,
    position_weights: Optional[Tensor],
) -> None:
    """Refuse what cannot be meant, whichever way the loss is computed."""
    if soft_target is None and weight > 0:
        raise ValueError(f"weight is {weight}, but there is no soft target and no teacher")
    shapes: List[Tuple[str, Tuple[int, ...], Tuple[int, ...]]]
    shapes = [("target", target.shape, (positions,))]
    if position_weights is not None:
        shapes.append(("position_weights", position_weights.shape, (positions,)))
    if isinstance(soft_target, SoftTarget):
        width = soft_target.ids.shape[-1]
        shapes += [
            ("soft_target.ids", soft_target.ids.shape, (positions, width)),
            ("soft_target.weights", soft_target.weights.shape, (positions, width)),
        ]
        if soft_target.share is not None:
            shapes.append(("soft_target.share", soft_target.share.shape, (positions,)))
        for name, part in zip(soft_target._fields, soft_target):
            if part is not None and part.requires_grad:
                raise ValueError(
                    f"soft_target.{name} requires a gradient, and none reaches it: the soft target "
                    "is a constant. Pass it detached: .detach()"
                )
    for name, shape, expected in shapes:
        if tuple(shape) != expected:
            raise ValueError(f"{name} has shape {tuple(shape)}; {expected} is needed")


def known_targets(target: Tensor, ignore_index: int, num_words: int) -> Tuple[Tensor, Tensor]:
    """Return the targets, with word 0 where they are ignored, and which ones are ignored.

    Raises
    ------
    RuntimeError
        For a target that is neither a word nor ignored. (On CUDA the message comes from the
        device, at the next wait for it: the check itself does not wait.)
    """
    ignored = target.eq(ignore_index)
    target = target.masked_fill(ignored, 0)
    torch._assert_async(
        ((target >= 0) & (target < num_words)).all(),
        f"self-KD: a target is out of bounds; allowed: 0 to {num_words - 1}, and the ignore_index "
        f"{ignore_index} for positions that do not count",
    )
    return target, ignored


def known_soft_target(soft_target: SoftTarget, ignored: Tensor, num_words: int) -> SoftTarget:
    """Return a soft target that is a distribution, and empty at positions that do not count.

    Places with weight 0 hold word 0, and rows that add up to a little more than 1, as half
    precision rounds them, are divided by their sum.

    Raises
    ------
    RuntimeError
        If an id with a weight is no word, or the weights or shares are no probabilities: as for
        `known_targets`.
    """
    rows = ignored.unsqueeze(1)
    weights = soft_target.weights.masked_fill(rows, 0)
    ids = soft_target.ids.masked_fill(weights == 0, 0)
    torch._assert_async(
        ((ids >= 0) & (ids < num_words)).all(),
        f"self-KD: an id of the soft target is out of bounds; allowed: 0 to {num_words - 1}, and "
        "any id where the weight is 0",
    )
    wide = torch.promote_types(weights.dtype, torch.float32)
    total = weights.sum(1, dtype=wide)
    # NaN fails every comparison, and a sum with infinity in it is infinite or NaN.
    torch._assert_async(
        (weights >= 0).all() & (total <= LARGEST_SUM).all(),
        "self-KD: the weights of the soft target are no distribution: they must be probabilities, "
        "not negative (of log-probabilities take exp()), finite, and add up to at most 1 in a row",
    )
    share = soft_target.share
    if share is not None:
        share = share.masked_fill(ignored, 0)
        torch._assert_async(
            ((share >= 0) & (share <= LARGEST_SUM)).all(),
            "self-KD: a share of the soft target is no number from 0 to 1",
        )
    return SoftTarget(ids, weights / total.clamp(min=1).unsqueeze(1), share)


def self_kd_cross_entropy(
    logits: Tensor,
    target: Tensor,
    soft_target: Union[SoftTarget, SelfTeacher, None] = None,
    label_smoothing: float = 0.0,
    weight: float = 0.0,
    ignore_index: int = -100,
    overwrite_logits: bool = False,
    position_weights: Optional[Tensor] = None,
    top_k: int = 0,
    embedding: Optional[Tensor] = None,
) -> Losses:
    """Compute the loss from logits in closed form: one pass forward, one backward.

    Without a soft target this is label-smoothed cross-entropy (without smoothing:
    cross-entropy), in less time and memory than through log-probabilities: nothing of size N x V
    is made besides the gradient.

    Parameters
    ----------
    logits : Tensor
        N x V, float16, bfloat16, float32 or float64. Half-precision logits are read as they are
        and computed with in float32. Minus infinity is allowed for a word that gets no weight.
    target : Tensor
        int64, N.
    soft_target : SoftTarget or SelfTeacher, optional
        From anywhere (`SoftTarget` says how it is read), or who makes it. Needed if ``weight`` > 0.
    label_smoothing : float
        eps, as fairseq defines it: eps / (V - 1) on every word that is not the target.
    weight : float
        alpha, the share of the distillation term, in [0, 1].
    ignore_index : int
        Positions with this target (padding) count nothing and get no gradient, whatever their
        logits are.
    overwrite_logits : bool
        Let the backward pass write the gradient into the memory of ``logits``, which saves a
        tensor of N x V. For logits that nothing else reads after the backward pass has begun;
        where autograd still needs them, it raises an error.
    position_weights : Tensor, optional
        N, factors on the loss of each position, without gradient.
    top_k : int
        Also return so many most probable words of every position.
    embedding : Tensor, optional
        The output projection, V x d: a teacher that looks at the model's prediction needs it.

    Returns
    -------
    Losses
        float32 (float64 for float64 logits). Only ``loss`` has a gradient, which reaches only
        the logits: the soft target is a constant.

    Raises
    ------
    ValueError
        If ``weight`` > 0 without a soft target, or a shape does not fit.
    RuntimeError
        If a target is no word, see `known_targets`.

    Examples
    --------
    >>> import torch
    >>> from fairseq_skd import SelfTeacher, self_kd_cross_entropy
    >>> _ = torch.manual_seed(0)
    >>> embedding = torch.nn.Parameter(torch.randn(100, 16))       # 100 words
    >>> features, target = torch.randn(8, 16), torch.randint(100, (8,))
    >>> teacher = SelfTeacher(top_k=5)
    >>> teacher.refresh(embedding)
    >>> losses = self_kd_cross_entropy(features @ embedding.t(), target, teacher, weight=0.3)
    >>> losses.loss.mean().backward()
    """
    num_words = logits.size(1)
    check_arguments(len(logits), target, soft_target, weight, position_weights)
    target, ignored = known_targets(target, ignore_index, num_words)
    if isinstance(soft_target, SelfTeacher):
        prediction = logits.detach().argmax(1) if soft_target.needs_prediction else None
        soft_target = soft_target.soft_target(target, prediction, embedding)
    if soft_target is not None:
        soft_target = known_soft_target(soft_target, ignored, num_words)
    wide = torch.promote_types(logits.dtype, torch.float32)
    mixed = training_target(target, soft_target, label_smoothing, weight, num_words, wide)
    loss, log_normalizer, chosen, total = _ClosedForm.apply(
        logits, mixed, ignored, position_weights, overwrite_logits
    )
    nll = log_normalizer - chosen[:, 0]
    kd = mass = torch.zeros_like(nll)
    if soft_target is not None:
        kd, mass = distilled(soft_target, target, log_normalizer, chosen[:, 1:], total, num_words)
    top = None
    if top_k:
        values, ids = logits.detach().topk(min(top_k, num_words), 1)
        values = values.to(wide)
        top = TopWords(ids, values - values[:, :1] - log_normalizer.unsqueeze(1))
    nll, kd, mass = (x.masked_fill(ignored, 0) for x in (nll, kd, mass))
    return Losses(loss, nll, kd, mass, top)


class _ClosedForm(torch.autograd.Function):
    """loss = f (logsumexp(z) - sum_j s_j z_j - u sum z), with its gradient.

    It also returns the logsumexp, the chosen logits and the sum of all, of logits less the largest.
    """

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any,
        logits: Tensor,
        mixed: TrainingTarget,
        ignored: Tensor,
        position_weights: Optional[Tensor],
        overwrite: bool,
    ) -> Tuple[Tensor, Tensor, Tensor, Tensor]:
        ids, weights, uniform = mixed
        wide = weights.dtype
        largest, normalizer = weights.new_empty(2, len(logits))
        total = weights.new_zeros(len(logits))
        for rows in _row_blocks(logits):
            largest[rows] = logits[rows].amax(1).to(wide)
            block = logits[rows] - largest[rows].unsqueeze(1)  # wide, and never logits
            if uniform is not None:
                total[rows] = block.sum(1)
            normalizer[rows] = block.exp_().sum(1)
        chosen = logits.gather(1, ids).to(wide) - largest.unsqueeze(1)
        log_normalizer = normalizer.log()
        loss = log_normalizer - _weighed(weights, chosen).sum(1)
        if uniform is not None:
            loss -= _weighed(uniform, total)
        factor = (~ignored).to(wide)
        if position_weights is not None:
            factor *= position_weights.masked_fill(ignored, 0).to(wide)
        loss = (factor * loss).masked_fill_(ignored, 0)
        ctx.save_for_backward(logits, ids, weights, uniform, ignored, factor, largest, normalizer)
        ctx.overwrite = overwrite
        ctx.mark_non_differentiable(log_normalizer, chosen, total)
        return loss, log_normalizer, chosen, total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        logits, ids, weights, uniform, ignored, factor, largest, normalizer = ctx.saved_tensors
        result = logits.detach() if ctx.overwrite else torch.empty_like(logits)
        factor = (factor * grad).unsqueeze(1)
        sparse = weights * -factor
        everywhere = None if uniform is None else factor * uniform.unsqueeze(1)
        factor = factor / normalizer.unsqueeze(1)
        ignored = ignored.unsqueeze(1)
        for rows in _row_blocks(logits):
            block = logits[rows] - largest[rows].unsqueeze(1)
            block.exp_().mul_(factor[rows])
            if everywhere is not None:
                block.sub_(everywhere[rows])
            block.scatter_add_(1, ids[rows], sparse[rows])
            result[rows] = block.masked_fill_(ignored[rows], 0)  # their logits may be NaN
        return result, None, None, None, None


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
