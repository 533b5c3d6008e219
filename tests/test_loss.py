"""The closed form and the blocked projection against the readable reference."""

import pytest
import torch
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_skd import (
    SelfTeacher,
    SoftTarget,
    reference_loss,
    self_kd_cross_entropy,
    self_kd_linear_cross_entropy,
)
from fairseq_skd.loss import ends_in_product
from fairseq_skd.soft_targets import CANDIDATES

PAD = 1
DTYPES = [torch.float64, torch.float32, torch.bfloat16, torch.float16]
# What the gradients may differ by, relative to the largest one: rounding to the model's dtype.
TOLERANCE = {torch.float64: 1e-6, torch.float32: 2e-6, torch.bfloat16: 2e-2, torch.float16: 2e-3}


class World:
    """Features, a projection, targets with padding, and a teacher."""

    def __init__(self, positions, words, dim, dtype=torch.float32, candidates="neighbors", k=3):
        generator = torch.Generator().manual_seed(positions + words)
        self.features = torch.randn(positions, dim, generator=generator).to(dtype)
        self.embedding = torch.randn(words, dim, generator=generator).to(dtype)
        self.target = torch.randint(2, words, (positions,), generator=generator)
        self.target[3::5] = PAD
        self.features.requires_grad_()
        self.embedding.requires_grad_()
        self.teacher = SelfTeacher(candidates, k, eligible=torch.arange(2, words))
        self.teacher.refresh(self.embedding)

    def logits(self):
        return self.features @ self.embedding.t()

    def soft_target(self, logits):
        return self.teacher.soft_target(self.target, logits.argmax(1), self.embedding)

    def gradients(self, loss):
        return torch.autograd.grad(loss, [self.features, self.embedding])

    def reference(self, label_smoothing, weight):
        """Losses a position, and gradients, in at least float32 from the model's own logits."""
        logits = self.logits()
        wide = torch.promote_types(logits.dtype, torch.float32)
        losses = reference_loss(
            torch.log_softmax(logits.to(wide), 1),
            self.target,
            self.soft_target(logits),
            label_smoothing,
            weight,
            PAD,
        )
        return losses, self.gradients(losses.loss.sum())


def assert_close(ours, expected, tolerance):
    scale = expected.abs().max().clamp(min=1e-3).item()
    error = (ours.double() - expected.double()).abs().max().item()
    assert error <= tolerance * scale, f"{error} > {tolerance} * {scale}"


SHAPES = [(1, 7, 1), (13, 60, 8), (64, 33, 5), (40, 501, 16)]  # of positions, words, dimensions


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("label_smoothing", "weight"), [(0.1, 0.3), (0.0, 1.0), (0.2, 0.0)])
def test_closed_form_on_logits(shape, dtype, candidates, label_smoothing, weight):
    world = World(*shape, dtype=dtype, candidates=candidates)
    expected, expected_gradients = world.reference(label_smoothing, weight)
    for overwrite in (False, True):
        logits = world.logits()
        soft = world.soft_target(logits)
        ours = self_kd_cross_entropy(
            logits, world.target, soft, label_smoothing, weight, PAD, overwrite_logits=overwrite
        )
        assert ours.loss.dtype == torch.promote_types(dtype, torch.float32)
        for mine, theirs in zip(ours[:4], expected[:4]):
            assert_close(mine, theirs, 1e-5)
        for mine, theirs in zip(world.gradients(ours.loss.sum()), expected_gradients):
            assert_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("candidates", CANDIDATES)
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize(("label_smoothing", "weight"), [(0.1, 0.3), (0.0, 1.0), (0.2, 0.0)])
def test_projection_and_loss_together(shape, dtype, candidates, label_smoothing, weight):
    world = World(*shape, dtype=dtype, candidates=candidates)
    expected, expected_gradients = world.reference(label_smoothing, weight)
    kept = world.target != PAD
    logits = world.logits()
    for block_bytes in (1, 4 * shape[1] * 5, None):  # a row, five rows, all
        ours = self_kd_linear_cross_entropy(
            world.features,
            world.embedding,
            world.target,
            world.teacher,
            label_smoothing,
            weight,
            PAD,
            count_correct=True,
            block_bytes=block_bytes,
        )
        assert_close(ours.loss, expected.loss.sum(), 1e-5 if dtype in DTYPES[:2] else 1e-3)
        assert_close(ours.nll_loss, expected.nll_loss.sum(), 1e-5)
        assert ours.correct == (kept & logits.argmax(1).eq(world.target)).sum()
        if weight > 0:
            assert_close(ours.self_kd_loss, expected.self_kd_loss.sum(), 1e-5)
            assert_close(
                ours.mass, (kept * (1 - world.soft_target(logits).weights[:, 0])).sum(), 1e-5
            )
        for mine, theirs in zip(world.gradients(ours.loss), expected_gradients):
            assert_close(mine, theirs, TOLERANCE[dtype])


