"""Is the loss right here? The fast ones against the readable one, on a few positions of a batch.

Some builds of PyTorch compute some operations wrongly without a word (pytorch/pytorch#129093 made
the loss in blocks another objective on the CPU up to torch 2.5.1). No test of ours has seen every
version, processor and driver; so a run looks for itself, on its own data, before it trains.
"""

import platform
from typing import List, Optional

import torch
import torch.nn.functional as F
from torch import Tensor

from fairseq_skd.linear_loss import self_kd_linear_cross_entropy
from fairseq_skd.loss import reference_loss, self_kd_cross_entropy
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget

__all__ = ["POSITIONS", "LossCheckError", "check_linear_loss", "check_loss"]

#: As many positions are computed twice. At V = 267,744 their log-probabilities take 68 MB.
POSITIONS = 64

# What losses and gradients may differ by, relative to the largest. Rounding is far below: up to
# 1e-6, 2e-2 and 4e-3 in the tests, 1e-3 for float32 where products are rounded to TF32. A wrong
# objective is of the size of the gradient itself.
_TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-2}
_HALF_TOLERANCE = 0.1


class LossCheckError(RuntimeError):
    """The loss is wrong on this machine; the message says what to report."""


def check_linear_loss(
    features: Tensor,
    embedding: Tensor,
    target: Tensor,
    soft_target: Optional[SoftTarget],
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
    rows = _rows(len(features), features.device)
    soft = None if soft_target is None else soft_target.at(rows)
    features = features.detach()[rows]
    settings = label_smoothing, weight, ignore_index
    found: List[List[Tensor]] = []
    with torch.enable_grad():
        for linear in (False, True):
            x = features.clone().requires_grad_()
            w = embedding.detach().requires_grad_()
            if linear:
                loss = self_kd_linear_cross_entropy(x, w, target[rows], soft, *settings).loss
            else:
                loss = _reference(F.linear(x, w), target[rows], soft, *settings)
            found.append([loss.detach(), *torch.autograd.grad(loss, [x, w])])
    _compare("self_kd_linear_cross_entropy", found[0], found[1], embedding.dtype)


def check_loss(
    logits: Tensor,
    target: Tensor,
    soft_target: Optional[SoftTarget],
    label_smoothing: float,
    weight: float,
    ignore_index: int,
) -> None:
    """Compare `self_kd_cross_entropy` with `reference_loss` as `check_linear_loss` does."""
    rows = _rows(len(logits), logits.device)
    soft = None if soft_target is None else soft_target.at(rows)
    settings = label_smoothing, weight, ignore_index
    found: List[List[Tensor]] = []
    with torch.enable_grad():
        for closed in (False, True):
            z = logits.detach()[rows].requires_grad_()
            if closed:
                loss = self_kd_cross_entropy(z, target[rows], soft, *settings).loss.sum()
            else:
                loss = _reference(z, target[rows], soft, *settings)
            found.append([loss.detach(), *torch.autograd.grad(loss, [z])])
    _compare("self_kd_cross_entropy", found[0], found[1], logits.dtype)


def soft_target_of(
    teacher: SelfTeacher, scores: Tensor, target: Tensor, embedding: Tensor
) -> SoftTarget:
    """Return the soft target of every position, also if it depends on the prediction."""
    prediction = scores.argmax(1) if teacher.needs_prediction else None
    return teacher.soft_target(target, prediction, embedding)


def _rows(count: int, device: torch.device) -> Tensor:
    """Spread over the batch, so that padding is among them."""
    return torch.linspace(0, max(count - 1, 0), min(count, POSITIONS), device=device).long()


def _reference(
    logits: Tensor, target: Tensor, soft: Optional[SoftTarget], *settings: float
) -> Tensor:
    wide = torch.promote_types(logits.dtype, torch.float32)
    lprobs = F.log_softmax(logits, 1, dtype=wide)
    return reference_loss(lprobs, target, soft, *settings).loss.sum()  # type: ignore[arg-type]


def _compare(name: str, expected: List[Tensor], ours: List[Tensor], dtype: torch.dtype) -> None:
    tolerance = _TOLERANCE.get(dtype, _HALF_TOLERANCE)
    wrong, errors = [], []
    for mine, theirs in zip(ours, expected):
        error = (mine - theirs).abs().max() / theirs.abs().max().clamp(min=1e-6)
        errors.append(error)
        # A model that has diverged is not the loss's fault.
        wrong.append(~(error <= tolerance) & theirs.isfinite().all())
    if torch.stack(wrong).any():
        shown = ", ".join(f"{error:.2g}" for error in torch.stack(errors).tolist())
        raise LossCheckError(
            f"self-KD: {name} is wrong on this machine: on the same positions it and the readable "
            f"reference differ by {shown} (relative; the loss, then gradients), where rounding of "
            f"{dtype} explains {tolerance}. Training would follow another objective, so it ends "
            f"here. Please report this with: torch {torch.__version__}, Python "
            f"{platform.python_version()}, {_device(expected[0])}, {platform.machine()}, "
            f"{torch.get_num_threads()} threads"
        )


def _device(tensor: Tensor) -> str:
    if tensor.device.type == "cuda":
        return f"{torch.cuda.get_device_name(tensor.device)} (CUDA {torch.version.cuda})"
    return str(tensor.device)
