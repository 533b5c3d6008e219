"""The criterion through task.train_step and task.valid_step, for every kind of model."""

import math
import time

import numpy as np
import pytest
import torch
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.criterions.label_smoothed_cross_entropy import LabelSmoothedCrossEntropyCriterion
from fairseq.distributed import ModuleProxyWrapper
from fairseq.logging import metrics
from torch.utils._python_dispatch import TorchDispatchMode

from fairseq_skd.compatibility import ordinary_words, target_side_words
from fairseq_skd.criterion import SelfKDCriterion
from fairseq_skd.output_projection import UnsupportedModelError, find_output_projection
from tests.conftest import TINY, TINY_LM

NOW = ["--self-kd-start-update", 0, "--self-kd-ramp-updates", 0]  # no schedule
SELF_KD = ["--criterion", "self_kd", "--label-smoothing", 0.1, "--self-kd-top-k", 4]
SELF_KD += ["--self-kd-candidates", "neighbors"]
LSTM = ["--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16]
LSTM += ["--encoder-hidden-size", 16, "--decoder-hidden-size", 16]
CONV = ["--encoder-embed-dim", 16, "--decoder-embed-dim", 16, "--decoder-out-embed-dim", 16]
CONV += ["--encoder-layers", "[(16, 3)]", "--decoder-layers", "[(16, 3)]"]
LIGHT = ["--encoder-conv-dim", 16, "--decoder-conv-dim", 16]
LIGHT += ["--weight-dropout", 0.0, "--input-dropout", 0.0]
LIGHT += ["--encoder-kernel-size-list", "[3]", "--decoder-kernel-size-list", "[3]"]
TIED = "--share-decoder-input-output-embed"
MODELS = {
    "transformer": ["--arch", "transformer", *TINY],
    "transformer, tied": ["--arch", "transformer", *TINY, TIED],
    "lstm": ["--arch", "lstm", *LSTM],
    "lstm, tied": ["--arch", "lstm", *LSTM, TIED],
    "convolutional": ["--arch", "fconv", *CONV],
    "convolutional, tied": ["--arch", "fconv", *CONV, "--share-input-output-embed"],
    "lightconv, tied": ["--arch", "lightconv", *TINY, *LIGHT, TIED],
}
LANGUAGE_MODELS = {
    "transformer_lm": ["--arch", "transformer_lm", *TINY_LM],
    "transformer_lm, tied": ["--arch", "transformer_lm", *TINY_LM, TIED],
    "lstm_lm": ["--arch", "lstm_lm", *LSTM[2:6], "--decoder-hidden-size", 16],
    "fconv_lm": ["--arch", "fconv_lm", "--decoder-layers", "[(16, 3)]", "--decoder-embed-dim", 16],
}
ALL = [(name, False) for name in MODELS] + [(name, True) for name in LANGUAGE_MODELS]


def of(name, lm):
    return (LANGUAGE_MODELS if lm else MODELS)[name]


def by_definition(
    built,
    sample,
    weight,
    candidates="neighbors",
    k=4,
    epsilon=0.1,
    max_mass=0.5,
    prefix=0,
    eligible=None,
    similarity="cosine",
    sigma_scale=0.5,
):
    """A second writing of the equations: dense, word by word, in float64."""
    model, task = built.model, built.task
    output = model(**sample["net_input"])
    lprobs = model.get_normalized_probs(output, log_probs=True)[:, prefix:].double()
    target = model.get_targets(sample, output)[:, prefix:]
    words = find_output_projection(model, task.target_dictionary).weight.detach().double()
    if similarity == "cosine":
        words = words / words.norm(dim=1, keepdim=True).clamp(min=1e-12)
    num_words = len(words)
    if eligible is None:
        eligible = ordinary_words(task.target_dictionary).tolist()
    distance = torch.cdist(words, words, compute_mode="donot_use_mm_for_euclid_dist")
    near = {
        t: sorted((distance[t, j].item(), j) for j in eligible if j != t)[:k]
        for t in range(num_words)
    }
    sigma = sigma_scale * np.mean([d for t in eligible for d, _ in near[t]])
    loss = nll = kd = mass = 0.0
    for row, t in zip(lprobs.flatten(0, 1), target.flatten().tolist()):
        if t == task.target_dictionary.pad():
            continue
        chosen = {j for _, j in near[t]} if candidates != "prediction" else set()
        if candidates != "neighbors":
            predicted = row.argmax().item()
            if predicted != t and predicted in eligible:
                chosen.add(predicted)
        affinity = {j: math.exp(-(distance[t, j].item() ** 2) / sigma**2) for j in chosen}
        m = min(max_mass, sum(affinity.values()))
        q = {j: m * a / sum(affinity.values()) for j, a in affinity.items()}
        assert sum(q.values()) == pytest.approx(m)
        q[t] = 1 - m
        off = epsilon / (num_words - 1)
        smoothed = -(1 - epsilon) * row[t] - off * (row.sum() - row[t])
        distilled = -sum(share * row[j] for j, share in q.items())
        loss = loss + (1 - weight) * smoothed + weight * distilled
        nll, kd, mass = nll - row[t], kd + distilled, mass + m
    model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
    return loss.item(), nll.item(), kd.item(), mass, gradients


def assert_same_gradients(ours, expected, rel=2e-5):
    assert ours.keys() == expected.keys()
    # Some gradients are zero but for rounding: those of the biases of attention's keys.
    floor = 0.05 * max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        scale = max(gradient.abs().max().item(), floor)
        assert (ours[name] - gradient).abs().max().item() <= rel * scale, name


def test_both_names_are_one_class():
    assert CRITERION_REGISTRY["self_kd"] is SelfKDCriterion
    assert CRITERION_REGISTRY["self_kd_label_smoothed_cross_entropy"] is SelfKDCriterion


@pytest.mark.parametrize(("name", "lm"), ALL)
def test_every_model_trains_on_the_defined_loss(build, train_step, name, lm):
    built = build(*of(name, lm), *SELF_KD, *NOW, "--self-kd-weight", 0.3, lm=lm)
    sample = built.samples[0]
    ours = train_step(built, sample)
    loss, nll, kd, mass, gradients = by_definition(built, sample, 0.3)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["nll_loss"].item() == pytest.approx(nll, rel=1e-5)
    assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
    assert ours.log["self_kd_mass"].item() == pytest.approx(mass, rel=1e-5)
    assert ours.sample_size == sample["ntokens"]
    assert_same_gradients(ours.gradients, gradients)


@pytest.mark.parametrize("name", ["transformer", "lstm"])  # projection and loss together, or not
@pytest.mark.parametrize("candidates", ["neighbors", "both"])
def test_euclidean_distance(build, train_step, name, candidates):
    built = build(
        *(*MODELS[name], *SELF_KD, *NOW, "--self-kd-weight", 0.6),
        *("--self-kd-similarity", "euclidean", "--self-kd-sigma-scale", 0.8),
        *("--self-kd-candidates", candidates),
    )
    sample = built.samples[1]
    ours = train_step(built, sample)
    settings = {"similarity": "euclidean", "sigma_scale": 0.8}
    loss, _, kd, mass, gradients = by_definition(built, sample, 0.6, candidates, **settings)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
    assert ours.log["self_kd_mass"].item() == pytest.approx(mass, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)


@pytest.mark.parametrize("name", ["transformer", "lstm"])  # projection and loss together, or not
@pytest.mark.parametrize("candidates", ["neighbors", "prediction", "both"])
@pytest.mark.parametrize("prefix", [0, 2])
def test_candidates_and_prefix(build, train_step, name, candidates, prefix):
    built = build(
        *(*MODELS[name], *SELF_KD, *NOW, "--self-kd-weight", 0.6),
        *("--self-kd-candidates", candidates, "--ignore-prefix-size", prefix),
        *("--self-kd-max-mass", 0.35, "--report-accuracy"),
    )
    sample = built.samples[1]
    ours = train_step(built, sample)
    loss, _, kd, mass, gradients = by_definition(
        built, sample, 0.6, candidates, max_mass=0.35, prefix=prefix
    )
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
    assert ours.log["self_kd_mass"].item() == pytest.approx(mass, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)
    output = built.model(**sample["net_input"])
    correct, total = LabelSmoothedCrossEntropyCriterion.compute_accuracy(
        built.criterion, built.model, output, sample
    )
    assert ours.log["n_correct"].item() == correct
    assert ours.log["total"].item() == total == ours.log["self_kd_ntokens"]


@pytest.mark.parametrize(("name", "lm"), ALL)
@pytest.mark.parametrize("when", ["weight 0", "before the start", "evaluation"])
def test_otherwise_it_is_label_smoothing(build, train_step, name, lm, when):
    options = ["--self-kd-weight", 0 if when == "weight 0" else 0.5]
    if when == "evaluation":
        options += NOW
    built = build(*of(name, lm), *SELF_KD, *options, "--report-accuracy", lm=lm)
    baseline = build(
        *(*of(name, lm), "--criterion", "label_smoothed_cross_entropy"),
        *("--label-smoothing", 0.1, "--report-accuracy"),
        lm=lm,
        load=False,
    ).criterion
    for sample in built.samples:
        if when == "evaluation":
            for criterion in (built.criterion, baseline):
                criterion.eval()
            ours = built.task.valid_step(sample, built.model, built.criterion)
            theirs = built.task.valid_step(sample, built.model, baseline)
            assert ours[0].item() == pytest.approx(theirs[0].item(), rel=1e-6)
            assert ours[1] == theirs[1]
            assert ours[2].keys() == theirs[2].keys()
            for key, value in theirs[2].items():
                assert float(ours[2][key]) == pytest.approx(float(value), rel=1e-6), key
            continue
        ours = train_step(built, sample, update_num=1)
        theirs = train_step(built, sample, update_num=1, criterion=baseline)
        assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
        assert ours.sample_size == theirs.sample_size
        for key, value in theirs.log.items():
            assert float(ours.log[key]) == pytest.approx(float(value), rel=1e-6), key
        assert_same_gradients(ours.gradients, theirs.gradients)


def test_validation_is_label_smoothing_even_if_only_the_model_was_told(build):
    built = build(*MODELS["lstm"], *SELF_KD, *NOW)
    built.criterion.train()
    _, _, log = built.task.valid_step(built.samples[0], built.model, built.criterion)
    assert not any(key.startswith("self_kd") for key in log)


@pytest.mark.parametrize("name", ["transformer", "convolutional"])
def test_reduce_false_gives_one_value_a_position(build, name):
    built = build(*MODELS[name], *SELF_KD, *NOW, "--self-kd-weight", 0.5)
    sample = built.samples[0]
    built.model.train()
    summed, _, log = built.criterion(built.model, sample)
    each, _, log_each = built.criterion(built.model, sample, reduce=False)
    assert each.shape == (sample["target"].numel(), 1)
    assert not each[sample["target"].flatten().eq(1)].any()
    assert each.sum().item() == pytest.approx(summed.item(), rel=1e-5)
    for key in ("nll_loss", "self_kd_loss", "self_kd_mass"):
        assert log_each[key].shape == each.shape
        assert log_each[key].sum().item() == pytest.approx(log[key].item(), rel=1e-5)


def test_padding_does_not_matter(build):
    """A batch is the sum of its sentences."""
    built = build(*MODELS["transformer"], *SELF_KD, *NOW, "--self-kd-weight", 0.5)
    dataset = built.task.dataset("train")
    pairs = [dataset[i] for i in (0, 5, 9)]
    assert len({len(pair["target"]) for pair in pairs}) > 1
    built.model.train()
    together, _, _ = built.criterion(built.model, dataset.collater(pairs))
    alone = sum(built.criterion(built.model, dataset.collater([pair]))[0] for pair in pairs)
    assert together.item() == pytest.approx(alone.item(), rel=1e-5)


def test_the_share_grows_with_the_update_number_alone(build, train_step):
    built = build(
        *(*MODELS["transformer"], *SELF_KD, "--self-kd-weight", 0.4),
        *("--self-kd-start-update", 10, "--self-kd-ramp-updates", 4),
    )
    sample = built.samples[0]
    for update_num, expected in (
        (0, 0),
        (10, 0),
        (11, 0.1),
        (11, 0.1),
        (13, 0.3),
        (99, 0.4),
        (12, 0.2),
    ):
        log = train_step(built, sample, update_num).log
        assert (log["self_kd_weight"] / log["self_kd_ntokens"]).item() == pytest.approx(expected)
        assert ("self_kd_loss" in log) == (expected > 0)


def test_without_the_update_number_a_schedule_is_an_error(build):
    built = build(*MODELS["transformer"], *SELF_KD)
    built.model.train()
    with pytest.raises(RuntimeError, match="begin_update"):
        built.criterion(built.model, built.samples[0])


def test_neighbors_are_measured_once_an_interval(build, train_step, monkeypatch):
    built = build(*MODELS["transformer"], *SELF_KD, *NOW, "--self-kd-refresh-interval", 10)
    seen = []
    from fairseq_skd import soft_targets

    def counting(*arguments, **named):
        seen.append(update_num)
        return original(*arguments, **named)

    original = soft_targets.nearest_neighbors
    monkeypatch.setattr(soft_targets, "nearest_neighbors", counting)
    for update_num in (3, 3, 4, 9, 10, 10, 19, 20, 35):
        train_step(built, built.samples[0], update_num)
        with torch.no_grad():
            built.task.valid_step(built.samples[0], built.model, built.criterion)
    assert seen == [3, 10, 20, 35]


def test_the_batch_is_left_as_it_was(build, train_step):
    built = build(*MODELS["transformer"], *SELF_KD, *NOW)
    sample = built.samples[0]
    before = {**sample, "net_input": dict(sample["net_input"])}
    copies = {k: v.clone() for k, v in sample["net_input"].items()}
    train_step(built, sample)
    assert sample.keys() == before.keys()
    assert sample["net_input"].keys() == before["net_input"].keys()
    for key, value in copies.items():
        assert sample["net_input"][key].equal(value)


@pytest.mark.parametrize("name", ["transformer, tied", "lstm"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_models(build, train_step, name, dtype):
    """The trainer casts model and criterion; the loss stays close to that of float32."""
    built = build(*MODELS[name], *SELF_KD, *NOW, "--self-kd-weight", 0.5)
    sample = built.samples[0]
    expected = train_step(built, sample)
    built.model.to(dtype)
    built.criterion.to(dtype)
    built.criterion.source = type(built.criterion.source)(
        built.criterion.options, built.criterion.source.host
    )
    ours = train_step(built, sample)
    assert ours.loss.dtype == torch.float32
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-2)
    assert ours.log["self_kd_mass"].item() == pytest.approx(
        expected.log["self_kd_mass"].item(), rel=1e-2
    )
    for parameter in ours.gradients.values():
        assert parameter.dtype == dtype
    assert_same_gradients(
        {n: g.float() for n, g in ours.gradients.items()}, expected.gradients, rel=0.15
    )


class NoWaiting(TorchDispatchMode):
    """Fails on operations for which a GPU would have to finish first."""

    WAITS = ("_local_scalar_dense", "nonzero", "masked_select", "item", "unique", "is_nonzero")

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.__name__.split(".")[0]
        assert name not in self.WAITS, f"{name} waits for the device"
        indices = args[1] if name in ("index", "index_put_", "index_put") else []
        assert all(i is None or i.dtype != torch.bool for i in indices), "an index by mask waits"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("name", ["transformer", "lstm"])
@pytest.mark.parametrize("candidates", ["neighbors", "prediction", "both", "past"])
def test_nothing_in_training_waits_for_the_device(build, tmp_path, name, candidates):
    """But for the check of the loss, once."""
    built = build(
        *(*MODELS[name], *SELF_KD, *NOW, "--self-kd-candidates", candidates, "--report-accuracy"),
        *("--self-kd-past-file", tmp_path / "past"),
    )
    built.model.train()
    sample = built.samples[0]
    net_output = built.model(**sample["net_input"])
    # The model itself, of which this is no test, gives its output from outside.
    features = built.model.extract_features(**sample["net_input"])

    class Model(type(built.model)):
        def forward(self, *args, features_only=False, **kwargs):
            return features if features_only else net_output

    projection = find_output_projection(built.model, built.task.target_dictionary)
    built.model.__class__ = Model
    built.criterion._projection = lambda model: projection
    built.criterion(built.model, sample)
    built.criterion.source = type(built.criterion.source)(
        built.criterion.options, built.criterion.source.host
    )
    built.criterion.begin_update(0, [sample])
    with NoWaiting():
        loss, _, _ = built.criterion(built.model, sample)  # with the first table
        loss.backward()
    with pytest.raises(AssertionError, match="waits"), NoWaiting():
        loss.item()


def test_joined_dictionary_words_of_the_source_language_get_nothing(build, train_step):
    built = build(*MODELS["transformer"], *SELF_KD, *NOW, "--self-kd-weight", 0.5, data="joined")
    dictionary = built.task.target_dictionary
    known = target_side_words(built.task)
    assert {dictionary[i][0] for i in known if i > 3} == {"t"}
    eligible = [i for i in ordinary_words(dictionary).tolist() if dictionary[i][0] == "t"]
    ours = train_step(built, built.samples[0])
    loss, _, _, mass, gradients = by_definition(built, built.samples[0], 0.5, eligible=eligible)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["self_kd_mass"].item() == pytest.approx(mass, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)


def test_target_side_words_are_unknown_where_they_cannot_be_known(build):
    assert target_side_words(build(*MODELS["transformer"], load=False, data="joined").task) is None
    assert target_side_words(build(*MODELS["transformer"]).task) is None  # two dictionaries
    assert target_side_words(build(*LANGUAGE_MODELS["transformer_lm"], lm=True).task) is None


def test_eligible_words(build):
    dictionary = build(*MODELS["transformer"], load=False).task.target_dictionary
    made_up = [i for i, symbol in enumerate(dictionary.symbols) if "madeupword" in symbol]
    assert made_up
    expected = set(range(4, len(dictionary))) - set(made_up)
    assert set(ordinary_words(dictionary).tolist()) == expected


def test_logged_metrics_are_means_over_all_workers():
    logs = [
        {"loss": 8.0, "nll_loss": 6.0, "ntokens": 4, "nsentences": 1, "sample_size": 4},
        {"loss": 2.0, "nll_loss": 1.0, "ntokens": 6, "nsentences": 1, "sample_size": 6},
    ]
    with metrics.aggregate(new_root=True) as plain:
        SelfKDCriterion.reduce_metrics(logs)
    assert not any(key.startswith("self_kd") for key in plain.get_smoothed_values())
    logs[0].update(self_kd_weight=2.0, self_kd_ntokens=4, self_kd_loss=4.0, self_kd_mass=1.0)
    logs[1].update(self_kd_weight=3.0, self_kd_ntokens=6, self_kd_loss=1.0, self_kd_mass=2.0)
    with metrics.aggregate(new_root=True) as aggregated:
        SelfKDCriterion.reduce_metrics(logs)
    values = aggregated.get_smoothed_values()
    assert values["self_kd_weight"] == 0.5
    assert values["self_kd_mass"] == 0.3
    assert values["self_kd_loss"] == pytest.approx(0.5 / math.log(2), abs=1e-3)
    assert SelfKDCriterion.logging_outputs_can_be_summed()


def test_nothing_of_it_is_in_a_checkpoint_and_nothing_can_be_cast(build, train_step):
    built = build(*MODELS["transformer"], *SELF_KD, *NOW)
    train_step(built, built.samples[0])
    assert built.criterion.state_dict() == {}
    assert not list(built.criterion.parameters())
    assert not list(built.criterion.modules())[1:]


class TestModelsThatDoNotWork:
    def test_adaptive_softmax(self, build, train_step):
        built = build(
            *(*LANGUAGE_MODELS["transformer_lm"], *SELF_KD, "--adaptive-softmax-cutoff", "20,30"),
            lm=True,
        )
        with pytest.raises(UnsupportedModelError, match=r"adaptive softmax.*--arch transformer_lm"):
            train_step(built, built.samples[0])  # also before the start

    def test_rows_that_are_not_the_dictionary(self, build, train_step):
        built = build(*MODELS["transformer"], *SELF_KD)
        layer = built.model.decoder.output_projection
        layer.weight = torch.nn.Parameter(layer.weight[:-3])
        with pytest.raises(UnsupportedModelError, match=r"shape \(\d+, 16\).* \d+ words"):
            train_step(built, built.samples[0])

    def test_no_table_and_no_decoder(self, build):
        model = build(*MODELS["transformer"], load=False).model
        del model.decoder.output_projection
        model.decoder.share_input_output_embed = False
        with pytest.raises(UnsupportedModelError, match="no output table"):
            find_output_projection(model, 10)
        del model.decoder
        with pytest.raises(UnsupportedModelError, match="no decoder"):
            find_output_projection(model, 10)

    def test_embeddings_that_are_no_longer_finite(self, build, train_step):
        built = build(*MODELS["transformer"], *SELF_KD, *NOW)
        with torch.no_grad():
            built.model.decoder.output_projection.weight[7, 3] = float("nan")
        with pytest.raises(RuntimeError, match="NaN or infinite"):
            train_step(built, built.samples[0])


def test_which_models_get_projection_and_loss_together(build):
    def found(name):
        built = build(*MODELS[name], load=False)
        return built.model, built.task.target_dictionary

    for name in MODELS:
        projection = find_output_projection(*found(name))
        assert projection.plain_softmax
        assert projection.features_suffice == name.startswith("transformer")
    model, words = found("transformer")

    class Finding(torch.nn.Module):  # like DDP with --find-unused-parameters
        find_unused_parameters = True

        def __init__(self):
            super().__init__()
            self.module = model

    assert not find_output_projection(Finding(), words).features_suffice
    model.decoder.output_projection.register_forward_hook(lambda *_: None)
    assert not find_output_projection(model, words).features_suffice
    model.get_normalized_probs = None  # a model with probabilities of its own
    assert not find_output_projection(model, words).plain_softmax


@pytest.mark.parametrize("name", ["transformer", "transformer, tied", "lstm"])
def test_through_distributed_data_parallel(build, train_step, tmp_path, name):
    """PyTorch's DDP sees the forward pass, and reduces the gradient of the projection too."""
    built = build(*MODELS[name], *SELF_KD, *NOW, "--self-kd-weight", 0.5)
    expected = train_step(built, built.samples[0], update_num=3)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path / 'store'}", rank=0, world_size=1
    )
    try:
        wrapped = ModuleProxyWrapper(torch.nn.parallel.DistributedDataParallel(built.model))
        ours = train_step(built, built.samples[0], update_num=3, model=wrapped)
    finally:
        # Gloo's thread still frees what it has reduced, for which it needs Python's lock. Should it
        # wait for the lock while the group is destroyed, both wait for ever.
        time.sleep(0.3)
        torch.distributed.destroy_process_group()
    gradients = {n.replace("module.", ""): g for n, g in ours.gradients.items()}
    assert ours.loss.item() == pytest.approx(expected.loss.item(), rel=1e-6)
    assert_same_gradients(gradients, expected.gradients)


