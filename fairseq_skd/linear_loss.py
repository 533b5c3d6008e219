"""Output projection and loss together: logits exist for one block of positions at a time.

The gradient of the loss with respect to the logits is known as soon as they are (`loss`), up to
the factor that comes from above. So each block of logits is made, turned into its gradient in
place, multiplied into the gradients of the features and of the projection, and forgotten. The
work is the three matrix products that training needs anyway, and a few passes over the block. The
memory is one block, where logits, log-probabilities and their gradient would take 3 N x V floats.

What is uniform over the vocabulary needs no pass at all: sum_v z_v = x . sum_v W_v, and its
gradient is sum_v W_v for the features and the same vector, sum_i x_i, for every row of W.

On a CPU a block is transposed, words x positions. A product writes tiles of its result, and in
rows of a few hundred positions a tile is one compact piece of memory; in rows of V words each of
its lines lies in another page. On two cores (AVX2, MKL, d = 512 and 256) the product that makes the
logits of 160 to 320 positions ran 1.2 to 1.4 times as fast this way at V = 32,768 and 100,000, and
the three products together about 1.1 times. On a GPU it is positions x words, as our kernels read
it (`kernels`, where Triton works); what is written below indexes a transposed view of it.

Half precision. Logits have the type that ``F.linear`` would give them; everything else is float32,
but for the operands of products, whose sums are float32. A float16 operand is multiplied by a power
of two of our own before it is rounded, and the sum divided by it. So no gradient depends on the
loss scale, which is known only when the backward pass begins.

Indices are along the last dimension everywhere, by way of a transposed view where that is not the
one that is meant: up to torch 2.5.1 the CPU's ``gather`` and ``scatter_add`` along dimension 0
take an index of shape 1 x N or N x 1 for an expanded one and are silently wrong
(pytorch/pytorch#129093).
"""

from contextlib import nullcontext
from dataclasses import dataclass, replace
from typing import Any, List, NamedTuple, Optional, Tuple, Union

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.torch_version import TorchVersion

from fairseq_skd.blocks import GROUP, argmax, block_positions, largest_of, maxima_of, padded
from fairseq_skd.loss import (
    TopWords,
    check_arguments,
    distilled,
    known_soft_target,
    known_targets,
    training_target,
)
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget

__all__ = ["LinearLosses", "self_kd_linear_cross_entropy"]

# What a gradient of the logits, which lies between -1 and 1, is multiplied by in float16: half of
# the largest number's power of two. Then values down to 2e-9 keep all of float16's digits.
_FLOAT16_SCALE = 2.0**15


class LinearLosses(NamedTuple):
    """Sums over all positions that count, or one value a position (losses in nats).

    Attributes
    ----------
    loss : Tensor
        What to train on, with the positions' weights. The others are without them, and carry no
        gradient.
    nll_loss : Tensor
        Negative log-likelihood of the targets.
    self_kd_loss : Tensor
        Cross-entropy to the soft targets (times their `share`); 0 without them.
    mass : Tensor
        Probability that soft targets give to words other than the target (times their `share`).
    correct : Tensor, optional
        Positions whose largest logit is the target, if asked for.
    top : TopWords, optional
        Of every position, if asked for.
    """

    loss: Tensor
    nll_loss: Tensor
    self_kd_loss: Tensor
    mass: Tensor
    correct: Optional[Tensor]
    top: Optional[TopWords] = None


