"""The controls of the experiments differ from the criterion in one thing, and in nothing else."""

import importlib
import json
import math
import sys
from collections import Counter

import pytest
import torch

from experiments.runner import branch
from fairseq_skd.compatibility import ordinary_words
from fairseq_skd.criterion import SelfKDCriterion
from fairseq_skd.neighbors import nearest_neighbors
from fairseq_skd.output_projection import find_output_projection
from fairseq_skd.soft_targets import SelfTeacher
from tests.conftest import PLUGIN, ROOT, TINY, TINY_LM, command
from tests.test_criterion import LANGUAGE_MODELS

CONTROLS = ROOT / "experiments" / "self_kd_controls"
SETTINGS = ["--label-smoothing", 0.1, "--self-kd-top-k", 4, "--self-kd-candidates", "neighbors"]
SETTINGS += ["--self-kd-start-update", 0, "--self-kd-ramp-updates", 0, "--self-kd-weight", 0.3]
TRAINED = ["--arch", "transformer", *TINY, *SETTINGS]


@pytest.fixture(scope="module", autouse=True)
def registered():
    importlib.import_module("experiments.self_kd_controls")


def teacher_of(built):
    (taught,) = built.criterion.source.taught.values()
    return taught.teacher


@pytest.fixture(scope="module")
def trained(corpus, tmp_path_factory):
    """A checkpoint of a model that a control has trained, as an arm of the experiments names it."""
    folder = tmp_path_factory.mktemp("trained")
    command(
        *("fairseq-train", corpus / "pair", "--user-dir", PLUGIN, "--criterion", "self_kd"),
        *("--user-dir", CONTROLS, "--criterion", "self_kd_random", *TRAINED, "--cpu"),
        *("--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200, "--max-epoch", 1),
        *("--save-dir", folder),
    )
    return folder / "checkpoint_best.pt"


@pytest.fixture
def tables(build, train_step):
    """Return a function that gives the loss and the table of a criterion, and that of self_kd."""

    def of(name, *options):
        result = []
        for criterion in ("self_kd", name):
            built = build(*TRAINED, "--criterion", criterion, *(options if result else []))
            loss = train_step(built, built.samples[0]).loss.item()
            result.append((built, loss, teacher_of(built)._table))
        return result

    return of


def test_random_words_get_the_masses_of_the_nearest(tables):
    (built, loss, near), (_, other_loss, far) = tables("self_kd_random")
    torch.testing.assert_close(far.weights, near.weights, rtol=0, atol=0)
    assert (far.ids[:, 0] == near.ids[:, 0]).all()
    assert (far.ids[:, 1:] != far.ids[:, :1]).all()
    eligible = torch.from_numpy(ordinary_words(built.task.target_dictionary))
    assert torch.isin(far.ids[:, 1:], eligible).all()
    assert (far.ids[:, 1:] == near.ids[:, 1:]).float().mean() < 0.5
    assert loss != other_loss


def test_words_of_the_unigram_control(build, train_step):
    """As often as they stand in the training text, with the masses of the nearest ones together."""
    built = build(*TRAINED, "--criterion", "self_kd_unigram")
    torch.manual_seed(1)
    train_step(built, built.samples[0])
    teacher, dictionary = teacher_of(built), built.task.target_dictionary
    target = built.samples[0]["target"].flatten()
    target = target[target != dictionary.pad()].repeat(200)
    ids, weights, _ = teacher.soft_target(target)
    near = SelfTeacher.soft_target(teacher, target)
    assert (ids[:, 0] == target).all()
    torch.testing.assert_close(weights[:, 0], near.weights[:, 0], rtol=0, atol=0)
    masses = near.weights[:, 1:].sum(1, keepdim=True)
    torch.testing.assert_close(weights[:, 1:], (masses / 4).expand(-1, 4))
    eligible = torch.from_numpy(ordinary_words(dictionary))
    counts = torch.tensor(dictionary.count, dtype=torch.float)[eligible]
    assert torch.isin(ids[:, 1:], eligible).all()
    shares = torch.bincount(ids[:, 1:].flatten(), minlength=len(dictionary))[eligible]
    # Binomial: five standard deviations of a share.
    expected = counts / counts.sum()
    drawn = ids[:, 1:].numel()
    bound = 5 * (expected * (1 - expected) / drawn).sqrt()
    assert ((shares / drawn - expected).abs() <= bound).all()


@pytest.mark.parametrize(
    ("model", "lm"),
    [
        (["--arch", "transformer", *TINY], False),
        (["--arch", "transformer_lm", *TINY_LM], True),
        (LANGUAGE_MODELS["lstm_lm"], True),  # whose loss begins with logits
    ],
)
def test_words_of_the_bigram_control(build, train_step, monkeypatch, model, lm):
    """As often as they follow the word before, with the masses of the nearest ones together."""
    built = build(*model, *SETTINGS, "--criterion", "self_kd_bigram", lm=lm)
    given = []

    def seen(original):
        def compute(self, *arguments):
            target, *_, source = arguments[-4:]
            given.append((target, source))
            return original(self, *arguments)

        return compute

    for name in ("_linear_loss", "_loss"):
        monkeypatch.setattr(SelfKDCriterion, name, seen(getattr(SelfKDCriterion, name)))
    torch.manual_seed(1)
    for _ in range(100):
        train_step(built, built.samples[0])
    eos = built.task.target_dictionary.eos()
    pairs, text = Counter(), built.task.dataset("train")
    for index in range(len(text)):
        words = text[index]["target"].tolist()
        before = text[index]["source"].tolist() if lm else [eos, *words[:-1]]
        pairs.update(zip(before, words))
    inputs = built.samples[0]["net_input"]
    before = inputs["src_tokens" if lm else "prev_output_tokens"].flatten()
    target = given[0][0]
    near = SelfTeacher.soft_target(teacher_of(built), target)
    drawn = Counter()
    for same, (ids, weights, share) in given:
        assert share is None
        assert (same == target).all()
        assert (ids[:, 0] == target).all()
        torch.testing.assert_close(weights[:, 0], near.weights[:, 0], rtol=0, atol=0)
        masses = near.weights[:, 1:].sum(1, keepdim=True)
        torch.testing.assert_close(weights[:, 1:], (masses / 4).expand(-1, 4))
        for position in (target != built.task.target_dictionary.pad()).nonzero().flatten():
            first = before[position].item()
            drawn.update((first, word) for word in ids[position, 1:].tolist())
    assert len(drawn) > 100
    of_word, drawn_of_word = Counter(), Counter()
    for pair, count in pairs.items():
        of_word[pair[0]] += count
    for pair, count in drawn.items():
        drawn_of_word[pair[0]] += count
    for pair, count in drawn.items():
        assert pair in pairs
        expected, draws = pairs[pair] / of_word[pair[0]], drawn_of_word[pair[0]]
        # Binomial: five standard deviations of a share, and one draw.
        bound = 5 * math.sqrt(expected * (1 - expected) / draws) + 1 / draws
        assert abs(count / draws - expected) <= bound


def test_random_words_are_those_of_their_seed(tables):
    ((_, _, near), (_, _, one)), ((_, _, same), (_, _, other)) = (
        tables("self_kd_random", "--self-kd-random-seed", seed) for seed in (1, 2)
    )
    assert (near.ids == same.ids).all()
    assert (one.ids != other.ids).any()


def test_the_first_table_stays(build, train_step):
    built = build(*TRAINED, "--criterion", "self_kd_frozen", "--self-kd-start-update", 3)
    table = find_output_projection(built.model, built.task.target_dictionary).weight
    first = table.detach().clone()
    train_step(built, built.samples[0], 0)
    with torch.no_grad():
        table.copy_(table.roll(1, 0))
    train_step(built, built.samples[0], 6000)
    eligible = torch.from_numpy(ordinary_words(built.task.target_dictionary))
    expected = nearest_neighbors(first, 4, eligible, "cosine").ids
    assert (teacher_of(built)._table.ids[:, 1:] == expected).all()
    resumed = build(*TRAINED, "--criterion", "self_kd_frozen")
    with pytest.raises(RuntimeError, match="remove its folder and begin again"):
        train_step(resumed, resumed.samples[0], 7)


def test_masses_by_rank(tables):
    (_, _, near), (_, _, ranked) = tables("self_kd_rank")
    assert (ranked.ids == near.ids).all()
    shares = torch.tensor([1, 1 / 2, 1 / 3, 1 / 4]) / (25 / 12)
    expected = near.weights[:, 1:].sum(1, keepdim=True) * shares
    torch.testing.assert_close(ranked.weights[:, 1:], expected)
    torch.testing.assert_close(ranked.weights[:, 0], near.weights[:, 0])


def test_the_end_of_the_sentence_stays_whole(tables):
    (built, _, near), (_, _, other) = tables("self_kd_whole_eos")
    eos = built.task.target_dictionary.eos()
    assert near.weights[eos].tolist() != [1, 0, 0, 0, 0]
    assert other.weights[eos].tolist() == [1, 0, 0, 0, 0]
    others = torch.arange(len(near.ids)) != eos
    assert (other.weights[others] == near.weights[others]).all()
    assert (other.ids == near.ids).all()


def test_neighbors_of_another_table(tables, build, trained):
    other_table = ["--self-kd-table-of", trained]
    (built, _, near), (_, _, other) = tables("self_kd_other_table", *other_table)
    state = torch.load(trained, weights_only=False)["model"]
    eligible = torch.from_numpy(ordinary_words(built.task.target_dictionary))
    found = nearest_neighbors(state["decoder.output_projection.weight"], 4, eligible, "cosine")
    assert (other.ids[:, 1:] == found.ids).all()
    assert (other.ids != near.ids).any()
    criterion = ["--criterion", "self_kd_other_table"]
    with pytest.raises(ValueError, match="which has 48 words; the target dictionary has 88"):
        build(*TRAINED, *criterion, *other_table, data="joined")
    with pytest.raises(ValueError, match="--self-kd-table-of is missing"):
        build(*TRAINED, *criterion)


@pytest.mark.parametrize("name", ["self_kd_belief", "self_kd_doubt"])
def test_variants_that_read_the_logits(name, build, train_step):
    built = build(*TRAINED, "--criterion", name)
    sample = built.samples[0]
    ours = train_step(built, sample)
    output = built.model(**sample["net_input"])
    lprobs = built.model.get_normalized_probs(output, log_probs=True).flatten(0, 1).double()
    table = teacher_of(built)._table
    loss = 0.0
    for row, t in zip(lprobs, sample["target"].flatten().tolist()):
        if t == built.task.target_dictionary.pad():
            continue
        near, q, p = table.ids[t, 1:], table.weights[t, 1:].double(), row.detach().exp()
        if name == "self_kd_belief":
            q = q.sum() * q * p[near] / (q * p[near]).sum()
        else:
            q = q * (1 - p[t])
        off = 0.1 / (len(row) - 1)
        smoothed = -0.9 * row[t] - off * (row.sum() - row[t])
        loss = loss + 0.7 * smoothed - 0.3 * ((1 - q.sum()) * row[t] + (q * row[near]).sum())
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    built.model.zero_grad()
    loss.backward()
    gradient = find_output_projection(built.model, built.task.target_dictionary).weight.grad
    torch.testing.assert_close(
        ours.gradients["decoder.output_projection.weight"], gradient, rtol=1e-4, atol=1e-5
    )


def test_the_target_keeps_its_smoothing(build, train_step):
    """(1 - alpha m) LS - alpha sum_j q_j log p_j, word by word."""
    built = build(*TRAINED, "--criterion", "self_kd_kept")
    sample = built.samples[0]
    ours = train_step(built, sample)
    output = built.model(**sample["net_input"])
    lprobs = built.model.get_normalized_probs(output, log_probs=True).flatten(0, 1).double()
    table = teacher_of(built)._table
    loss = 0.0
    for row, t in zip(lprobs, sample["target"].flatten().tolist()):
        if t == built.task.target_dictionary.pad():
            continue
        near, q = table.ids[t, 1:], table.weights[t, 1:].double()
        smoothed = -0.9 * row[t] - 0.1 / (len(row) - 1) * (row.sum() - row[t])
        loss = loss + (1 - 0.3 * q.sum()) * smoothed - 0.3 * (q * row[near]).sum()
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)


