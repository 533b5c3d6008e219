"""The passes over a block of logits as two Triton kernels, for a GPU.

A block of N x V logits is read by PyTorch's operations ten times and written five times, in
float32, between the products that make it and use it (`linear_loss`). The products are short where
the features are narrow, d = 512: then these passes take longer than they do. Here one kernel reads
the logits once, in their own type, and one reads them again and writes the gradient in their place.

A program is one position: its row is contiguous. What PyTorch's operations compute is the
reference; on a CPU these kernels run in Triton's interpreter (``TRITON_INTERPRET=1``).
"""

import functools
import logging
from contextlib import nullcontext
from typing import Any, NamedTuple, Optional

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["RowStatistics", "gradient_in_place", "row_statistics", "usable"]

logger = logging.getLogger(__name__)

# Words that a program takes at once: a multiple of a group of words, and few enough registers.
_BLOCK = 4096
_WARPS = 8


class RowStatistics(NamedTuple):
    """Of every position (float32): the largest logit and the sum of exp(logit - largest).

    ``maxima`` are those of groups of words, N x groups.
    """

    largest: Tensor
    normalizer: Tensor
    maxima: Tensor


@functools.lru_cache(maxsize=None)
def usable(device: torch.device) -> bool:
    """Whether the kernels run on a GPU. The first time they are tried, which takes seconds."""
    try:
        logits = torch.zeros(1, 64, device=device)
        target = torch.zeros(1, 1, dtype=torch.int64, device=device)
        statistics = row_statistics(logits, 32)
        gradient_in_place(logits, target, torch.ones_like(target) * 1.0, None, statistics, 1.0)
        torch.cuda.synchronize(device)
    except Exception as error:  # anything: no compiler, an old driver, an old GPU
        logger.warning(
            f"self_kd: Triton does not work on {torch.cuda.get_device_name(device)} "
            f"({type(error).__name__}: {error}); PyTorch's operations are used, which are slower"
        )
        return False
    return True


def row_statistics(logits: Tensor, group: int) -> RowStatistics:
    """Read logits once.

    Parameters
    ----------
    logits : Tensor
        N x V, float16, bfloat16 or float32, each row contiguous.
    group : int
        Words in one group, a power of two up to 4,096.
    """
    rows, num_words = logits.shape
    largest, normalizer = logits.new_empty(2, rows, dtype=torch.float32)
    maxima = logits.new_empty(rows, -(-num_words // group), dtype=torch.float32)
    with _on(logits):
        _row_statistics[(rows,)](
            *(logits, largest, normalizer, maxima, num_words, logits.stride(0), maxima.size(1)),
            GROUP=group,
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )
    return RowStatistics(largest, normalizer, maxima)


def gradient_in_place(
    logits: Tensor,
    ids: Tensor,
    weights: Tensor,
    uniform: Optional[Tensor],
    statistics: RowStatistics,
    scale: float,
) -> None:
    """Replace logits by ``scale * (softmax - weights of ids - uniform)``, rounded once.

    Parameters
    ----------
    logits : Tensor
        As for `row_statistics`.
    ids, weights : Tensor
        int64 and float32, N x C: a word that stands in several columns gets the sum.
    uniform : Tensor, optional
        float32, N.
    statistics : RowStatistics
        Of these logits.
    scale : float
        A power of two.
    """
    (rows, num_words), columns = logits.shape, ids.size(1)
    with _on(logits):
        _gradient_in_place[(rows,)](
            *(logits, ids.contiguous(), weights.contiguous()),
            *(weights if uniform is None else uniform, statistics.largest, statistics.normalizer),
            *(scale, num_words, logits.stride(0), columns),
            HAS_UNIFORM=uniform is not None,
            COLUMNS=triton.next_power_of_2(columns),
            BLOCK=_BLOCK,
            num_warps=_WARPS,
        )


def _on(logits: Tensor) -> Any:
    """Let a kernel be launched on the tensor's GPU, which need not be the current one."""
    return torch.cuda.device(logits.device) if logits.device.type == "cuda" else nullcontext()


@triton.jit
def _row_statistics(  # type: ignore[no-untyped-def]
    logits,
    largest,
    normalizer,
    maxima,
    num_words,
    stride,
    num_groups,
    GROUP: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    maxima += row * num_groups
    words = tl.arange(0, BLOCK)
    groups = tl.arange(0, BLOCK // GROUP)
    highest = float("-inf")
    total = 0.0
    for start in range(0, num_words, BLOCK):
        inside = start + words < num_words
        z = tl.load(logits + start + words, inside, float("-inf")).to(tl.float32)
        of_groups = tl.max(tl.reshape(z, (BLOCK // GROUP, GROUP)), 1)
        group = start // GROUP + groups
        tl.store(maxima + group, of_groups, group < num_groups)
        higher = tl.maximum(highest, tl.max(of_groups, 0))
        # Words that may never be said have -inf, and -inf less -inf would be NaN.
        shift = tl.where(higher == float("-inf"), 0.0, higher)
        total = total * tl.exp(highest - shift) + tl.sum(tl.exp(z - shift), 0)
        highest = higher
    tl.store(largest + row, highest)
    tl.store(normalizer + row, total)


@triton.jit
def _gradient_in_place(  # type: ignore[no-untyped-def]
    logits,
    ids,
    weights,
    uniform,
    largest,
    normalizer,
    scale,
    num_words,
    stride,
    num_columns,
    HAS_UNIFORM: tl.constexpr,
    COLUMNS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    logits += row * stride
    ids += row * num_columns
    weights += row * num_columns
    highest = tl.load(largest + row)
    factor = scale / tl.load(normalizer + row)
    everywhere = 0.0
    if HAS_UNIFORM:
        everywhere = scale * tl.load(uniform + row)

    # The sparse part first, while its logits are there; of a word in several columns all
    # columns hold the same, so that it does not matter which of them is written last.
    columns = tl.arange(0, COLUMNS)
    used = columns < num_columns
    word = tl.load(ids + columns, used, 0)
    sparse = tl.zeros((COLUMNS,), tl.float32)
    for j in range(num_columns):
        sparse += tl.where(word == tl.load(ids + j), tl.load(weights + j), 0.0)
    chosen = tl.load(logits + word, used, float("-inf")).to(tl.float32)
    chosen = factor * tl.exp(chosen - highest) - everywhere - scale * sparse

    words = tl.arange(0, BLOCK)
    tl.debug_barrier()  # no thread may write before all have read
    for start in range(0, num_words, BLOCK):
        inside = start + words < num_words
        z = tl.load(logits + start + words, inside, float("-inf")).to(tl.float32)
        gradient = factor * tl.exp(z - highest) - everywhere
        tl.store(logits + start + words, gradient.to(logits.dtype.element_ty), inside)
    tl.debug_barrier()  # nor the sparse part before all have written
    tl.store(logits + word, chosen.to(logits.dtype.element_ty), used)