@pytest.mark.parametrize("label_smoothing", [0.0, 0.1])
def test_without_a_teacher_it_is_fairseqs_label_smoothing(label_smoothing):
    world = World(30, 80, 8)
    lprobs = torch.log_softmax(world.logits(), 1)
    loss, nll = label_smoothed_nll_loss(lprobs, world.target, label_smoothing, ignore_index=PAD)
    gradients = world.gradients(loss)
    closed = self_kd_cross_entropy(
        world.logits(), world.target, None, label_smoothing, ignore_index=PAD
    )
    linear = self_kd_linear_cross_entropy(
        world.features, world.embedding, world.target, None, label_smoothing, ignore_index=PAD
    )
    for ours in (closed, linear):
        assert_close(ours.loss.sum(), loss, 1e-6)
        assert_close(ours.nll_loss.sum(), nll, 1e-6)
        for mine, theirs in zip(world.gradients(ours.loss.sum()), gradients):
            assert_close(mine, theirs, 2e-6)


@pytest.mark.parametrize("weight", [0.0, 0.4, 1.0])
def test_gradcheck(weight):
    world = World(6, 11, 3, dtype=torch.float64)
    soft = world.soft_target(world.logits())
    logits = world.logits().detach().requires_grad_()
    assert torch.autograd.gradcheck(
        lambda z: self_kd_cross_entropy(z, world.target, soft, 0.1, weight, PAD).loss, logits
    )
    # gradcheck goes backward twice through one graph, which the blocked loss refuses: the same
    # comparison, by hand.

    def linear(features, embedding):
        return self_kd_linear_cross_entropy(
            features, embedding, world.target, world.teacher, 0.1, weight, PAD
        ).loss

    inputs = [world.features, world.embedding]
    for i, gradient in enumerate(world.gradients(linear(*inputs))):
        for place in range(gradient.numel()):
            step = torch.zeros(gradient.numel(), dtype=torch.float64)
            step[place] = 1e-6
            step = step.view_as(gradient)
            above, below = (
                linear(*(x.detach() + sign * step if j == i else x for j, x in enumerate(inputs)))
                for sign in (1, -1)
            )
            slope = (above - below).item() / 2e-6
            assert gradient.flatten()[place].item() == pytest.approx(slope, abs=1e-7, rel=1e-6)


def test_gradients_of_single_positions():
    """What comes from above may differ from position to position."""
    world = World(12, 30, 4, dtype=torch.float64)
    upstream = torch.rand(12, dtype=torch.float64)
    logits = world.logits()
    soft = world.soft_target(logits)
    expected = reference_loss(logits.log_softmax(1), world.target, soft, 0.1, 0.5, PAD).loss
    ours = self_kd_cross_entropy(world.logits(), world.target, soft, 0.1, 0.5, PAD).loss
    for mine, theirs in zip(
        world.gradients((upstream * ours).sum()), world.gradients((upstream * expected).sum())
    ):
        assert_close(mine, theirs, 1e-7)


def test_extreme_logits_stay_finite():
    logits = torch.tensor([[1e4, -1e4, 0.0], [-3e4, 0.0, 3e4]], requires_grad=True)
    target = torch.tensor([1, 0])
    loss = self_kd_cross_entropy(logits, target, None, 0.1).loss
    expected = reference_loss(logits.log_softmax(1), target, None, 0.1).loss
    assert torch.allclose(loss, expected)
    assert torch.autograd.grad(loss.sum(), logits)[0].isfinite().all()
    linear = self_kd_linear_cross_entropy(logits, torch.eye(3), target, None, 0.1).loss
    assert torch.allclose(linear, expected.sum())


def test_no_positions():
    empty, embedding = torch.zeros(0, 4, requires_grad=True), torch.randn(9, 4, requires_grad=True)
    target = torch.zeros(0, dtype=torch.long)
    loss = self_kd_linear_cross_entropy(empty, embedding, target, None, 0.1).loss
    assert loss.item() == 0
    assert not torch.autograd.grad(loss, embedding)[0].any()
    assert self_kd_cross_entropy(empty @ embedding.t(), target, None, 0.1).loss.shape == (0,)


def test_negative_targets_can_be_padding():
    world = World(10, 20, 4)
    target = world.target.masked_fill(world.target == PAD, -100)
    soft = world.teacher.soft_target(target)
    ours = self_kd_cross_entropy(world.logits(), target, soft, 0.1, 0.5, ignore_index=-100)
    usual = self_kd_cross_entropy(
        world.logits(), world.target, world.teacher.soft_target(world.target), 0.1, 0.5, PAD
    )
    assert torch.equal(ours.loss, usual.loss)


def test_the_loss_may_be_scaled_in_place():
    """As fairseq does for batches whose gradient is to be ignored."""
    world = World(10, 20, 4)
    loss = self_kd_linear_cross_entropy(world.features, world.embedding, world.target).loss
    loss *= 0
    assert not any(gradient.any() for gradient in world.gradients(loss))