def test_what_the_past_leaves_can_go_to_the_target(build, train_step, tmp_path):
    past = ["--self-kd-candidates", "past", "--self-kd-past-file", tmp_path / "past"]
    built = build(*TRAINED, "--criterion", "self_kd_past_kept", *past)
    sample = built.samples[0]
    plain = train_step(built, sample)  # not seen yet: label smoothing
    output = built.model(**sample["net_input"])
    lprobs = built.model.get_normalized_probs(output, log_probs=True).flatten(0, 1).double()
    ours = train_step(built, sample, 1)
    loss = smoothing = 0.0
    for row, t in zip(lprobs, sample["target"].flatten().tolist()):
        if t == built.task.target_dictionary.pad():
            continue
        values, ids = row.detach().topk(4)
        smoothed = -0.9 * row[t] - 0.1 / (len(row) - 1) * (row.sum() - row[t])
        p = values.exp()
        alpha = 0.3 * p[ids == t].sum()  # as far as the past was right
        loss = loss + (1 - alpha * p.sum()) * smoothed - alpha * (p * row[ids]).sum()
        smoothing = smoothing + smoothed
    assert plain.loss.item() == pytest.approx(smoothing.item(), rel=1e-5)
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-3)  # kept as float16


def test_the_past_can_be_an_average_of_the_epochs(build, train_step, tmp_path):
    past = ["--self-kd-candidates", "past", "--self-kd-past-file", tmp_path / "past"]
    built = build(*TRAINED, "--criterion", "self_kd_past_averaged", *past)
    sample, k = built.samples[0], 4
    width = sample["target"].size(1)
    real = sample["target"].ne(built.task.target_dictionary.pad()).flatten()
    expected = [{} for _ in real]
    torch.manual_seed(1)
    for update in range(4):
        with torch.no_grad():
            output = built.model(**sample["net_input"])
            given = built.model.get_normalized_probs(output, log_probs=False).flatten(0, 1)
        for position, (values, ids) in enumerate(zip(*given.topk(k, 1))):
            now = dict(zip(ids.tolist(), values.tolist()))
            if update:
                then = expected[position]
                now = {j: 0.6 * then.get(j, 0) + 0.4 * now.get(j, 0) for j in {*then, *now}}
            likeliest = sorted(now, key=now.get, reverse=True)[:k]
            expected[position] = {j: now[j] for j in likeliest}
        train_step(built, sample, update)
        recorded = built.criterion.source.past.read(sample["id"].numpy(), width, update + 1)
        for position in real.nonzero().flatten().tolist():
            found = zip(recorded.ids[position].tolist(), recorded.weights[position].tolist())
            assert dict(found) == pytest.approx(expected[position], rel=3e-3)
        with torch.no_grad():
            for parameter in built.model.parameters():
                parameter += 0.1 * torch.randn_like(parameter)