def self_kd_linear_cross_entropy(
    features: Tensor,
    embedding: Tensor,
    target: Tensor,
    soft_target: Union[SoftTarget, SelfTeacher, None] = None,
    label_smoothing: float = 0.0,
    weight: float = 0.0,
    ignore_index: int = -100,
    position_weights: Optional[Tensor] = None,
    reduction: str = "sum",
    count_correct: bool = False,
    top_k: int = 0,
    block_bytes: Optional[int] = None,
) -> LinearLosses:
    """Compute what `self_kd_cross_entropy` gives for ``features @ embedding.t()``.

    The gradients of the sum are computed in the forward pass and multiplied by the gradient of
    the sum in the backward pass, which can run once. Losses a position may get any gradient from
    above, so theirs are computed in the backward pass, from logits that are made again: four
    products instead of three, and as many backward passes as you like. Where no gradient is wanted
    (``torch.no_grad``, or nothing requires one) there is one product.

    Parameters
    ----------
    features : Tensor
        N x d, float16, bfloat16, float32 or float64.
    embedding : Tensor
        The output projection W, V x d, of the same dtype and device. Under autocast both may be
        of any type: products are computed in autocast's, as ``F.linear`` would.
    target : Tensor
        int64, N.
    soft_target : SoftTarget or SelfTeacher, optional
        From anywhere (`SoftTarget` says how it is read), or who makes it. Needed if ``weight`` > 0,
        and not looked at otherwise.
    label_smoothing, weight, ignore_index, position_weights
        As for `self_kd_cross_entropy`.
    reduction : {"sum", "none"}
        Sums, or one value a position.
    count_correct : bool
        Also say where the model's first choice is the target.
    top_k : int
        Also return so many most probable words of every position.
    block_bytes : int, optional
        Bound on a float32 block of logits. Default: 24 MiB on a CPU, or 160 positions where that
        is more; elsewhere 512 MiB, or half of the float32 gradient of W where that is more. At
        least one position is always taken.

    Returns
    -------
    LinearLosses
        float32 (float64 for float64).

    Raises
    ------
    ValueError
        If ``weight`` > 0 without a soft target, or a dtype, a shape or the reduction is not
        supported.
    RuntimeError
        If a target is no word, see `known_targets`; at a second backward pass through a sum.
    """
    check_arguments(len(features), target, soft_target, weight, position_weights)
    if reduction not in ("sum", "none"):
        raise ValueError(f"reduction is {reduction!r}; allowed: sum, none")
    device = features.device.type
    compute = features.dtype
    if _autocast_is_on(device) and compute != torch.float64:  # which it leaves alone
        compute = torch.get_autocast_dtype(device)
    elif features.dtype != embedding.dtype:
        raise ValueError(
            f"features are {features.dtype} and the embedding is {embedding.dtype}; without "
            "autocast both must be the same"
        )
    target, ignored = known_targets(target, ignore_index, len(embedding))
    if isinstance(soft_target, SoftTarget) and weight > 0:
        soft_target = known_soft_target(soft_target, ignored, len(embedding))
    problem = _Problem(
        target,
        ignored,
        None if weight == 0 else soft_target,
        label_smoothing,
        weight,
        position_weights,
        count_correct,
        min(top_k, len(embedding)),
        compute,
        block_positions(features, embedding, block_bytes),
    )
    function = _SummedLoss if reduction == "sum" else _LossOfPositions
    # Said here, since a Function is told that a parameter needs a gradient under no_grad too.
    wanted = [torch.is_grad_enabled() and x.requires_grad for x in (features, embedding)]
    loss, nll, kd, mass, correct, ids, lprobs = function.apply(
        features, embedding, problem, *wanted
    )
    return LinearLosses(
        loss,
        nll,
        kd,
        mass,
        correct if count_correct else None,
        TopWords(ids, lprobs) if top_k else None,
    )


def _autocast_is_on(device: str) -> bool:
    return torch.amp.is_autocast_available(device) and torch.is_autocast_enabled(device)


@dataclass
class _Problem:
    """What is to be computed of features and an embedding."""

    target: Tensor
    ignored: Tensor
    soft_target: Union[SoftTarget, SelfTeacher, None]
    label_smoothing: float
    weight: float
    position_weights: Optional[Tensor]
    count_correct: bool
    top_k: int
    compute: torch.dtype
    block_positions: int

    def factors(self, grad: Union[float, Tensor], dtype: torch.dtype) -> Tensor:
        """Return the gradient of the result with respect to every position's loss, N."""
        factors = torch.ones_like(self.target, dtype=dtype)
        if self.position_weights is not None:
            factors *= self.position_weights.detach().to(dtype)
        return (factors * grad).masked_fill_(self.ignored, 0)


class _Result(NamedTuple):
    """Values of every position, and the gradients of features and embedding.

    ``grad_embedding * factor + column`` is the gradient of the embedding: what every row has in
    common, and what all are multiplied by, wait for the pass that the backward pass makes anyway.
    """

    values: List[Tensor]  # loss, nll, kd, mass, correct; then ids and log-probabilities, N x k
    soft_target: Optional[SoftTarget]
    grad_features: Optional[Tensor] = None
    grad_embedding: Optional[Tensor] = None
    factor: Union[float, Tensor] = 1.0
    column: Optional[Tensor] = None