def test_a_model_with_probabilities_of_its_own_trains_on_them(build, train_step):
    built = build(*MODELS["transformer"], *SELF_KD, *NOW, "--self-kd-weight", 0.5)
    usual = type(built.model)

    class Tempered(usual):
        def get_normalized_probs(self, net_output, log_probs, sample=None):
            assert log_probs
            return torch.log_softmax(net_output[0] / 2, -1)

    built.model.__class__ = Tempered
    sample = built.samples[0]
    ours = train_step(built, sample)
    loss, _, kd, _, gradients = by_definition(built, sample, 0.5)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)


@pytest.mark.parametrize(
    ("option", "value", "allowed"),
    [
        ("weight", 1.5, "0 to 1"),
        ("weight", -0.1, "0 to 1"),
        ("weight", "nan", "0 to 1"),
        ("max-mass", 1.01, "0 to 1"),
        ("max-mass", "nan", "0 to 1"),
        ("start-update", -1, "0 or more"),
        ("ramp-updates", -5, "0 or more"),
        ("refresh-interval", 0, "1 or more"),
        ("top-k", 0, "1 or more"),
        ("top-k", 400, "1 to 39"),
        ("sigma", 0, "positive"),
        ("sigma", -2.0, "positive"),
        ("sigma", "nan", "positive"),
        ("sigma", "wide", "positive"),
        ("sigma-scale", 0, "positive"),
        ("sigma-scale", "inf", "positive"),
    ],
)
def test_values_that_are_not_allowed(build, option, value, allowed):
    with pytest.raises(ValueError, match=rf"--self-kd-{option} is .*{value}.*allowed: .*{allowed}"):
        build(*MODELS["transformer"], *SELF_KD, f"--self-kd-{option}={value}", load=False)


