"""Targets from anywhere, losses a position, top words, padding, precision, by the reference."""

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_skd import (
    SelfTeacher,
    SoftTarget,
    loss,
    reference_loss,
    self_kd_cross_entropy,
    self_kd_linear_cross_entropy,
)
from fairseq_skd.self_check import check_linear_loss, check_loss

# Sizes of 1 are where some versions of torch index wrongly.
SHAPES = [(1, 40, 3, 1), (1, 40, 3, 4), (9, 40, 3, 1), (9, 33, 4, 5), (50, 97, 8, 4), (3, 2, 1, 1)]
TOLERANCE = {torch.float64: 1e-6, torch.float32: 3e-6, torch.bfloat16: 3e-2, torch.float16: 3e-3}
DTYPES = list(TOLERANCE)
SETTINGS = [(0.1, 0.4), (0.0, 1.0), (0.2, 0.0), (0.0, 0.5)]


def inputs(positions, words, dim, width, dtype=torch.float32, complete=False, share=True):
    """Features, a projection, targets of which some are ignored, a soft target and weights."""
    generator = torch.Generator().manual_seed(positions * words + width)
    features = torch.randn(positions, dim, generator=generator).to(dtype).requires_grad_()
    embedding = torch.randn(words, dim, generator=generator).to(dtype).requires_grad_()
    target = torch.randint(words, (positions,), generator=generator)
    target[4::5] = -100
    ids = torch.randint(words, (positions, width), generator=generator)  # also twice, or the target
    weights = torch.rand(positions, width, generator=generator)
    weights /= weights.sum(1, keepdim=True) * (1 if complete else 1.5)
    shares = torch.rand(positions, generator=generator) if share else None
    soft = SoftTarget(ids, weights, shares)
    factors = torch.rand(positions, generator=generator) * 3 - 0.5
    return features, embedding, target, soft, factors


def assert_close(ours, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-3).item() if expected.numel() else 1.0
    error = (ours.double() - expected.double()).abs().max().item() if expected.numel() else 0.0
    assert error <= tolerance * scale, f"{error} > {tolerance} * {scale}"


def by_reference(features, embedding, target, soft, smoothing, weight, factors, upstream=None):
    logits = F.linear(features, embedding)
    wide = torch.promote_types(logits.dtype, torch.float32)
    lprobs = logits.to(wide).log_softmax(1)
    losses = reference_loss(lprobs, target, soft, smoothing, weight, -100, factors)
    total = (losses.loss * (1 if upstream is None else upstream)).sum()
    return losses, lprobs.detach(), torch.autograd.grad(total, [features, embedding])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("smoothing", "weight"), SETTINGS)
def test_any_sparse_target(shape, dtype, smoothing, weight):
    features, embedding, target, soft, factors = inputs(*shape, dtype)
    arguments = features, embedding, target, soft, smoothing, weight
    expected, lprobs, gradients = by_reference(*arguments, factors)
    loose = 1e-5 if dtype in DTYPES[:2] else 1e-3
    k, kept = min(3, shape[1]), target != -100
    for block_bytes in (1, 4 * shape[1] * 4, None):
        for reduction in ("sum", "none"):
            ours = self_kd_linear_cross_entropy(
                *arguments,
                position_weights=factors,
                reduction=reduction,
                count_correct=True,
                top_k=k,
                block_bytes=block_bytes,
            )
            pairs = list(zip(ours, expected))[: 4 if weight else 2]
            for mine, theirs in pairs:
                assert_close(mine, theirs if reduction == "none" else theirs.sum(), loose)
            assert not any(x.requires_grad for x in (*ours[1:5], *ours.top))
            correct = lprobs.argmax(1).eq(target).to(ours.loss)
            assert ours.correct.equal(correct if reduction == "none" else correct.sum())
            top, found = lprobs.topk(k, 1).values[kept], lprobs.gather(1, ours.top.ids)[kept]
            assert_close(ours.top.lprobs[kept], top, loose)
            assert_close(found, top, loose)
            for mine, theirs in zip(
                torch.autograd.grad(ours.loss.sum(), [features, embedding]), gradients
            ):
                assert_close(mine, theirs, TOLERANCE[dtype])
    logits = F.linear(features, embedding)
    closed = self_kd_cross_entropy(
        logits, target, soft, smoothing, weight, position_weights=factors, top_k=k
    )
    for mine, theirs in zip(closed[:4], expected[:4]):
        assert_close(mine, theirs, 1e-5)
    assert_close(closed.top.lprobs, lprobs.topk(k, 1).values, 1e-5)
    assert_close(lprobs.gather(1, closed.top.ids), lprobs.topk(k, 1).values, 1e-5)
    for mine, theirs in zip(
        torch.autograd.grad(closed.loss.sum(), [features, embedding]), gradients
    ):
        assert_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("upstream", [2.5, -0.5])