def _compute(
    features: Tensor,
    embedding: Tensor,
    problem: _Problem,
    factors: Optional[Tensor],
    for_features: bool,
    for_embedding: bool,
) -> _Result:
    """Go through all positions in blocks.

    ``factors`` is what `_Problem.factors` gives, None if no gradient is wanted.
    """
    device = features.device.type
    off = torch.autocast(device, enabled=False) if _autocast_is_on(device) else nullcontext()
    with torch.no_grad(), off:
        wide = torch.promote_types(features.dtype, torch.float32)
        table = embedding
        # Positions that do not count may hold NaN, which would reach the gradient of the table.
        features = features.masked_fill(problem.ignored.unsqueeze(1), 0).to(problem.compute)
        embedding = embedding.to(problem.compute)
        num_positions, num_words = len(features), len(embedding)
        kernels = None if problem.compute == torch.float64 else _kernels(features.device)
        # Whether the block holds all of the gradient, and nothing of it waits for the products.
        whole = kernels is not None or problem.compute != wide
        scale = _FLOAT16_SCALE if problem.compute == torch.float16 else 1.0
        teacher = problem.soft_target
        per_block = isinstance(teacher, SelfTeacher) and teacher.needs_prediction
        soft = None
        if isinstance(teacher, SelfTeacher) and not per_block:
            soft = teacher.soft_target(problem.target)
        elif isinstance(teacher, SoftTarget):
            soft = teacher
        row_sum = None
        if problem.label_smoothing or teacher is not None:
            row_sum = embedding.sum(0, dtype=wide)

        values = [features.new_zeros(num_positions, dtype=wide) for _ in range(5)]
        top_ids = problem.target.new_empty(num_positions, problem.top_k)
        top_lprobs = features.new_empty(num_positions, problem.top_k, dtype=wide)
        soft_blocks: List[SoftTarget] = []
        grad_features = grad_embedding = column = None
        factor: Union[float, Tensor] = 1.0
        if factors is not None and for_features:
            grad_features = features.new_empty(features.shape, dtype=wide)
        if factors is not None and for_embedding:
            allocate = features.new_empty if num_positions else features.new_zeros
            grad_embedding = allocate(embedding.shape, dtype=wide)
            if whole:
                # The largest factor's power of two, so that no position leaves float16's range.
                largest = factors.abs().amax() if num_positions else factors.new_ones(())
                unit = largest.clamp(min=torch.finfo(wide).tiny).log2().ceil().exp2()
                factor = unit / scale
            elif row_sum is not None:
                column = features.new_zeros(embedding.size(1), dtype=wide)

        # Rows beyond the vocabulary fill the last group of the search for the largest logits.
        padded_words = padded(num_words)
        buffer = features.new_empty(padded_words * problem.block_positions)
        for start in range(0, num_positions, problem.block_positions):
            part = slice(start, start + problem.block_positions)
            x, target = features[part], problem.target[part]
            # In one piece also where the last block is smaller.
            block = buffer[: padded_words * len(x)]
            if device == "cpu" and kernels is None:
                block = block.view(padded_words, len(x))
            else:
                block = block.view(len(x), padded_words).t()
            torch.mm(embedding, x.t(), out=block[:num_words])
            block[num_words:] = float("-inf")
            if kernels is None:
                block = block.to(wide)
                logits = block[:num_words]
                largest = logits.amax(0)
                if problem.count_correct or per_block or problem.top_k:
                    maxima = maxima_of(block)
            else:
                logits = block[:num_words]
                statistics = kernels.row_statistics(logits.t(), GROUP)
                largest, normalizer, maxima = statistics
                maxima = maxima.t()

            prediction = None
            if problem.count_correct or per_block:
                prediction = argmax(block, maxima)
            if per_block:
                soft_block = teacher.soft_target(target, prediction, table)  # type: ignore[union-attr]
                soft_blocks.append(soft_block)
            else:
                soft_block = None if soft is None else soft.at(part)
            ids, weights, uniform = training_target(
                target, soft_block, problem.label_smoothing, problem.weight, num_words, wide
            )
            # All of these are less the largest logit, as `loss` says.
            chosen = block.t().gather(1, ids).to(wide) - largest.unsqueeze(1)
            if problem.top_k:
                found, values_of = largest_of(block, maxima, problem.top_k)
                top_ids[part] = found.clamp_(max=num_words - 1)  # fewer are possible than k
                top_lprobs[part] = values_of.to(wide) - largest.unsqueeze(1)
            if kernels is None:
                logits.sub_(largest).exp_()
                normalizer = logits.sum(0)
            log_normalizer = normalizer.log()
            loss = log_normalizer - (weights * chosen).sum(1)
            total = largest if row_sum is None else x.to(wide) @ row_sum - num_words * largest
            if uniform is not None:
                loss -= uniform * total
            values[0][part] = loss
            values[1][part] = log_normalizer - chosen[:, 0]
            if soft_block is not None:
                values[2][part], values[3][part] = distilled(
                    soft_block, target, log_normalizer, chosen[:, 1:], total, num_words
                )
            if problem.count_correct:
                values[4][part] = prediction.eq(target).to(wide)  # type: ignore[union-attr]
            if problem.top_k:
                top_lprobs[part] -= log_normalizer.unsqueeze(1)
            if grad_features is None and grad_embedding is None:
                continue

            # The gradient is softmax(z) - s - u. On a CPU the block holds exponentials less
            # s * normalizer: what they are divided by goes to the narrow side of both products,
            # and u is no part of the block either, unless rounding would be seen.
            assert factors is not None
            narrow = factors[part]
            if kernels is not None:
                kernels.gradient_in_place(logits.t(), ids, weights, uniform, statistics, scale)
            elif whole:
                everywhere = torch.zeros_like(largest) if uniform is None else -scale * uniform
                torch.addcmul(everywhere, logits, scale / normalizer, out=logits)
                logits.t().scatter_add_(1, ids, weights * -scale)
            else:
                narrow = narrow / normalizer
                logits.t().scatter_add_(1, ids, weights * -normalizer.unsqueeze(1))
            gradient = logits.to(problem.compute)
            if grad_features is not None:
                grad_x = _product(gradient.t(), embedding, wide)
                grad_x.mul_((narrow / scale).unsqueeze(1))
                if uniform is not None and not whole:
                    assert row_sum is not None
                    grad_x.addcmul_((factors[part] * uniform).unsqueeze(1), row_sum, value=-1)
                grad_features[part] = grad_x
            if grad_embedding is not None:
                if whole:
                    narrow = narrow / unit
                scaled = (narrow.unsqueeze(1) * x).to(problem.compute)
                _add_product(grad_embedding, gradient, scaled, first=start == 0)
                if column is not None and uniform is not None:
                    column -= (factors[part] * uniform) @ x.to(wide)

        values = [value.masked_fill_(problem.ignored, 0) for value in values]
        if soft_blocks:
            soft = SoftTarget(*(torch.cat(parts) for parts in zip(*(s[:2] for s in soft_blocks))))
        values += [top_ids, top_lprobs]
        return _Result(values, soft, grad_features, grad_embedding, factor, column)