def test_masked_label_smoothing(build, train_step):
    """The source side's words of a joined dictionary get nothing."""
    alone = ["--label-smoothing", 0, "--self-kd-weight", 1, "--self-kd-max-mass", 0.2]
    built = build(*TRAINED, "--criterion", "self_kd_masked", *alone, data="joined")
    sample, dictionary = built.samples[0], built.task.target_dictionary
    ours = train_step(built, sample)
    text = built.task.dataset("train")
    seen = {word for index in range(len(text)) for word in text[index]["target"].tolist()}
    seen -= {dictionary.eos(), dictionary.unk(), dictionary.pad()}
    assert 10 < len(seen) < 0.7 * len(dictionary)
    words = torch.tensor(sorted(seen))
    output = built.model(**sample["net_input"])
    lprobs = built.model.get_normalized_probs(output, log_probs=True).flatten(0, 1).double()
    loss = 0.0
    for row, t in zip(lprobs, sample["target"].flatten().tolist()):
        if t != dictionary.pad():
            loss = loss - 0.8 * row[t] - 0.2 * row[words].mean()
    assert ours.loss.item() == pytest.approx(loss.item(), rel=1e-5)
    built.model.zero_grad()
    loss.backward()
    gradient = find_output_projection(built.model, dictionary).weight.grad
    torch.testing.assert_close(
        ours.gradients["decoder.output_projection.weight"], gradient, rtol=1e-4, atol=1e-5
    )