def test_the_gradient_that_a_sum_is_given(dtype, upstream):
    features, embedding, target, soft, factors = inputs(9, 33, 4, 5, dtype)
    arguments = features, embedding, target, soft, 0.1, 0.4
    _, _, gradients = by_reference(*arguments, factors, upstream)
    ours = self_kd_linear_cross_entropy(*arguments, position_weights=factors)
    found = torch.autograd.grad(ours.loss * upstream, [features, embedding])
    for mine, theirs in zip(found, gradients):
        assert mine.dtype == dtype
        assert_close(mine, theirs, TOLERANCE[dtype])


def test_what_is_not_asked_for_is_not_looked_at():
    """The first choice, the top words; with weight 0 the soft target."""
    features, embedding, target, soft, _ = inputs(9, 33, 4, 5)
    expected = self_kd_linear_cross_entropy(features, embedding, target)
    assert expected.correct is None
    assert expected.top is None
    no_words = soft._replace(ids=soft.ids + 33)
    for unused in (SelfTeacher(), no_words):  # not refreshed; not the words of this table
        ours = self_kd_linear_cross_entropy(features, embedding, target, unused)
        assert ours.loss.equal(expected.loss)


def test_of_impossible_words_the_largest_logits_are_words():
    """Fewer words are possible than are asked for, and the last group of 32 has two words."""
    embedding = torch.full((34, 1), float("-inf"))
    embedding[5] = 0.5
    ours = self_kd_linear_cross_entropy(torch.ones(2, 1), embedding, torch.tensor([5, 5]), top_k=4)
    assert ours.top.ids[:, 0].tolist() == [5, 5]
    assert ours.top.ids.max() < 34
    assert ours.top.lprobs.tolist() == [[0.0, *[float("-inf")] * 3]] * 2


@pytest.mark.parametrize("words", [5, 33])  # fewer than positions, and more
@pytest.mark.parametrize("rows", [1, 4, 5, 9])
def test_logits_in_several_blocks(rows, words, monkeypatch):
    features, embedding, target, soft, factors = inputs(9, words, 4, 5)
    expected, _, gradients = by_reference(features, embedding, target, soft, 0.1, 0.4, factors)
    monkeypatch.setattr(loss, "_BLOCK_BYTES", rows * words * 4)
    logits = F.linear(features, embedding)
    ours = self_kd_cross_entropy(logits, target, soft, 0.1, 0.4, position_weights=factors)
    assert ours.top is None
    for mine, theirs in zip(ours[:4], expected[:4]):
        assert_close(mine, theirs, 1e-5)
    assert not ours.nll_loss.requires_grad
    assert not ours.mass.requires_grad
    for mine, theirs in zip(torch.autograd.grad(ours.loss.sum(), [features, embedding]), gradients):
        assert_close(mine, theirs, TOLERANCE[torch.float32])