def _kernels(device: torch.device) -> Any:
    """Return the module of our Triton kernels if they run on a device.

    Imported only there: elsewhere Triton would cost a start half a second.
    """
    if device.type != "cuda" or torch.version.cuda is None:
        return None
    try:
        from fairseq_skd import kernels
    except ImportError:
        return None
    return kernels if kernels.usable(device) else None


def _product(a: Tensor, b: Tensor, wide: torch.dtype) -> Tensor:
    """Return a @ b, of whatever type they are, in float32 (float64 for float64).

    It is float32 from the first sum on: rounded in between, a gradient would have a larger error
    than that of one product over all positions (as in bfloat16 on a GPU with torch before 2.8,
    which cannot do otherwise), and in float16 it could overflow. A CPU computes products of half
    precision no faster.
    """
    if a.dtype == wide:
        return torch.mm(a, b)
    if _sums_in_float32(a):
        return torch.mm(a, b, out_dtype=wide)  # type: ignore[call-overload]
    if a.device.type == "cuda" and a.dtype == torch.bfloat16:
        return torch.mm(a, b).to(wide)
    return torch.mm(a.to(wide), b.to(wide))


def _add_product(result: Tensor, a: Tensor, b: Tensor, first: bool) -> None:
    """Add a @ b to the result, float32 (float64 for float64); at first in place of what it holds.

    Without a tensor of its size where that can be: at V = 128,256 and d = 4,096 it has 2 GiB.
    """
    beta = 0 if first else 1
    if a.dtype == result.dtype:
        result.addmm_(a, b, beta=beta)
    elif _sums_in_float32(a):
        torch.addmm(result, a, b, beta=beta, out_dtype=result.dtype, out=result)  # type: ignore[call-overload]
    elif first:
        result.copy_(_product(a, b, result.dtype))
    else:
        result += _product(a, b, result.dtype)