def test_uniform_mass_is_label_smoothing_of_the_same_mass(build, train_step):
    schedule = ["--self-kd-start-update", 4, "--self-kd-ramp-updates", 4]
    built = build(*TRAINED, "--criterion", "self_kd_uniform", *schedule)
    for update, smoothing in ((0, 0.1), (6, 0.85 * 0.1 + 0.15 * 0.5), (9, 0.7 * 0.1 + 0.3 * 0.5)):
        plain = build(
            *("--arch", "transformer", *TINY, "--criterion", "label_smoothed_cross_entropy"),
            *("--label-smoothing", smoothing),
        )
        ours = train_step(built, built.samples[0], update)
        assert ours.loss.item() == pytest.approx(train_step(plain, plain.samples[0]).loss.item())
    sample = built.samples[0]
    evaluated = built.task.valid_step(sample, built.model.eval(), built.criterion.eval())[0].item()
    plain = build(
        *("--arch", "transformer", *TINY, "--criterion", "label_smoothed_cross_entropy"),
        *("--label-smoothing", 0.1),
    )
    expected = plain.task.valid_step(sample, plain.model.eval(), plain.criterion.eval())[0].item()
    assert evaluated == pytest.approx(expected)


def test_a_control_is_calibrated(trained, corpus):
    output = command("fairseq-skd", "calibration", trained, corpus / "pair", "--json")
    (line,) = [line for line in output.splitlines() if line.startswith('{"calibration"')]
    words = sum(len(line.split()) + 1 for line in (corpus / "valid.tgt").open())
    assert json.loads(line)["calibration"][0]["words"] == words


