"""What only a GPU shows: its arithmetic, its waits and fairseq's half-precision modes."""

import math

import pytest
import torch
import torch.nn.functional as F
from fairseq.criterions.label_smoothed_cross_entropy import label_smoothed_nll_loss

from fairseq_skd import SelfTeacher, nearest_neighbors, self_kd_linear_cross_entropy
from fairseq_skd.self_check import check_linear_loss
from tests.conftest import PLUGIN, TINY, command
from tests.test_command_line import logged
from tests.test_criterion import MODELS, NOW, SELF_KD
from tests.test_sparse_targets import TOLERANCE, assert_close, by_reference, inputs

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs CUDA")
SHAPES = [(1, 40, 3, 1), (9, 33, 4, 5), (300, 1001, 64, 8), (700, 32_768, 512, 8)]


@pytest.mark.parametrize("dtype", list(TOLERANCE))
@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
def test_loss(shape, dtype, reduction):
    features, embedding, target, soft, factors = (
        x.cuda() if isinstance(x, torch.Tensor) else x for x in inputs(*shape, dtype)
    )
    features, embedding = features.detach().requires_grad_(), embedding.detach().requires_grad_()
    soft = type(soft)(*(x.cuda() for x in soft))
    expected, _, gradients = by_reference(features, embedding, target, soft, 0.1, 0.4, factors)
    for block_bytes in (4 * shape[1] * 100, None):
        ours = self_kd_linear_cross_entropy(
            *(features, embedding, target, soft, 0.1, 0.4),
            position_weights=factors,
            reduction=reduction,
            top_k=1,
            count_correct=True,
            block_bytes=block_bytes,
        )
        loose = 1e-4 if dtype in (torch.float64, torch.float32) else 3e-3
        assert_close(ours.loss.sum(), expected.loss.sum(), loose)
        for mine, theirs in zip(
            torch.autograd.grad(ours.loss.sum(), [features, embedding]), gradients
        ):
            assert_close(mine, theirs, max(TOLERANCE[dtype], 1e-4))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("words", [50, 5_000, 100_000])
@pytest.mark.parametrize("loss_scale", [1, 128, 1_024])
def test_half_precision_is_as_exact_as_fairseqs_loss(dtype, words, loss_scale):
    generator = torch.Generator().manual_seed(words)
    embedding = (torch.randn(words, 64, generator=generator) / 8).to(dtype)
    features = torch.randn(100, 64, generator=generator).to(dtype)
    target = torch.randint(words, (100,), generator=generator).cuda()

    def gradients(loss_of, to):
        leaves = [x.cuda().to(to).requires_grad_() for x in (features, embedding)]
        (loss_of(*leaves) * loss_scale).backward()
        return [leaf.grad.double() / loss_scale for leaf in leaves]

    def fairseqs(x, w):
        logits = F.linear(x, w)
        wide = torch.promote_types(logits.dtype, torch.float32)
        return label_smoothed_nll_loss(F.log_softmax(logits, 1, dtype=wide), target, 0.1)[0]

    def ours(x, w):
        return self_kd_linear_cross_entropy(x, w, target, None, 0.1).loss

    exact = gradients(fairseqs, torch.float64)
    for mine, theirs, right in zip(gradients(ours, dtype), gradients(fairseqs, dtype), exact):
        assert (mine - right).norm() <= (theirs - right).norm() * 1.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("similarity", ["euclidean", "cosine"])
def test_neighbors_are_those_of_the_cpu(dtype, similarity):
    generator = torch.Generator().manual_seed(1)
    embedding = torch.randn(3_001, 64, generator=generator).to(dtype)
    eligible = torch.arange(5, 3_001, 2)
    expected = nearest_neighbors(embedding, 7, eligible, similarity)
    ours = nearest_neighbors(embedding.cuda(), 7, eligible, similarity)
    assert torch.allclose(ours.distances.cpu(), expected.distances, rtol=1e-5, atol=1e-6)
    # Of two words whose distances are equal but for rounding either may be the nearer one.
    assert (ours.ids.cpu() == expected.ids).float().mean() > 0.999


