"""Is the loss right here? The fast ones against the readable one, on a few positions of a batch.

Some builds of PyTorch compute some operations wrongly without a word (pytorch/pytorch#129093 made
the loss in blocks another objective on the CPU up to torch 2.5.1). No test of ours has seen every
version, processor and driver; so a run looks for itself, on its own data, before it trains.
"""

import platform
from typing import Optional, Union

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_skd.linear_loss import self_kd_linear_cross_entropy
from fairseq_skd.loss import reference_loss, self_kd_cross_entropy
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget

__all__ = ["LossCheckError", "check_linear_loss", "check_loss", "soft_target_of"]

# As many positions are computed twice, and fewer where their log-probabilities would take more than
# 4 MiB: the check must not be what decides whether a training fits into memory.
_POSITIONS = 64
_BYTES = 4 * 2**20

# What losses and gradients may differ by, relative to the largest. Rounding is below (float32 has
# room for TF32, which keeps 10 bits); another objective differs by about the gradient itself.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.1
# The part of an untrained model's values below which an error counts nothing; see `_error`.
_SMALL = 1e-2


class LossCheckError(RuntimeError):
    """The loss is wrong on this machine; the message says what to report."""


def check_linear_loss(
    features: Tensor,
    embedding: Tensor,
    target: Tensor,
    soft_target: Union[SoftTarget, SelfTeacher, None],
    label_smoothing: float,
    weight: float,
    ignore_index: int,
) -> None:
    """Compare `self_kd_linear_cross_entropy` with `reference_loss` on up to 64 positions.

    Under autocast if it is on. Waits for the device, once.

    Raises
    ------
    LossCheckError
        If the loss or a gradient differs by more than rounding.
    """
    rows = _rows(len(features), len(embedding), features.device)
    if not len(rows):
        return
    target, features = target[rows], features.detach()[rows]
    settings = label_smoothing, weight, ignore_index
    logits = F.linear(features, embedding.detach()).detach().requires_grad_()
    soft = _at(soft_target, rows, logits, target, embedding)
    with torch.enable_grad():
        expected = _reference(logits, target, soft, *settings)
        (slopes,) = torch.autograd.grad(expected, logits)
        x = features.clone().requires_grad_()
        w = embedding.detach().requires_grad_()
        loss = self_kd_linear_cross_entropy(x, w, target, soft, *settings).loss
        grad_x, grad_w = torch.autograd.grad(loss, [x, w])
    with torch.no_grad():
        errors = [_error(loss, expected, len(rows))]
        errors.append(_error(grad_x, slopes @ w.to(slopes.dtype), _largest(w)))
        # In parts, since there need not be room for two gradients of the table.
        x = features.to(slopes.dtype)
        allowed = torch.maximum(_largest(x), _largest(grad_w) / _SMALL)
        for part in torch.arange(len(w), device=w.device).split(2**11):
            errors.append(_error(grad_w[part], slopes[:, part].t() @ x, allowed))
    _judge("self_kd_linear_cross_entropy", torch.stack(errors), embedding)


def check_loss(
    logits: Tensor,
    target: Tensor,
    soft_target: Optional[SoftTarget],
    label_smoothing: float,
    weight: float,
    ignore_index: int,
) -> None:
    """Compare `self_kd_cross_entropy` with `reference_loss` as `check_linear_loss` does."""
    rows = _rows(len(logits), logits.size(1), logits.device)
    if not len(rows):
        return
    target = target[rows]
    soft = _at(soft_target, rows, logits[rows], target, logits)
    settings = label_smoothing, weight, ignore_index
    with torch.enable_grad():
        z = logits.detach()[rows].requires_grad_()
        expected = _reference(z, target, soft, *settings)
        loss = self_kd_cross_entropy(z, target, soft, *settings).loss.sum()
        pairs = [(loss, expected)]
        pairs.append((torch.autograd.grad(loss, z)[0], torch.autograd.grad(expected, z)[0]))
    scales = len(rows), 1.0
    errors = [_error(a.detach(), b.detach(), scale) for (a, b), scale in zip(pairs, scales)]
    _judge("self_kd_cross_entropy", torch.stack(errors), logits)