@pytest.mark.parametrize("option", ["candidates", "similarity"])
def test_unknown_choices(build, option, capsys):
    with pytest.raises(SystemExit):
        build(*MODELS["transformer"], *SELF_KD, f"--self-kd-{option}=nearest", load=False)
    assert f"argument --self-kd-{option}: invalid choice: 'nearest'" in capsys.readouterr().err


def test_label_smoothing_out_of_range(build):
    with pytest.raises(ValueError, match=r"--label-smoothing is 1\.5; allowed: 0 to 1"):
        build(
            *MODELS["transformer"], "--criterion", "self_kd", "--label-smoothing", 1.5, load=False
        )


def test_candidates_that_are_not_given_are_the_neighbors_whatever_the_task(build):
    options = ["--criterion", "self_kd", "--self-kd-top-k", 4]
    found = [
        build(*MODELS["transformer"], *options, load=False),
        build(*LANGUAGE_MODELS["transformer_lm"], *options, lm=True, load=False),
        build(*MODELS["transformer"], *options, "--self-kd-candidates", "both", load=False),
    ]
    candidates = [built.criterion.options.candidates for built in found]
    assert candidates == ["neighbors", "neighbors", "both"]


def test_the_signature_is_logged_at_the_start(build, caplog):
    with caplog.at_level("INFO"):
        build(*MODELS["transformer"], *SELF_KD, "--self-kd-sigma", 0.7, load=False)
    from fairseq_skd import __version__
    from fairseq_skd.options import SelfKDOptions as Default

    assert (
        f"self_kd|cand:neighbors|k:4|sim:cosine|sigma:0.7|mass:{Default.max_mass}"
        f"|weight:0.5|start:auto|ramp:auto"
        f"|refresh:{Default.refresh_interval}|version:{__version__}"
    ) in caplog.messages