@pytest.mark.parametrize("complete", [True, False])
def test_it_is_the_cross_entropy_to_the_dense_target(complete):
    """The definition in another form: PyTorch's cross-entropy with probabilities."""
    features, embedding, target, soft, _ = inputs(
        8, 30, 4, 5, torch.float64, complete=complete, share=False
    )
    target = target.clamp(min=0)
    alpha, epsilon, words = 0.3, 0.2, 30
    dense = torch.zeros(8, words, dtype=torch.float64)
    for row in range(8):
        left = 1 - soft.weights[row].double().sum()
        dense[row] += alpha * left / words
        for word, share in zip(soft.ids[row], soft.weights[row]):
            dense[row, word] += alpha * share.double()
        dense[row] += (1 - alpha) * epsilon / (words - 1)
        dense[row, target[row]] += (1 - alpha) * (1 - epsilon - epsilon / (words - 1))
    expected = F.cross_entropy(features @ embedding.t(), dense, reduction="none")
    for reduction in ("sum", "none"):
        ours = self_kd_linear_cross_entropy(
            features, embedding, target, soft, epsilon, alpha, reduction=reduction
        )
        total = expected if reduction == "none" else expected.sum()
        assert torch.allclose(ours.loss, total, rtol=1e-6)
    lprobs = (features @ embedding.t()).log_softmax(1)
    assert torch.allclose(
        reference_loss(lprobs, target, soft, epsilon, alpha).loss, expected, rtol=1e-6
    )


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidates", ["neighbors", "both"])
def test_losses_of_positions_take_any_gradient_and_twice(dtype, candidates):
    features, embedding, target, _, factors = inputs(12, 60, 5, 2, dtype)
    teacher = SelfTeacher(candidates, 3)
    teacher.refresh(embedding)
    upstream = torch.linspace(-1, 2, 12)
    with torch.no_grad():
        prediction = F.linear(features, embedding).argmax(1)
    soft = teacher.soft_target(target, prediction, embedding)
    expected, _, gradients = by_reference(
        features, embedding, target, soft, 0.1, 0.5, factors, upstream
    )
    ours = self_kd_linear_cross_entropy(
        features,
        embedding,
        target,
        teacher,
        0.1,
        0.5,
        position_weights=factors,
        reduction="none",
        block_bytes=4 * 60 * 5,
    )
    assert_close(ours.loss, expected.loss, 1e-5 if dtype in DTYPES[:2] else 3e-3)
    teacher.refresh(torch.randn(60, 5))  # what was learnt from stays what it was
    for _ in range(2):
        found = torch.autograd.grad(
            ours.loss, [features, embedding], upstream.to(ours.loss), retain_graph=True
        )
        for mine, theirs in zip(found, gradients):
            assert mine.dtype == dtype
            assert_close(mine, theirs, TOLERANCE[dtype])


def test_a_teacher_is_taken_with_logits_too():
    features, embedding, target, _, _ = inputs(12, 60, 5, 2)
    logits = features @ embedding.t()
    for candidates in ("neighbors", "prediction", "both"):
        teacher = SelfTeacher(candidates, 3)
        teacher.refresh(embedding)
        ours = self_kd_cross_entropy(logits, target, teacher, 0.1, 0.5, embedding=embedding)
        soft = teacher.soft_target(target, logits.argmax(1), embedding)
        expected = reference_loss(logits.log_softmax(1), target, soft, 0.1, 0.5)
        for mine, theirs in zip(ours[:4], expected[:4]):
            assert_close(mine, theirs, 1e-5)


