"""The Triton kernels in Triton's interpreter, through the loss, by PyTorch's operations."""

import os

# Read when a kernel is defined. Nothing else here imports them: there is no GPU, or tests/gpu runs.
os.environ.setdefault("TRITON_INTERPRET", "1")

import pytest
import torch

from fairseq_skd import SelfTeacher, linear_loss, self_kd_linear_cross_entropy
from tests.test_sparse_targets import assert_close, inputs

pytest.importorskip("triton", reason="Triton is for Linux alone")
if torch.cuda.is_available():
    pytest.skip("tests/gpu runs them on the GPU", allow_module_level=True)

DTYPES = {torch.float32: 1e-5, torch.bfloat16: 1.6e-2, torch.float16: 2e-3}


@pytest.fixture
def compute(monkeypatch):
    """Return a function that computes loss and gradients by the kernels, or without them."""
    from fairseq_skd import kernels

    def by(module, features, embedding, *arguments, **options):
        monkeypatch.setattr(linear_loss, "_kernels", lambda device: module)
        found = self_kd_linear_cross_entropy(
            features, embedding, *arguments, top_k=2, count_correct=True, **options
        )
        return found, torch.autograd.grad(found.loss.sum(), [features, embedding])

    def both(*arguments, **options):
        return by(kernels, *arguments, **options), by(None, *arguments, **options)

    return both


def assert_same(ours, expected, tolerance):
    for mine, theirs in zip(ours[0][:5], expected[0][:5]):
        assert_close(mine, theirs, 1e-5)
    assert ours[0].top.ids.equal(expected[0].top.ids)
    for mine, theirs in zip(ours[1], expected[1]):
        assert_close(mine, theirs, tolerance)


@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize(
    "shape", [(1, 40, 3, 1), (9, 33, 4, 5), (5, 4_096, 8, 3), (3, 4_129, 8, 9)]
)
@pytest.mark.parametrize(("smoothing", "weight"), [(0.1, 0.4), (0.0, 0.0)])
def test_any_sparse_target(compute, shape, dtype, smoothing, weight):
    features, embedding, target, soft, factors = inputs(*shape, dtype)
    for reduction in ("sum", "none"):
        found = compute(
            *(features, embedding, target, soft, smoothing, weight),
            position_weights=factors,
            reduction=reduction,
            block_bytes=4 * shape[1] * 4,
        )
        assert_same(*found, DTYPES[dtype])


@pytest.mark.parametrize("candidates", ["neighbors", "both"])
def test_a_teacher(compute, candidates):
    features, embedding, target, _, _ = inputs(20, 97, 8, 1)
    teacher = SelfTeacher(candidates, 5)
    teacher.refresh(embedding)
    assert_same(*compute(features, embedding, target, teacher, 0.1, 0.5), 1e-5)


def test_words_that_may_never_be_said():
    from fairseq_skd import kernels

    logits = torch.randn(3, 5_000, generator=torch.Generator().manual_seed(1))
    logits[:, :4_200] = float("-inf")  # all words that a program takes first
    expected = logits.softmax(1)
    found = kernels.row_statistics(logits, 32)
    assert found.largest.equal(logits.amax(1))
    assert_close(found.largest + found.normalizer.log(), logits.logsumexp(1), 1e-6)
    assert found.maxima[:, :-1].equal(logits[:, :4_992].unflatten(1, (-1, 32)).amax(2))
    ids, weights = torch.tensor([[4_999, 4_999]] * 3), torch.full((3, 2), 0.25)
    kernels.gradient_in_place(logits, ids, weights, None, found, 1.0)
    expected[:, 4_999] -= 0.5
    assert_close(logits, expected, 1e-6)
