"""A run looks at its own loss before it trains, and stops where that is wrong."""

import pytest
import torch

from fairseq_skd import SelfTeacher, self_check
from fairseq_skd.self_check import LossCheckError, check_linear_loss, check_loss
from tests.test_criterion import MODELS, NOW, SELF_KD
from tests.test_sparse_targets import inputs


def broken_gather(tensor, dim, index):
    """Like the CPU's up to torch 2.5.1 for some shapes of index: the first column's for all."""
    return original_gather(tensor, dim, index[:1].expand_as(index))


original_gather = torch.Tensor.gather


@pytest.fixture
def wrong(monkeypatch):
    """Break one loss as if it were PyTorch's fault, or only its gradient."""

    def breaks(function, what):
        original = getattr(self_check, function)

        def changed(*arguments, **options):
            found = original(*arguments, **options)
            value = found.loss
            if what == "loss":
                value = value + 0.2 * value.detach()
            elif what == "gradient":
                value = 1.3 * value - 0.3 * value.detach()
            return found._replace(loss=value)

        monkeypatch.setattr(self_check, function, changed)

    return breaks


@pytest.mark.parametrize("name", ["transformer", "lstm"])  # projection and loss together, or not
@pytest.mark.parametrize("what", ["loss", "gradient"])
@pytest.mark.parametrize("when", ["at the first batch", "when distillation begins"])
def test_a_wrong_loss_ends_the_run(build, train_step, wrong, name, what, when):
    schedule = NOW if when == "at the first batch" else ["--self-kd-start-update", 3]
    built = build(*MODELS[name], *SELF_KD, *schedule, "--self-kd-ramp-updates", 0)
    sample = built.samples[0]
    if when != "at the first batch":
        train_step(built, sample, 0)
    function = "self_kd_linear_cross_entropy" if name == "transformer" else "self_kd_cross_entropy"
    wrong(function, what)
    if when != "at the first batch":
        train_step(built, sample, 1)  # it has been looked at
    with pytest.raises(LossCheckError, match=rf"{function} is wrong .* torch \d"):
        train_step(built, sample, 3)


def test_the_fault_that_it_was_made_for(monkeypatch):
    features, embedding, target, _, _ = inputs(50, 97, 8, 1)
    check_linear_loss(features, embedding, target, None, 0.1, 0.0, -100)
    broken = type("Broken", (), {"gather": broken_gather})
    monkeypatch.setattr(torch.Tensor, "gather", broken.gather)
    reference = self_check.reference_loss

    def right(*arguments):
        monkeypatch.setattr(torch.Tensor, "gather", original_gather)
        found = reference(*arguments)
        monkeypatch.setattr(torch.Tensor, "gather", broken.gather)
        return found

    monkeypatch.setattr(self_check, "reference_loss", right)
    with pytest.raises(LossCheckError):
        check_linear_loss(features, embedding, target, None, 0.1, 0.0, -100)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("shape", [(1, 40, 3, 1), (200, 97, 8, 4), (70, 5000, 32, 8)])
def test_a_right_loss_passes_in_every_type(dtype, shape):
    features, embedding, target, soft, _ = inputs(*shape, dtype)
    teachers = [SelfTeacher(candidates, 3) for candidates in ("neighbors", "both")]
    for teacher in teachers:
        teacher.refresh(embedding)
    for source, weight in ((None, 0.0), (soft, 0.5), *((teacher, 0.5) for teacher in teachers)):
        check_linear_loss(features, embedding, target, source, 0.1, weight, -100)
        if dtype == torch.float32:
            with torch.autocast("cpu", torch.bfloat16):
                check_linear_loss(features, embedding, target, source, 0.1, weight, -100)
        if not isinstance(source, SelfTeacher):
            check_loss(features @ embedding.t(), target, source, 0.1, weight, -100)


def test_a_model_that_has_diverged_is_not_the_losss_fault():
    features, embedding, target, _, _ = inputs(20, 30, 4, 1)
    with torch.no_grad():
        embedding[3] = float("nan")
    check_linear_loss(features, embedding, target, None, 0.1, 0.0, -100)
    check_loss(features @ embedding.t(), target, None, 0.1, 0.0, -100)