def test_the_check_of_the_loss_passes_under_autocast():
    features, embedding, target, _, _ = inputs(500, 2_000, 64, 1)
    features, embedding, target = features.detach().cuda(), embedding.detach().cuda(), target.cuda()
    teacher = SelfTeacher("both", 5)
    teacher.refresh(embedding)
    for dtype in (torch.float16, torch.bfloat16):
        with torch.autocast("cuda", dtype):
            check_linear_loss(features, embedding, target, teacher, 0.1, 0.5, -100)
    check_linear_loss(features, embedding, target, teacher, 0.1, 0.5, -100)


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize("candidates", ["neighbors", "prediction", "both", "past"])
def test_no_training_step_waits_for_it(build, tmp_path, name, candidates):
    built = build(
        *(*MODELS[name], *SELF_KD, *NOW, "--self-kd-candidates", candidates, "--report-accuracy"),
        *("--self-kd-past-file", tmp_path / "past"),
    )
    model, criterion = built.model.cuda().train(), built.criterion.cuda().train()
    # What replaces the forward pass below would be taken for a model of another kind.
    projection = criterion._projection(model)
    criterion._projection = lambda model: projection

    def moved(value):
        if isinstance(value, dict):
            return {key: moved(inner) for key, inner in value.items()}
        return value.cuda() if isinstance(value, torch.Tensor) else value

    def forward():
        sample = moved(built.samples[0])
        criterion.begin_update(0, [built.samples[0]])
        torch.cuda.synchronize()
        output = model(**sample["net_input"])
        features = model.extract_features(**sample["net_input"])

        class Model(type(model)):  # the model itself, of which this is no test
            def forward(self, *arguments, features_only=False, **options):
                return features if features_only else output

        return Model, sample

    criterion(model, forward()[1])  # with the check, which waits once, and the first table
    criterion.begin_update(0, [built.samples[0]])
    kind, sample = forward()
    own = type(model)
    model.__class__ = kind
    torch.cuda.set_sync_debug_mode("error")
    try:
        loss, _, _ = criterion(model, sample)
        loss.backward()
    finally:
        torch.cuda.set_sync_debug_mode("default")
        model.__class__ = own
    assert math.isfinite(loss.item())


@pytest.mark.parametrize("candidates", ["neighbors", "past"])
# To fairseq-train --bf16 means a TPU.
@pytest.mark.parametrize("precision", [[], ["--fp16"], ["--memory-efficient-fp16"], ["--amp"]])
def test_trainings_in_every_precision(corpus, tmp_path, candidates, precision):
    output = command(
        *("fairseq-train", corpus / "pair", "--user-dir", PLUGIN, "--arch", "transformer", *TINY),
        *(*SELF_KD, "--self-kd-candidates", candidates, "--self-kd-start-update", 4),
        *("--self-kd-ramp-updates", 4, "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200),
        *("--update-freq", 2, "--clip-norm", 1, "--max-epoch", 4, "--save-dir", tmp_path),
        *("--log-format", "json", "--log-interval", 1, *precision),
    )
    losses = [float(record["loss"]) for record in logged(output)]
    assert losses[-1] < losses[0] - 0.5
    assert float(logged(output)[-1]["self_kd_mass"]) > 0
    assert all(math.isfinite(loss) for loss in losses)


@pytest.mark.parametrize("precision", ["--fp16", "--memory-efficient-fp16"])
def test_an_update_that_overflows_is_skipped(corpus, tmp_path, precision):
    output = command(
        *("fairseq-train", corpus / "pair", "--user-dir", PLUGIN, "--arch", "transformer", *TINY),
        *(*SELF_KD, *NOW, "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200, precision),
        *("--fp16-init-scale", 2**28, "--clip-norm", 1, "--max-update", 8, "--save-dir", tmp_path),
        *("--log-format", "json", "--log-interval", 1),
    )
    assert "gradient overflow detected" in output
    assert 1 <= float(logged(output)[-1]["loss_scale"]) < 2**28
    assert math.isfinite(float(logged(output)[-1]["gnorm"]))


def test_validation_takes_no_more_memory_than_training():
    embedding = torch.randn(100_000, 128, device="cuda", requires_grad=True)
    features = torch.randn(2_048, 128, device="cuda", requires_grad=True)
    target = torch.randint(100_000, (2_048,), device="cuda")

    def peak(training):
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        with torch.set_grad_enabled(training):
            self_kd_linear_cross_entropy(features, embedding, target, None, 0.1)
        return torch.cuda.max_memory_allocated() - before

    assert peak(False) <= peak(True)