def test_a_run_goes_on_from_the_checkpoint_of_another_criterion(
    trained, corpus, tmp_path, monkeypatch, capsys
):
    trunk, folder = trained.parent, tmp_path / "branch"
    updates = 1
    (tmp_path / f"checkpoint_1_{updates}.pt").symlink_to(trunk / "checkpoint_last.pt")
    criterion = "label_smoothed_cross_entropy"
    arguments = ["branch", tmp_path, updates, folder, "--criterion", criterion]
    monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
    branch.main()
    branch.main()
    assert capsys.readouterr().out.splitlines() == [
        f"{folder} begins with {tmp_path}/checkpoint_1_{updates}.pt",
        f"{folder} has begun already",
    ]
    printed = command(
        *("fairseq-train", corpus / "pair", "--criterion", criterion, "--label-smoothing", 0.1),
        *("--user-dir", PLUGIN, "--arch", "transformer", *TINY, "--cpu", "--save-dir", folder),
        *("--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200, "--max-epoch", 2),
    )
    assert f"Loaded checkpoint {folder}/checkpoint_last.pt (epoch 2 @ " in printed
    assert "begin training epoch 2" in printed
    assert (folder / "checkpoint_best.pt").exists()
    for arguments, message in [
        (["branch", tmp_path, 7, folder, "--criterion", criterion], "no checkpoint of update 7"),
        (["branch", tmp_path, 1, folder, "--criterion", "mine"], "--criterion is mine, which nei"),
    ]:
        monkeypatch.setattr(sys, "argv", [*map(str, arguments)])
        with pytest.raises(SystemExit, match=message):
            branch.main()