def _sums_in_float32(a: Tensor) -> bool:
    """Whether PyTorch has products of half precision with a result in float32 there."""
    on_gpu = a.device.type == "cuda" and torch.version.cuda is not None
    return on_gpu and TorchVersion(torch.__version__) >= "2.8"


def _finished(result: _Result, grad: Union[float, Tensor], dtype: torch.dtype) -> Optional[Tensor]:
    """Return the gradient of the embedding, multiplied by ``grad``, in its own type.

    What float16 cannot hold becomes infinite there, so that a loss scaler sees it.
    """
    gradient = result.grad_embedding
    if gradient is None:
        return None
    factor = result.factor * grad
    if dtype == gradient.dtype:
        gradient.mul_(factor)
    else:  # in one pass
        out = gradient.new_empty(gradient.shape, dtype=dtype)
        gradient = torch.mul(gradient, factor, out=out)
    if result.column is not None:
        gradient.add_(result.column * grad)
    return gradient


class _SummedLoss(torch.autograd.Function):
    """Sums over positions; the gradients are made in the forward pass."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, features: Tensor, embedding: Tensor, problem: _Problem, *wanted: bool
    ) -> Tuple[Tensor, ...]:
        wide = torch.promote_types(features.dtype, torch.float32)
        factors = problem.factors(1.0, wide)
        result = _compute(features, embedding, problem, factors if any(wanted) else None, *wanted)
        loss, *others = result.values[:5]
        sums = [(loss * factors).sum(), *(x.sum() for x in others)]
        top = result.values[5:]
        ctx.result, ctx.dtypes = result._replace(values=[]), (features.dtype, embedding.dtype)
        ctx.mark_non_differentiable(*sums[1:], *top)
        return (*sums, *top)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        if ctx.result is None:
            raise RuntimeError(
                "self_kd_linear_cross_entropy: a second backward pass through the same sum; "
                "compute the loss again, or use reduction='none', which allows it"
            )
        # Handed over, not kept: autograd can then take W's gradient without a copy.
        result, ctx.result = ctx.result, None
        grad_features = result.grad_features
        if grad_features is not None:
            grad_features = grad_features.mul_(grad).to(ctx.dtypes[0])
        return (grad_features, _finished(result, grad, ctx.dtypes[1]), None, None, None)


class _LossOfPositions(torch.autograd.Function):
    """Values of every position; the gradients are made in the backward pass, from new logits."""

    @staticmethod
    def forward(  # type: ignore[override]
        ctx: Any, features: Tensor, embedding: Tensor, problem: _Problem, *wanted: bool
    ) -> Tuple[Tensor, ...]:
        result = _compute(features, embedding, problem, None, False, False)
        loss, *others = result.values
        ctx.save_for_backward(features, embedding)
        # Without what only the forward pass is asked for; the soft target stays what it was.
        ctx.problem = replace(problem, soft_target=result.soft_target, count_correct=False, top_k=0)
        ctx.wanted = wanted
        ctx.mark_non_differentiable(*others)
        return (problem.factors(1.0, loss.dtype) * loss, *others)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Tuple[Optional[Tensor], ...]:  # type: ignore[override]
        features, embedding = ctx.saved_tensors
        factors = ctx.problem.factors(grad, grad.dtype)
        result = _compute(features, embedding, ctx.problem, factors, *ctx.wanted)
        grad_features = result.grad_features
        if grad_features is not None:
            grad_features = grad_features.to(features.dtype)
        return (grad_features, _finished(result, 1.0, embedding.dtype), None, None, None)