@pytest.mark.parametrize("hidden", [float("nan"), float("inf")])
def test_ignored_positions_count_nothing_whatever_they_hold(hidden):
    features, embedding, target, soft, factors = inputs(10, 30, 4, 3)
    ignored = target == -100
    assert ignored.any()
    clean = by_reference(features, embedding, target, soft, 0.1, 0.5, factors)
    with torch.no_grad():
        features[ignored] = hidden
    soft.weights[ignored] = hidden
    soft.share[ignored] = hidden
    soft.ids[ignored] = -100
    for reduction in ("sum", "none"):
        ours = self_kd_linear_cross_entropy(
            *(features, embedding, target, soft, 0.1, 0.5),
            position_weights=factors,
            reduction=reduction,
        )
        assert_close(ours.loss.sum(), clean[0].loss.sum(), 1e-5)
        for mine, theirs in zip(
            torch.autograd.grad(ours.loss.sum(), [features, embedding]), clean[2]
        ):
            assert_close(mine, theirs, 3e-6)
    logits = (features @ embedding.t()).detach().requires_grad_()
    assert logits.isnan().any()
    reference = reference_loss(logits.log_softmax(1), target, soft, 0.1, 0.5, -100, factors)
    assert_close(reference.loss, clean[0].loss, 1e-5)
    closed = self_kd_cross_entropy(
        logits, target, soft, 0.1, 0.5, position_weights=factors, overwrite_logits=True
    )
    assert not closed.loss[ignored].any()
    assert_close(closed.loss, clean[0].loss, 1e-5)
    gradient = torch.autograd.grad(closed.loss.sum(), logits)[0]
    assert not gradient[ignored].any()
    assert gradient.isfinite().all()


@pytest.mark.parametrize("weight", [0.0, 0.5])
def test_impossible_words_do_not_matter_if_they_get_no_weight(weight):
    """A logit of minus infinity: finite, and as precise as without the word."""
    generator = torch.Generator().manual_seed(1)
    logits = torch.randn(6, 20, generator=generator)
    logits[:, 7] = float("-inf")
    target = torch.tensor([0, 1, 2, 3, 4, 5])
    ids = torch.tensor([[8, 9, 7]]).expand(6, -1)
    soft = SoftTarget(ids, torch.tensor([[0.25, 0.75, 0.0]]).expand(6, -1))
    expected = reference_loss(logits.double().log_softmax(1), target, soft, 0.0, weight)
    assert expected.loss.isfinite().all()
    logits.requires_grad_()
    for ours in (
        self_kd_cross_entropy(logits, target, soft, 0.0, weight),
        reference_loss(logits.log_softmax(1), target, soft, 0.0, weight),
    ):
        assert_close(ours.loss, expected.loss, 1e-6)
        assert_close(ours.self_kd_loss, expected.self_kd_loss, 1e-6)
        assert torch.autograd.grad(ours.loss.sum(), logits)[0].isfinite().all()
    # Label smoothing gives every word weight, and then the loss is infinite, as PyTorch's.
    assert self_kd_cross_entropy(logits, target, soft, 0.1, weight).loss.isinf().all()
    assert F.cross_entropy(logits, target, label_smoothing=0.1).isinf()


@pytest.mark.parametrize("bad", [-1, -5, 30, 10**6])
def test_a_target_that_is_no_word_is_an_error(bad):
    features, embedding, target, _, _ = inputs(10, 30, 4, 3)
    target[2] = bad
    with pytest.raises(RuntimeError, match=r"target is out of bounds; allowed: 0 to 29, .* -100"):
        self_kd_linear_cross_entropy(features, embedding, target)
    with pytest.raises(RuntimeError, match="target is out of bounds"):
        self_kd_cross_entropy(features @ embedding.t(), target)


def test_minus_100_is_ignored_by_default_also_with_a_soft_target():
    features, embedding, target, soft, _ = inputs(10, 30, 4, 3)
    logits = features @ embedding.t()
    expected = F.cross_entropy(logits, target, reduction="sum")
    assert_close(self_kd_linear_cross_entropy(features, embedding, target).loss, expected, 1e-6)
    assert_close(self_kd_cross_entropy(logits, target).loss.sum(), expected, 1e-6)
    with_soft = self_kd_cross_entropy(logits, target, soft, 0.0, 0.5).loss
    assert not with_soft[target == -100].any()