def soft_target_of(
    teacher: SelfTeacher, scores: Tensor, target: Tensor, embedding: Tensor
) -> SoftTarget:
    """Return the soft target of every position, also if it depends on the prediction."""
    prediction = scores.argmax(1) if teacher.needs_prediction else None
    return teacher.soft_target(target, prediction, embedding)


def _rows(count: int, num_words: int, device: torch.device) -> Tensor:
    """Spread over the batch, so that padding is among them."""
    most = max(8, min(_POSITIONS, _BYTES // (4 * num_words)))
    return torch.linspace(0, max(count - 1, 0), min(count, most), device=device).long()


def _at(
    soft: Union[SoftTarget, SelfTeacher, None],
    rows: Tensor,
    logits: Tensor,
    target: Tensor,
    embedding: Tensor,
) -> Optional[SoftTarget]:
    if isinstance(soft, SoftTarget) and soft.share is not None:
        # Of the past, nothing of which need be there yet: what it will be one day.
        values, ids = logits.detach().float().log_softmax(1).topk(soft.ids.size(1), 1)
        return SoftTarget(ids, 0.9 * values.exp())
    if isinstance(soft, SelfTeacher):
        # The same one for both losses: of two nearly equal logits either may come out first.
        return soft_target_of(soft, logits.detach(), target, embedding)
    return None if soft is None else soft.at(rows)


def _reference(
    logits: Tensor, target: Tensor, soft: Optional[SoftTarget], *settings: float
) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    lprobs = F.log_softmax(logits, 1, dtype=wide)
    return reference_loss(lprobs, target, soft, *settings).loss.sum()  # type: ignore[arg-type]


def _error(ours: Tensor, expected: Tensor, scale: Union[float, Tensor]) -> Tensor:
    """Return the largest difference, relative to the largest value that is expected.

    ``scale`` is what a value can be of an untrained model: of that at least `_SMALL` counts, since
    what a model has learnt by heart is lost in rounding, whichever way it is computed.
    """
    scale = torch.as_tensor(scale, dtype=torch.float32, device=expected.device)
    largest = torch.maximum(_largest(expected), scale * _SMALL).clamp(min=1e-30)
    error = (ours.float() - expected.float()).abs().amax() / largest
    # A model that has diverged is not the loss's fault.
    return torch.where(expected.isfinite().all(), error, torch.zeros_like(error))


def _largest(values: Tensor) -> Tensor:
    low, high = values.detach().aminmax()  # makes nothing of the size of a table
    return torch.maximum(-low, high).float()


def _judge(name: str, errors: Tensor, like: Tensor) -> None:
    tolerance = _TOLERANCE.get(like.dtype, _HALF_TOLERANCE)
    if torch.is_autocast_enabled(like.device.type):
        tolerance = _HALF_TOLERANCE
    loss, *gradients = errors.tolist()
    if not (loss <= tolerance and max(gradients) <= tolerance):
        raise LossCheckError(
            f"self-KD: {name} is wrong on this machine: on the same positions it and the readable "
            f"reference differ by {loss:.2g} in the loss and {max(gradients):.2g} in a gradient "
            f"(relative), where rounding explains {tolerance}. Training would follow another "
            f"objective, so it ends here. Please report this with: torch {torch.__version__}, "
            f"Python {platform.python_version()}, {_device(like)}, {like.dtype}, "
            f"{platform.machine()}, {torch.get_num_threads()} threads"
        )


def _device(tensor: Tensor) -> str:
    if tensor.device.type == "cuda":
        return f"{torch.cuda.get_device_name(tensor.device)} (CUDA {torch.version.cuda})"
    return str(tensor.device)