def test_logits_are_left_alone_unless_they_may_be_overwritten():
    world = World(10, 20, 4)
    logits = world.logits()
    before = logits.detach().clone()
    self_kd_cross_entropy(logits, world.target).loss.sum().backward()
    assert logits.equal(before)


def test_a_second_backward_pass_through_overwritten_memory_is_an_error():
    world = World(10, 20, 4)
    loss = self_kd_cross_entropy(world.logits(), world.target, overwrite_logits=True).loss.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()
    loss = self_kd_linear_cross_entropy(world.features, world.embedding, world.target).loss
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="second backward"):
        loss.backward()


def test_which_logits_may_be_overwritten():
    x, w = torch.randn(2, 3, 4), torch.randn(5, 4, requires_grad=True)
    assert ends_in_product(torch.nn.functional.linear(x, w).view(-1, 5))
    assert ends_in_product(torch.nn.functional.linear(x, w, torch.zeros(5)).view(-1, 5))
    assert not ends_in_product(torch.nn.functional.linear(x, w).tanh().view(-1, 5))
    assert not ends_in_product(torch.randn(3, 4, requires_grad=True))


def test_what_is_missing_or_unsupported_is_said():
    world = World(10, 20, 4)
    with pytest.raises(ValueError, match="no soft target"):
        self_kd_cross_entropy(world.logits(), world.target, weight=0.5)
    with pytest.raises(ValueError, match="no soft target"):
        self_kd_linear_cross_entropy(world.features, world.embedding, world.target, weight=0.5)
    with pytest.raises(ValueError, match=r"without autocast both must be the same$"):
        self_kd_linear_cross_entropy(world.features.half(), world.embedding, world.target)
    with pytest.raises(ValueError, match="reduction is 'mean'; allowed: sum, none"):
        self_kd_linear_cross_entropy(
            world.features, world.embedding, world.target, reduction="mean"
        )
    with pytest.raises(ValueError, match=r"target has shape \(9,\); \(10,\) is needed"):
        self_kd_cross_entropy(world.logits(), world.target[:9])
    nine = {"position_weights": torch.ones(9)}
    with pytest.raises(ValueError, match=r"^position_weights has shape \(9,\); \(10,\) is needed"):
        self_kd_cross_entropy(world.logits(), world.target, **nine)
    with pytest.raises(ValueError, match=r"^position_weights has shape \(9,\); \(10,\) is needed"):
        self_kd_linear_cross_entropy(world.features, world.embedding, world.target, **nine)
    ids = torch.zeros(10, 2, dtype=torch.long)
    two = torch.zeros(10, 2)
    with pytest.raises(ValueError, match=r"^position_weights has shape \(9,\); \(10,\) is needed"):
        self_kd_cross_entropy(world.logits(), world.target, SoftTarget(ids, two), **nine)
    with pytest.raises(ValueError, match=r"^soft_target.ids has shape \(9, 2\); \(10, 2\)"):
        self_kd_cross_entropy(world.logits(), world.target, SoftTarget(ids[:9], two))
    with pytest.raises(ValueError, match=r"^soft_target.share has shape \(9,\); \(10,\)"):
        self_kd_cross_entropy(world.logits(), world.target, SoftTarget(ids, two, torch.zeros(9)))
    soft = SoftTarget(ids, torch.zeros(10, 3))
    with pytest.raises(ValueError, match=r"^soft_target.weights has shape \(10, 3\); \(10, 2\)"):
        self_kd_linear_cross_entropy(world.features, world.embedding, world.target, soft)


@pytest.mark.parametrize("candidates", CANDIDATES)
def test_nothing_waits_for_a_gpu(candidates):
    """On meta tensors, which have no values: whoever asks for one, or copies them, fails."""
    features = torch.randn(40, 8, device="meta", requires_grad=True)
    embedding = torch.randn(70, 8, device="meta", requires_grad=True)
    target = torch.randint(70, (40,), device="meta")
    teacher = SelfTeacher(candidates, 3, eligible=torch.arange(4, 70, device="meta"))
    teacher.refresh(embedding)
    together = self_kd_linear_cross_entropy(
        features, embedding, target, teacher, 0.1, 0.5, PAD, count_correct=True, block_bytes=999
    )
    together.loss.backward()
    logits = features @ embedding.t()
    soft = teacher.soft_target(target, logits.argmax(1), embedding)
    self_kd_cross_entropy(
        logits, target, soft, 0.1, 0.5, PAD, overwrite_logits=True
    ).loss.sum().backward()
    assert features.grad.is_meta
    assert embedding.grad.is_meta
    # What waits for a GPU does fail on this device:
    for waiting in (torch.Tensor.item, torch.Tensor.cpu, torch.Tensor.nonzero, bool):
        with pytest.raises((RuntimeError, NotImplementedError)):
            waiting(together.loss)
    with pytest.raises((RuntimeError, NotImplementedError)):
        features[features > 0]