@pytest.mark.parametrize(
    ("device", "words", "dim", "block_bytes", "blocks"),
    [
        ("cpu", 33, 2, 4 * 33 * 5, [5, 5, 2]),
        ("cpu", 10_152, 2, None, [608, 608, 284]),  # 24 MiB of logits
        ("cpu", 300_000, 1, None, [160, 40]),
        ("meta", 32_768, 8, None, [4096, 904]),  # as on a GPU: 512 MiB
        ("meta", 128_256, 4096, None, [2048, 2048, 904]),  # half of W's gradient in float32
    ],
)
def test_positions_of_a_block(device, words, dim, block_bytes, blocks, monkeypatch):
    features = torch.zeros(sum(blocks), dim, device=device)
    target = torch.zeros(sum(blocks), dtype=torch.long, device=device)
    positions = []
    original = torch.mm

    def counted(*arguments, **options):
        positions.append(arguments[1].size(1))
        return original(*arguments, **options)

    monkeypatch.setattr(torch, "mm", counted)
    embedding = torch.zeros(words, dim, device=device)
    self_kd_linear_cross_entropy(features, embedding, target, block_bytes=block_bytes)
    assert positions == blocks


def test_without_gradients_there_is_one_product(monkeypatch):
    features, embedding, target, soft, _ = inputs(10, 30, 4, 3)
    expected = self_kd_linear_cross_entropy(features, embedding, target, soft, 0.1, 0.5)
    products = []
    original = torch.mm
    monkeypatch.setattr(torch, "mm", lambda *a, **k: products.append(a) or original(*a, **k))
    for reduction in ("sum", "none"):
        products.clear()
        with torch.no_grad():
            ours = self_kd_linear_cross_entropy(
                features, embedding, target, soft, 0.1, 0.5, reduction=reduction
            )
        assert len(products) == 1
        assert ours.loss.grad_fn is None
        assert_close(ours.loss.sum(), expected.loss, 1e-6)
    # Only what is trained gets a gradient.
    frozen = embedding.detach()
    ours = self_kd_linear_cross_entropy(features, frozen, target, soft, 0.1, 0.5)
    assert_close(
        torch.autograd.grad(ours.loss, features)[0],
        torch.autograd.grad(expected.loss, features)[0],
        1e-6,
    )


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_autocast_computes_products_in_its_own_type(reduction):
    features, embedding, target, soft, factors = inputs(20, 50, 8, 3)
    arguments = target, soft, 0.1, 0.5, -100, factors, reduction
    with torch.autocast("cpu", torch.bfloat16):
        ours = self_kd_linear_cross_entropy(features, embedding, *arguments)
    gradients = torch.autograd.grad(ours.loss.sum(), [features, embedding])
    low = [x.detach().bfloat16().requires_grad_() for x in (features, embedding)]
    expected = self_kd_linear_cross_entropy(*low, *arguments)
    assert_close(ours.loss, expected.loss, 1e-5)
    for mine, theirs in zip(gradients, torch.autograd.grad(expected.loss.sum(), low)):
        assert mine.dtype == torch.float32
        assert_close(mine, theirs, 1e-2)


@pytest.mark.parametrize("words", [50, 5_000, 100_000])
@pytest.mark.parametrize("confidence", [0.0, 12.0])
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_as_exact_as_fairseqs_loss(words, confidence, dtype):
    """Errors of gradients against float64, ours and fairseq's, whatever the loss scale."""
    generator = torch.Generator().manual_seed(words)
    positions, dim = 24, 64
    embedding = (torch.randn(words, dim, generator=generator) / dim**0.5).to(dtype)
    target = torch.randint(words, (positions,), generator=generator)
    features = torch.randn(positions, dim, generator=generator)
    # Confident: features along the target's vector, so that its logit leads by far.
    features = (features + confidence * embedding.float()[target]).to(dtype)

    def gradients(loss_of, to, loss_scale=1):
        leaves = [x.detach().clone().to(to).requires_grad_() for x in (features, embedding)]
        (loss_of(*leaves) * loss_scale).backward()
        return [leaf.grad.double() / loss_scale for leaf in leaves]

    def fairseqs(x, w):
        logits = F.linear(x, w)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return label_smoothed_nll_loss(F.log_softmax(logits, 1, dtype=wide), target, 0.1)[0]

    def ours(reduction):
        settings = {"reduction": reduction, "block_bytes": 4 * words * 10}
        return lambda x, w: self_kd_linear_cross_entropy(
            x, w, target, None, 0.1, **settings
        ).loss.sum()

    exact = gradients(fairseqs, torch.float64)
    for loss_scale in (1, 128, 65_536):
        theirs = gradients(fairseqs, dtype, loss_scale)
        for reduction in ("sum", "none"):
            found = zip(gradients(ours(reduction), dtype, loss_scale), theirs, exact)
            for mine, other, right in found:
                # With a large loss scale float16 cannot hold some values: the same for both.
                fits = (right * loss_scale).abs() < torch.finfo(dtype).max * 0.99
                assert mine[fits].isfinite().all()
                fits &= other.isfinite()
                error, allowed = ((x - right)[fits].norm().item() for x in (mine, other))
                # Most of both is the rounding of 1,500 results, so they differ by some per cent.
                assert error <= allowed * 1.05, (loss_scale, reduction, error, allowed)


def test_what_float16_cannot_hold_becomes_infinite():
    """A loss scaler then skips the update; it must not see a wrong finite number."""
    features, embedding, target, soft, _ = inputs(30, 40, 4, 3, torch.float16)
    for reduction in ("sum", "none"):
        loss = self_kd_linear_cross_entropy(
            features, embedding, target, soft, 0.1, 0.5, reduction=reduction
        ).loss
        for scale, overflows in ((2.0**8, False), (2.0**30, True)):
            gradient = torch.autograd.grad(
                loss.sum() * scale, embedding, retain_graph=not overflows
            )
            assert gradient[0].isinf().any() == overflows
            assert not gradient[0].isnan().any()
            if reduction == "sum" and not overflows:
                loss = self_kd_linear_cross_entropy(
                    features, embedding, target, soft, 0.1, 0.5
                ).loss


@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_float16_keeps_small_gradients(reduction):
    """Of words that get a ten-millionth, of which float16 has two digits: by a loss scale."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randint(-64, 64, (500, 2), generator=generator) / 64
    embedding[0] = torch.tensor([16.0, 0.0])
    features, target = torch.tensor([[1.0, 0.5]] * 3), torch.zeros(3, dtype=torch.long)
    found = []
    for dtype in (torch.float16, torch.float64):  # logits are multiples of 1/128: exact in both
        inputs_of = [x.to(dtype).requires_grad_() for x in (features, embedding)]
        losses = self_kd_linear_cross_entropy(*inputs_of, target, reduction=reduction)
        found.append(torch.autograd.grad(losses.loss.sum() * 2**14, inputs_of))
    for mine, theirs in zip(*found):
        assert torch.allclose(mine.double(), theirs, rtol=2e-3, atol=0)


def test_float16_keeps_positions_with_very_different_weights():
    features, embedding, target, soft, _ = inputs(8, 40, 4, 3, torch.float16)
    factors = torch.tensor([1e-6, 3e4, 1.0, 0.0, 5.0, 1e-3, 2.0, 100.0])
    _, _, expected = by_reference(
        *(
            features.detach().double().requires_grad_(),
            embedding.detach().double().requires_grad_(),
        ),
        *(target, soft, 0.1, 0.5, factors.double()),
    )
    loss = self_kd_linear_cross_entropy(
        features, embedding, target, soft, 0.1, 0.5, position_weights=factors
    ).loss
    for mine, theirs in zip(torch.autograd.grad(loss * 2.0**-4, [features, embedding]), expected):
        assert_close(mine.double() * 2**4, theirs, 3e-3)


@pytest.mark.parametrize("scale", [3.0, 12.0, 30.0])
def test_what_is_learnt_by_heart_is_as_exact_as_in_pytorch(scale):
    """Losses a token from 0.1 to 1e-7, where a difference of large numbers would be noise."""
    generator = torch.Generator().manual_seed(1)
    embedding = torch.nn.functional.normalize(torch.randn(200, 32, generator=generator), dim=1)
    target = torch.randint(200, (64,), generator=generator)
    features = (embedding[target] * scale).requires_grad_()
    embedding = (embedding * 2).requires_grad_()
    logits = features @ embedding.t()
    exact = F.cross_entropy(logits.double(), target, reduction="sum").item()
    theirs = F.cross_entropy(logits, target, reduction="sum")
    allowed = (
        2 * abs(theirs.item() - exact) + 2e-6 * exact + 64 * 6e-8
    )  # half a step of float32 at 1
    linear = self_kd_linear_cross_entropy(features, embedding, target).loss
    closed = self_kd_cross_entropy(logits, target).loss.sum()
    for ours in (linear, closed):
        assert abs(ours.item() - exact) <= allowed
    check_linear_loss(features, embedding, target, None, 0.0, 0.0, -100)
    check_loss(logits, target, None, 0.0, 0.0, -100)


@pytest.mark.parametrize("bad", [33, 40])  # within the last group of words, but beyond the last one
def test_ids_that_are_no_words_are_an_error(bad):
    features, embedding, target, soft, _ = inputs(10, 33, 4, 3)
    soft.ids[1, 1] = bad
    for call in (
        lambda: self_kd_linear_cross_entropy(features, embedding, target, soft, 0.1, 0.5),
        lambda: self_kd_cross_entropy(features @ embedding.t(), target, soft, 0.1, 0.5),
    ):
        with pytest.raises(RuntimeError, match=r"id of the soft target is out of bounds.* 0 to 32"):
            call()


def test_one_word_is_a_vocabulary_too():
    features, embedding = torch.randn(3, 2), torch.randn(1, 2)
    target = torch.zeros(3, dtype=torch.long)
    assert not self_kd_linear_cross_entropy(features, embedding, target).loss
    assert not self_kd_cross_entropy(features @ embedding.t(), target).loss.any()


def test_trust_is_what_a_target_gives_to_the_true_word():
    """A word in two columns counts twice, the share that was there is kept as a factor."""
    ids = torch.tensor([[3, 5, 3], [0, 1, 2], [4, 0, 0]])
    weights = torch.tensor([[0.25, 0.5, 0.125], [0.5, 0.25, 0.0], [1.0, 0.0, 0.0]])
    target = torch.tensor([3, 4, 4])
    soft = SoftTarget(ids, weights)
    assert soft.trusted(target).share.tolist() == [0.375, 0, 1]
    shared = soft._replace(share=torch.tensor([0.5, 1, 0.25]))
    assert shared.trusted(target).share.tolist() == [0.1875, 0, 0.25]
    assert shared.trusted(target).ids is ids


def every_way(features, embedding, target, soft):
    """The ways in which a soft target comes in: two of them in blocks, one the reference."""
    logits = features @ embedding.t()
    return {
        "features": lambda: self_kd_linear_cross_entropy(
            features, embedding, target, soft, 0.1, 0.5
        ),
        "blocks": lambda: self_kd_linear_cross_entropy(
            *(features, embedding, target, soft, 0.1, 0.5), reduction="none", block_bytes=1
        ),
        "logits": lambda: self_kd_cross_entropy(logits, target, soft, 0.1, 0.5),
        "reference": lambda: reference_loss(logits.log_softmax(1), target, soft, 0.1, 0.5),
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda w: w.log(), "must be probabilities, not negative .of log-probabilities take exp"),
        (lambda w: w * 1.6, "finite, and add up to at most 1 in a row"),
        (lambda w: w.index_fill(0, torch.tensor([1]), float("nan")), "are no distribution"),
        (lambda w: w.index_fill(0, torch.tensor([1]), float("inf")), "are no distribution"),
        (lambda w: w.index_fill(1, torch.tensor([0]), -1e-3), "are no distribution"),
    ],
)
def test_what_is_no_distribution_is_an_error(change, message):
    features, embedding, target, soft, _ = inputs(10, 33, 4, 3)
    ways = every_way(features, embedding, target, soft._replace(weights=change(soft.weights)))
    for name, call in ways.items():
        with pytest.raises(RuntimeError, match=message):
            pytest.fail(f"{name} gives {call().loss}")


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan")])
def test_a_share_that_is_none_is_an_error(share):
    features, embedding, target, soft, _ = inputs(10, 33, 4, 3)
    soft.share[2] = share
    for call in every_way(features, embedding, target, soft).values():
        with pytest.raises(RuntimeError, match="a share of the soft target is no number from 0 to"):
            call()


@pytest.mark.parametrize("part", ["weights", "share"])
def test_a_gradient_that_would_not_come_is_an_error(part):
    features, embedding, target, soft, _ = inputs(10, 33, 4, 3)
    soft = soft._replace(**{part: getattr(soft, part).requires_grad_()})
    ways = every_way(features, embedding, target, soft)
    del ways["reference"]  # which has one
    for call in ways.values():
        with pytest.raises(ValueError, match=rf"soft_target.{part} requires a gradient.*detach"):
            call()


@pytest.mark.parametrize("no_word", [-1, -100, 33, 2**31])
def test_padding_of_stored_teachers_is_no_word(no_word):
    features, embedding, target, soft, _ = inputs(10, 33, 4, 3)
    soft.weights[1:4, 2] = 0
    expected = [
        call().loss.detach() for call in every_way(features, embedding, target, soft).values()
    ]
    soft.ids[1:4, 2] = no_word
    found = [call().loss.detach() for call in every_way(features, embedding, target, soft).values()]
    for ours, theirs in zip(found, expected):
        assert ours.equal(theirs)
    soft.weights[1, 2] = 0.01
    for call in every_way(features, embedding, target, soft).values():
        with pytest.raises(RuntimeError, match="0 to 32, and any id where the weight is 0"):
            call()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_rows_that_rounding_takes_beyond_1_count_as_1(dtype):
    """Also beside a word that the model holds for impossible: what is left is 0, and not less."""
    generator = torch.Generator().manual_seed(3)
    target = torch.randint(300, (200,), generator=generator)
    logits = torch.randn(200, 300, generator=generator)
    weights, ids = logits.mul(2).softmax(1).topk(9, 1)
    weights = (weights / weights.sum(1, keepdim=True)).to(dtype)
    assert (weights.sum(1, dtype=torch.float32) > 1 + 2e-5).any()
    impossible = logits.clone()
    impossible[(torch.arange(200), logits.argmin(1))] = float("-inf")
    target = torch.where(impossible.gather(1, target[:, None])[:, 0].isinf(), ids[:, 0], target)
    over = weights.sum(1, dtype=torch.float32) >= 1
    for scores in (logits, impossible):
        losses = self_kd_cross_entropy(
            scores[over], target[over], SoftTarget(ids[over], weights[over]), 0, 1
        )
        exact = weights[over].double()
        exact = exact / exact.sum(1, keepdim=True)
        expected = -(exact * scores[over].double().log_softmax(1).gather(1, ids[over])).sum(1)
        torch.testing.assert_close(losses.loss.double(), expected, rtol=1e-5, atol=1e-5)
