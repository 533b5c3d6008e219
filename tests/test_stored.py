"""What finished models teach: the file, the command that fills it, and trainings that read it."""

import concurrent.futures
import errno
import fcntl
import json
import os
import pickle
import re
import signal
import subprocess
import sys
import time

import numpy as np
import pytest
import torch
from fairseq.data import BucketPadLengthDataset

from fairseq_skd import StoredTargets, write_stored_targets
from fairseq_skd.compatibility import text_layout
from fairseq_skd.likeliest import likeliest_words, sampled_from
from fairseq_skd.stored import TargetsWriter
from fairseq_skd.word_file import TextLayout, WordFileError, make
from tests.conftest import PLUGIN, TINY_LM, command
from tests.test_command_line import assert_equal_weights, in_processes, in_shards, logged, train
from tests.test_commands import machine, refused, skd
from tests.test_criterion import LANGUAGE_MODELS, MODELS, NOW, assert_same_gradients

SELF_KD = ["--criterion", "self_kd", "--label-smoothing", 0.1, "--self-kd-weight", 0.3]
STORED = [*SELF_KD, "--self-kd-candidates", "stored", "--self-kd-teacher"]
SETTINGS = ["--cpu", "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200, "--max-epoch", 2]
LM = ["--task", "language_modeling", "--tokens-per-sample", 12]


def rows(length, k=3, words=40, seed=0):
    """Words of one sentence and their probabilities."""
    generator = torch.Generator().manual_seed(100 * seed + length)
    top = torch.rand(length, words, generator=generator).mul(9).softmax(1).topk(k, 1)
    return top.indices, top.values


# ---- the likeliest words of several models ------------------------------------------------------


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize(
    ("words", "positions", "k", "block"),
    [
        (1, 3, 1, None),
        (31, 5, 4, 1),
        (33, 1, 33, None),
        (1003, 70, 10, 4 * 1003 * 33),
        (64, 0, 2, 1),
    ],
)
def test_the_mean_of_models_of_different_width(words, positions, k, block, temperature):
    generator = torch.Generator().manual_seed(words)

    def random(*shape):
        return torch.randn(*shape, generator=generator)

    features, tables = [], []
    for width in (8, 5):
        features.append(random(positions, width))
        tables.append(random(words, width))
    features.append(random(positions, words))  # logits
    tables.append(None)
    target = torch.randint(words, (positions,), generator=generator)
    found = likeliest_words(features, tables, target, k, temperature, block)
    mean = sum(
        ((x if w is None else x @ w.t()).double() / temperature).softmax(1)
        for x, w in zip(features, tables)
    ) / len(features)
    expected = mean.topk(k, 1)
    torch.testing.assert_close(found.probabilities.double(), expected.values, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(mean.gather(1, found.ids), expected.values, rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        found.of_target.double(), mean.gather(1, target[:, None])[:, 0], rtol=1e-5, atol=1e-8
    )
    assert found.ids.shape == (positions, k)


def test_padding_has_words_and_wrong_numbers_are_refused():
    logits = torch.randn(4, 7, generator=torch.Generator().manual_seed(1))
    target = torch.tensor([3, -100, 6, 10**6])
    found = likeliest_words([logits], [None], target, 2)
    assert found.ids.equal(logits.topk(2, 1).indices)
    expected = logits.softmax(1).gather(1, target.clamp(0, 6)[:, None])[:, 0]
    torch.testing.assert_close(found.of_target, expected)
    for numbers, message in (
        ({"top_k": 0}, "top_k is 0; allowed: 1 to 7"),
        ({"top_k": 8}, "top_k is 8; allowed: 1 to 7"),
        ({"top_k": 2, "sampled": 2}, "sampled is 2; allowed: 0 to 1, below top_k"),
        ({"top_k": 2, "sampled": -1}, "sampled is -1; allowed: 0 to 1"),
    ):
        with pytest.raises(ValueError, match=message):
            likeliest_words([logits], [None], target, **numbers)


@pytest.mark.parametrize(("k", "sampled"), [(2, 1), (10, 5), (16, 14), (70, 3)])
@pytest.mark.parametrize("block", [None, 1])
def test_what_is_sampled_is_on_average_what_the_models_give(k, sampled, block):
    words, grid = 70, 4000
    generator = torch.Generator().manual_seed(k)
    one = torch.randn(1, words, generator=generator) * 3  # some words are likelier than a part
    features, table = one.expand(grid, words), None
    offsets = (torch.arange(grid) + 0.5) / grid
    target = torch.zeros(grid, dtype=torch.long)
    found = likeliest_words([features], [table], target, k, 1.0, block, sampled, offsets)
    p = one[0].double().softmax(0)
    best = p.topk(k - sampled)
    assert (found.ids[:, : k - sampled] == best.indices).all()
    kept = torch.zeros(grid, words, dtype=torch.float64)
    kept.scatter_add_(1, found.ids, found.probabilities.double())
    torch.testing.assert_close(kept.sum(1), torch.ones(grid).double(), rtol=1e-5, atol=0)
    part = (1 - best.values.sum()) / sampled
    torch.testing.assert_close(kept.mean(0), p, rtol=1e-4, atol=2 * float(part) / grid + 1e-7)
    # Each as often as is expected, but for one; no word twice.
    rest = p.scatter(0, best.indices, 0) / part.clamp(min=1e-12)
    times = kept.scatter(1, best.indices.expand(grid, -1), 0) / part.clamp(min=1e-12)
    if k < words:
        assert (times - rest).abs().max() < 1 + 1e-4
    has = found.probabilities > 0
    names = found.ids.masked_fill(~has, -1)
    for row in names[:: grid // 50].tolist():
        real = [word for word in row if word >= 0]
        assert len(real) == len(set(real))


def test_points_at_the_limit_of_two_groups_are_rounded_to_no_impossible_word():
    for groups in range(2, 40):
        rest = torch.zeros(32 * groups, 3)
        rest[31::32] = torch.tensor([0.1, 0.07, 1 / 3])  # the last word of each group
        for offset in (0.0, 1.0):
            ids, shares = sampled_from(rest, groups, torch.full((3,), offset))
            assert rest.t().gather(1, ids)[shares > 0].min() > 0
            torch.testing.assert_close(shares.sum(1), rest.sum(0), rtol=1e-5, atol=0)


# ---- the file -----------------------------------------------------------------------------------


def test_what_is_written_is_read(tmp_path):
    sentences = [rows(length, seed=length) for length in (3, 1, 0, 4)]
    write_stored_targets(tmp_path / "t", sentences, {"of": "mine"})
    stored = StoredTargets(tmp_path / "t")
    assert (len(stored), stored.top_k, stored.file.head["teacher"]) == (4, 3, {"of": "mine"})
    soft = stored.read([3, 0, 2], width=5)  # wider than the longest: more padding
    assert soft.share.tolist() == [1, 1, 1, 1, 0, 1, 1, 1, 0, 0, 0, 0, 0, 0, 0]
    for (ids, probabilities), place in ((sentences[3], 0), (sentences[0], 5)):
        assert soft.ids[place : place + len(ids)].equal(ids)
        found = soft.weights[place : place + len(ids)]
        torch.testing.assert_close(found, probabilities, rtol=1e-3, atol=1e-4)
    skipped = stored.read(np.array([3, 0]), width=4, skip=2)
    assert skipped.ids.shape == (4, 3)
    assert skipped.ids[:3].equal(torch.cat([sentences[3][0][2:], sentences[0][0][2:]]))
    other = tmp_path / "other"
    write_stored_targets(other, sentences[::-1])
    assert stored.fingerprint == StoredTargets(str(tmp_path / "t")).fingerprint
    assert stored.fingerprint != StoredTargets(other).fingerprint
    assert sorted(os.listdir(tmp_path)) == ["other", "t"]


@pytest.mark.parametrize(
    ("ids", "probabilities", "message"),
    [
        ([[1, 2]], [[-0.1, 0.5]], "sentence 1 are no distribution.*log-probabilities take exp"),
        ([[1, 2]], [[0.7, 0.5]], "sentence 1 are no distribution"),
        ([[1, 2]], [[float("nan"), 0.5]], "sentence 1 are no distribution"),
        ([[1, -2]], [[0.5, 0.5]], "sentence 1 has ids from -2 to 1"),
        (
            [[1, 2, 3]],
            [[0.1, 0.1, 0.1]],
            r"sentence 1 has ids of shape \(1, 3\).* T x 2 are needed",
        ),
        ([1, 2], [0.1, 0.1], r"sentence 1 has ids of shape \(2,\)"),
        ([[1, 2]], [[0.5]], r"probabilities of shape \(1, 1\)"),
    ],
)
def test_what_is_no_distribution_is_not_written(tmp_path, ids, probabilities, message):
    (tmp_path / "t").write_text("before")
    good = torch.tensor([[1, 2]]), torch.tensor([[0.5, 0.25]])
    with pytest.raises(ValueError, match=message):
        write_stored_targets(tmp_path / "t", [good, (ids, probabilities)])
    assert (tmp_path / "t").read_text() == "before"
    assert os.listdir(tmp_path) == ["t"]


def test_files_that_cannot_be_used(tmp_path):
    path = tmp_path / "t"
    with pytest.raises(WordFileError, match=r"there is no file .*t$"):
        StoredTargets(path)
    path.write_text("Dear reader")
    with pytest.raises(WordFileError, match="is no file of words and probabilities"):
        StoredTargets(path)
    path.write_text(json.dumps({"format": "fairseq_skd words 3"}).ljust(2**16))
    with pytest.raises(WordFileError, match="another version"):
        StoredTargets(path)
    write_stored_targets(path, [rows(5), rows(2)])
    os.truncate(path, path.stat().st_size - 1)
    with pytest.raises(WordFileError, match=r"has \d+ bytes instead of \d+: it is cut off"):
        StoredTargets(path)
    layout = TextLayout(np.array([2, 3]), "a text")
    path.unlink()
    writer = TargetsWriter(path, {"top_k": 3}, layout)
    writer.write(np.array([1]), *(x[None] for x in rows(3)))
    assert writer.missing().tolist() == [0]
    with pytest.raises(WordFileError, match=r"1 of 2 sentences are missing.*same .*teach command"):
        StoredTargets(path)
    assert f"{path} is not finished: 1 of 2" in refused("doctor", path)
    with pytest.raises(
        WordFileError, match="differs in the text, dictionary or length of blocks, k"
    ):
        TargetsWriter(path, {"top_k": 4}, layout._replace(fingerprint="another"))
    assert TargetsWriter(path, {"top_k": 3}, layout).missing().tolist() == [0]
    with pytest.raises(WordFileError, match=r"needs \d+\.\d\d GB .* GB free; --output takes"):
        TargetsWriter(tmp_path / "large", {"top_k": 3}, TextLayout(np.array([10**13]), "x"))
    assert os.listdir(tmp_path) == ["t"]


def test_those_that_make_a_file_together_reserve_its_room_once(tmp_path, monkeypatch):
    reserved, reserve = [], os.posix_fallocate

    def slow(*arguments):
        reserved.append(arguments)
        time.sleep(0.3)  # in which the others come
        reserve(*arguments)

    monkeypatch.setattr(os, "posix_fallocate", slow)
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        made = [
            pool.submit(make, tmp_path / "t", {"top_k": 3}, np.array([2, 1]), "") for _ in range(4)
        ]
    said = sorted(one.result() for one in made)
    assert len(reserved) == 1
    assert "made for 0.00 GB (2 sentences, k = 3)" in said[0]
    assert all("was made by another process" in line for line in said[1:])
    assert os.listdir(tmp_path) == ["t"]


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT])
def test_a_disk_that_is_full_meanwhile_or_has_a_quota(tmp_path, monkeypatch, number):
    def full(*_):
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(WordFileError, match=r"needs 0.00 GB .*--output takes another place"):
        TargetsWriter(tmp_path / "t", {"top_k": 3}, TextLayout(np.array([2]), "x"))
    assert os.listdir(tmp_path) == []


def test_a_process_that_loads_data_opens_the_file_itself(tmp_path):
    write_stored_targets(tmp_path / "t", [rows(5), rows(2)])
    stored = StoredTargets(tmp_path / "t")
    there = pickle.loads(pickle.dumps(stored))
    assert there.read([1], 2).ids.equal(stored.read([1], 2).ids)


def test_a_damaged_file_is_found_out(tmp_path):
    path = tmp_path / "t"
    write_stored_targets(path, [rows(5), rows(2), rows(7)])
    assert {row["what"]: row["found"] for row in machine("doctor", path)["file"]}["whole"] == "yes"
    stored = StoredTargets(path)
    offset = stored.file.sizes.words + int(stored.file.starts[1]) * stored.file.words.itemsize
    with path.open("r+b") as file:
        file.seek(offset)
        file.write(b"\x2a")
    assert StoredTargets(path).file.damaged() == [1]
    expected = "is damaged: 1 sentences are not what was written, the first one is 1. Write it anew"
    assert expected in refused("doctor", path)


def test_two_that_make_one_file_at_once_share_it(tmp_path, monkeypatch):
    """The second one finds the file of the first one when it has made its own, without locks."""
    layout = TextLayout(np.array([2, 3]), "a text")
    real, first = os.link, []

    def no_locks(*_):
        raise OSError(errno.EBADF, "a folder over a network")

    monkeypatch.setattr(fcntl, "flock", no_locks)

    def late(source, place):
        if not first:
            first.append(
                TargetsWriter.__new__(TargetsWriter)
            )  # so that the inner one does not wait
            first[0].__init__(tmp_path / "t", {"top_k": 3}, layout)
            first[0].write(np.array([0]), *(x[None] for x in rows(2)))
        real(source, place)

    monkeypatch.setattr(os, "link", late)
    second = TargetsWriter(tmp_path / "t", {"top_k": 3}, layout)
    assert second.missing().tolist() == [1]
    second.write(np.array([1]), *(x[None] for x in rows(3)))
    assert StoredTargets(tmp_path / "t").read([0], 2).ids.equal(rows(2)[0])
    assert os.listdir(tmp_path) == ["t"]


def test_a_file_system_without_links_does(tmp_path, monkeypatch):
    def refuses(source, place):
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuses)
    TargetsWriter(tmp_path / "t", {"top_k": 3}, TextLayout(np.array([2]), "a text"))
    assert os.listdir(tmp_path) == ["t"]


# ---- the criterion ------------------------------------------------------------------------------


def made_for(task, path, k=4, **teacher):
    """Write a file for a task's training text, and return the rows of every sentence."""
    layout = text_layout(task)
    words = len(task.target_dictionary)
    sentences = [rows(int(n), k, words, i) for i, n in enumerate(layout.lengths)]
    teacher = {"checkpoints": [{}, {}], **teacher}
    writer = TargetsWriter(path, {"top_k": k, "teacher": teacher}, layout)
    for i, (ids, probabilities) in enumerate(sentences):
        writer.write(np.array([i]), ids[None], probabilities[None])
    writer.close()
    return sentences


def by_definition(built, sample, sentences, weight, epsilon=0.1, prefix=0):
    """Word by word in float64: the k words as they are, what they leave to all words alike."""
    output = built.model(**sample["net_input"])
    lprobs = built.model.get_normalized_probs(output, log_probs=True).double()
    target = built.model.get_targets(sample, output)
    loss = kd = 0.0
    for row, sentence, index in zip(lprobs, target, sample["id"].tolist()):
        ids, probabilities = sentences[index]
        for place in range(prefix, len(sentence)):
            t, lp = sentence[place].item(), row[place]
            if t == built.task.target_dictionary.pad():
                continue
            p = probabilities[place].half().double()
            q = torch.full_like(lp, (1 - p.sum().item()) / len(lp))
            q[ids[place]] += p
            off = epsilon / (len(lp) - 1)
            smoothed = -(1 - epsilon) * lp[t] - off * (lp.sum() - lp[t])
            distilled = -(q * lp).sum()
            loss = loss + (1 - weight) * smoothed + weight * distilled
            kd += distilled.item()
    built.model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}
    return loss.item(), kd, gradients


@pytest.mark.parametrize(
    ("model", "lm", "prefix"),
    [
        (MODELS["transformer"], False, 0),
        (MODELS["transformer"], False, 2),
        (MODELS["lstm"], False, 0),
        (LANGUAGE_MODELS["transformer_lm"], True, 0),
    ],
)
def test_it_trains_on_the_words_of_the_file(build, train_step, tmp_path, model, lm, prefix):
    task = build(*model, *SELF_KD, lm=lm).task
    sentences = made_for(task, tmp_path / "t")
    options = ["--ignore-prefix-size", prefix]
    built = build(*model, *STORED, tmp_path / "t", *NOW, *options, lm=lm)
    for sample in built.samples:
        loss, kd, gradients = by_definition(built, sample, sentences, 0.3, prefix=prefix)
        ours = train_step(built, sample)
        assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
        assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
        assert_same_gradients(ours.gradients, gradients)


def test_sentences_without_words_are_trained_as_without_a_teacher(build, train_step, tmp_path):
    task = build(*MODELS["transformer"], *SELF_KD).task
    layout = text_layout(task)
    nothing = [(torch.zeros(n, 2).long(), torch.zeros(n, 2)) for n in layout.lengths.tolist()]
    write_stored_targets(tmp_path / "t", nothing)
    built = build(*MODELS["transformer"], *STORED, tmp_path / "t", *NOW)
    plain = build(
        *(*MODELS["transformer"], "--criterion", "label_smoothed_cross_entropy"),
        *("--label-smoothing", 0.1),
    )
    ours, theirs = (train_step(each, each.samples[0]) for each in (built, plain))
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert_same_gradients(ours.gradients, theirs.gradients)


def test_padding_beyond_the_sentences_does_not_count(build, train_step, tmp_path):
    """--required-seq-len-multiple, and batches that are filled up with rows of padding."""
    sentences = made_for(build(*MODELS["transformer"], *SELF_KD).task, tmp_path / "t")
    built = build(*MODELS["transformer"], *STORED, tmp_path / "t", *NOW)
    sample = built.samples[0]
    plain = train_step(built, sample)
    pad = built.task.target_dictionary.pad()
    target = torch.nn.functional.pad(sample["target"], (0, 3, 0, 2), value=pad)
    inputs = dict(sample["net_input"])
    decoder = torch.nn.functional.pad(inputs["prev_output_tokens"], (0, 3, 0, 2), value=pad)
    source = torch.cat([inputs["src_tokens"], inputs["src_tokens"][:2]])
    lengths = torch.cat([inputs["src_lengths"], inputs["src_lengths"][:2]])
    inputs = {"src_tokens": source, "src_lengths": lengths, "prev_output_tokens": decoder}
    padded = train_step(built, {**sample, "target": target, "net_input": inputs})
    assert padded.loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
    assert padded.log["self_kd_mass"].item() == pytest.approx(plain.log["self_kd_mass"].item())
    assert by_definition(built, sample, sentences, 0.3)[0] == pytest.approx(plain.loss.item())


def test_buckets_are_padding(build):
    """ve-fairseq fails there with numpy 2, so the data set is wrapped here."""
    task = build(*MODELS["transformer"], *SELF_KD).task
    expected, dataset = text_layout(task), task.dataset("train")
    pad = task.target_dictionary.pad()
    wrapped = BucketPadLengthDataset.__new__(BucketPadLengthDataset)
    wrapped.dataset, wrapped.pad_idx, wrapped.left_pad = dataset.tgt, pad, False
    wrapped._tensor_key, wrapped._bucketed_sizes = None, np.full(len(dataset), 40)
    dataset.tgt, dataset.tgt_sizes = wrapped, wrapped.sizes
    assert len(dataset.tgt[0]) == 40
    found = text_layout(task)
    assert found.fingerprint == expected.fingerprint
    assert (found.lengths == expected.lengths).all()


def test_another_text_than_the_file_says(build, tmp_path):
    """A batch whose sentences are longer than in the data set, as a special symbol makes them."""
    made_for(build(*MODELS["transformer"], *SELF_KD).task, tmp_path / "t")
    built = build(*MODELS["transformer"], *STORED, tmp_path / "t", *NOW)
    sample = built.samples[0]
    longer = torch.cat([sample["target"][:, :1], sample["target"]], 1)
    with pytest.raises(WordFileError, match=r"sentence \d+ has \d+ words in a batch and \d+ in"):
        built.criterion.begin_update(0, [{**sample, "target": longer}])


def test_the_word_pad_within_a_sentence(build, train_step, tmp_path):
    """fairseq reads it as padding, which trains nothing; the sentence is as long as it was."""
    sentences = made_for(build(*MODELS["transformer"], *SELF_KD).task, tmp_path / "t")
    built = build(*MODELS["transformer"], *STORED, tmp_path / "t", *NOW)
    sample = built.samples[0]
    target = sample["target"].clone()
    target[:, 1] = built.task.target_dictionary.pad()
    sample = {**sample, "target": target}
    loss, kd, gradients = by_definition(built, sample, sentences, 0.3)
    ours = train_step(built, sample)
    assert ours.loss.item() == pytest.approx(loss, rel=1e-5)
    assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-5)
    assert_same_gradients(ours.gradients, gradients)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--self-kd-candidates", "stored"], "--self-kd-teacher is missing"),
        (["--self-kd-teacher", "t"], "--self-kd-candidates is neighbors; a teacher's file is read"),
    ],
)
def test_options_that_do_not_fit(build, options, message):
    with pytest.raises(ValueError, match=message):
        build(*MODELS["transformer"], *SELF_KD, *options, load=False)


def test_what_belongs_to_another_text_is_refused_before_the_first_update(
    build, train_step, tmp_path
):
    task = build(*MODELS["transformer"], *SELF_KD).task
    made_for(task, tmp_path / "t")
    for other in (
        build(*MODELS["transformer"], *STORED, tmp_path / "t", *NOW, data="joined"),
        build(*LANGUAGE_MODELS["transformer_lm"], *STORED, tmp_path / "t", *NOW, lm=True),
    ):
        with pytest.raises(ValueError, match="made for another text, dictionary or length of bl"):
            train_step(other, other.samples[0])
    built = build(*MODELS["transformer"], *STORED, f"{tmp_path / 't'}:{tmp_path / 't'}", *NOW)
    with pytest.raises(ValueError, match="names 2 files, and the training data has 1 parts"):
        train_step(built, built.samples[0])
    built = build(*MODELS["transformer"], *STORED, tmp_path / "absent", *NOW)
    with pytest.raises(WordFileError, match=r"there is no file .*absent"):
        train_step(built, built.samples[0])
    loss, _, _ = built.task.valid_step(built.samples[0], built.model, built.criterion.eval())
    assert loss > 0  # validation needs no teacher


@pytest.mark.parametrize(
    ("teacher", "words"), [({}, "4@1"), ({"sampled": 1, "temperature": 2.0}, "3+1@2")]
)
def test_the_signature_names_the_teacher(build, tmp_path, caplog, teacher, words):
    made_for(build(*MODELS["transformer"], *SELF_KD).task, tmp_path / "t", **teacher)
    with caplog.at_level("INFO"):
        build(*MODELS["transformer"], *STORED, tmp_path / "t", load=False)
    fingerprint = StoredTargets(tmp_path / "t").fingerprint
    expected = f"self_kd|cand:stored|teacher:2x{words}#{fingerprint}|weight:0.3|start:auto|ramp:"
    assert any(message.startswith(expected) for message in caplog.messages)


# ---- the command, and trainings -----------------------------------------------------------------


@pytest.fixture(scope="module")
def teachers(corpus, tmp_path_factory):
    """Two translation models of different architectures, by plain fairseq."""
    found = []
    for seed, model in enumerate((MODELS["transformer"], MODELS["lstm"])):
        folder = tmp_path_factory.mktemp("teacher")
        command(
            *("fairseq-train", corpus / "pair", *model, *SETTINGS, "--seed", seed),
            *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1),
            *("--required-batch-size-multiple", 1, "--save-dir", folder),
        )
        found.append(folder / "checkpoint_best.pt")
    return found


@pytest.fixture(scope="module")
def taught(corpus, teachers, tmp_path_factory):
    """The file of both, and what the command printed."""
    path = tmp_path_factory.mktemp("taught") / "teacher.skd"
    both = ":".join(map(str, teachers))
    printed = machine(
        "teach", corpus / "pair", "--path", both, "--output", path, "--top-k", 5, "--max-tokens", 90
    )
    return path, printed["teacher"][0]


def dense(paths, corpus, temperature=1.0):
    """Return the mean probabilities of every sentence by fairseq's own forward passes."""
    from fairseq import checkpoint_utils

    found = []
    for path in paths:
        (model,), _, task = checkpoint_utils.load_model_ensemble_and_task(
            [str(path)], arg_overrides={"data": str(corpus / "pair")}
        )
        task.load_dataset("train")
        dataset = task.dataset("train")
        model.eval()
        probabilities = []
        with torch.no_grad():
            for i in range(len(dataset)):
                sample = dataset.collater([dataset[i]])
                lprobs = model.get_normalized_probs(model(**sample["net_input"]), log_probs=True)
                probabilities.append((lprobs[0].double() / temperature).softmax(1))
        found.append(probabilities)
    targets = [dataset[i]["target"] for i in range(len(dataset))]
    return [sum(each) / len(paths) for each in zip(*found)], targets


def test_the_file_holds_the_likeliest_words_of_the_mean(corpus, teachers, taught):
    path, printed = taught
    expected, targets = dense(teachers, corpus)
    stored = StoredTargets(path)
    nll = right = mass = words = 0.0
    for i, (p, target) in enumerate(zip(expected, targets)):
        soft = stored.read([i], len(p))
        best = p.topk(5, 1)
        torch.testing.assert_close(soft.weights.double(), best.values, rtol=2e-3, atol=1e-6)
        torch.testing.assert_close(p.gather(1, soft.ids), best.values, rtol=1e-4, atol=1e-7)
        nll -= p.gather(1, target[:, None]).log().sum().item()
        right += (p.argmax(1) == target).sum().item()
        mass += best.values.sum().item()
        words += len(target)
    assert printed["words"] == words
    assert printed["perplexity"] == pytest.approx(np.exp(nll / words), rel=1e-4)
    assert printed["right_first_choices"] == pytest.approx(right / words, abs=2 / words)
    assert printed["mass_of_the_likeliest"] == pytest.approx(mass / words, rel=1e-4)
    head = stored.file.head["teacher"]
    assert [len(checkpoint["sha256"]) for checkpoint in head["checkpoints"]] == [64, 64]
    assert head["precision"] == "float32"


def test_words_are_sampled_as_likely_as_they_are(corpus, teachers, tmp_path):
    """Of all positions together each word has what the teacher gives it, in any batches."""
    options = ["--path", teachers[0], "--top-k", 5, "--sampled", 3, "--json"]
    printed = machine("teach", corpus / "pair", *options, "--output", tmp_path / "t")["teacher"][0]
    stored, (expected, _) = StoredTargets(tmp_path / "t"), dense(teachers[:1], corpus)
    total = kept = variance = mass = 0.0
    for i, p in enumerate(expected):
        soft = stored.read([i], len(p))
        best = p.topk(2, 1)
        assert soft.ids[:, :2].equal(best.indices)
        torch.testing.assert_close(soft.weights.sum(1), torch.ones(len(p)), rtol=2e-3, atol=0)
        part = (1 - best.values.sum(1, keepdim=True)) / 3
        times = p.scatter(1, best.indices, 0) / part % 1
        variance += (part**2 * times * (1 - times)).sum(0)
        total += p.sum(0)
        kept += torch.zeros_like(p).scatter_add_(1, soft.ids, soft.weights.double()).sum(0)
        mass += best.values.sum().item()
    assert ((kept - total).abs() < 4 * variance.sqrt() + 2e-3 * total).all()
    assert printed["mass_of_the_likeliest"] == pytest.approx(mass / printed["words"], rel=1e-4)
    shards = [*options[:-1], "--output", tmp_path / "u", "--max-tokens", 50, "--num-shards", 2]
    for shard in (1, 0):
        skd("teach", corpus / "pair", *shards, "--shard-id", shard)
    again = StoredTargets(tmp_path / "u")
    same = again.file.words["ids"] == stored.file.words["ids"]
    assert same.mean() > 0.99  # rounded otherwise, a position's points may lie beside a limit
    assert "│ sampled " in skd("doctor", tmp_path / "t")
    for other in ("--sampled=2", "--sampled=0"):
        message = refused("teach", corpus / "pair", *options, other, "--output", tmp_path / "t")
        assert "it differs in sampled" in message


def test_shards_write_one_file_and_a_temperature_counts(corpus, teachers, tmp_path):
    options = ["--path", teachers[0], "--output", tmp_path / "t", "--temperature", 2, "--top-k", 3]
    printed = skd("teach", corpus / "pair", *options, "--num-shards", 2, "--shard-id", 1)
    assert "80 sentences are still missing" in printed
    printed = skd("teach", corpus / "pair", *options)
    assert "80 of 160 sentences are missing" in printed
    assert "of the 80 sentences that this command wrote" in " ".join(printed.split())
    stored = StoredTargets(tmp_path / "t")
    assert stored.file.damaged() == []
    expected, _ = dense(teachers[:1], corpus, 2.0)
    for i in (0, 1, 159):
        soft = stored.read([i], len(expected[i]))
        best = expected[i].topk(3, 1).values
        torch.testing.assert_close(soft.weights.double(), best, rtol=2e-3, atol=1e-6)
    again = skd("teach", corpus / "pair", *options)
    assert "is complete: nothing is left to do" in again
    assert "words a second" not in again


def test_what_was_killed_goes_on(corpus, teachers, taught, tmp_path):
    """A kill in the middle, then the same command; the file is that of an uninterrupted one."""
    path = tmp_path / "t"
    both = ":".join(map(str, teachers))
    arguments = ["teach", corpus / "pair", "--path", both, "--output", path, "--top-k", 5]
    arguments += ["--max-tokens", 20]
    slow = (
        "import os, signal, fairseq_skd.stored as s\n"
        "write, count = s.TargetsWriter.write, [0]\n"
        "def dies(self, *a):\n"
        "    write(self, *a); count[0] += 1\n"
        "    if count[0] == 4: os.kill(os.getpid(), signal.SIGKILL)\n"
        "s.TargetsWriter.write = dies\n"
        "from fairseq_skd.command_line import main\nmain()\n"
    )
    killed = subprocess.run([sys.executable, "-c", slow, *map(str, arguments)], capture_output=True)
    assert killed.returncode == -signal.SIGKILL
    left = int(re.search(r"(\d+) of 160", refused("doctor", path))[1])
    assert 100 < left < 160
    assert f"{left} of 160 sentences are missing" in skd(*arguments)
    ours, whole = StoredTargets(path), StoredTargets(taught[0])
    assert ours.file.damaged() == []
    # Batches of another shape round otherwise.
    found, expected = (x.read(np.arange(160), 12) for x in (ours, whole))
    torch.testing.assert_close(found.weights, expected.weights, rtol=2e-3, atol=1e-6)


def test_ctrl_c_says_how_to_go_on(corpus, teachers, tmp_path):
    slow = (
        "import signal, time, fairseq_skd.stored as s\n"
        # A shell starts what runs in the background with Ctrl-C ignored.
        "signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "write = s.TargetsWriter.write\n"
        "def waits(self, *a):\n"
        "    write(self, *a); print('written', flush=True); time.sleep(60)\n"
        "s.TargetsWriter.write = waits\n"
        "from fairseq_skd.command_line import main\nmain()\n"
    )
    arguments = ["teach", corpus / "pair", "--path", teachers[0], "--output", tmp_path / "t"]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    with subprocess.Popen([sys.executable, "-c", slow, *map(str, arguments)], **pipes) as process:
        assert process.stdout.readline() == "written\n"
        time.sleep(0.1)
        process.send_signal(signal.SIGINT)
        _, errors = process.communicate(timeout=60)
    assert process.returncode == 2
    assert "fairseq-skd: interrupted; the same command goes on from here" in errors


def test_sentences_that_are_too_long_for_a_teacher_get_nothing(corpus, tmp_path):
    folder = tmp_path / "short"
    command(
        *("fairseq-train", corpus / "pair", *MODELS["transformer"], *SETTINGS, "--max-epoch", 1),
        *("--max-source-positions", 8, "--max-target-positions", 8, "--save-dir", folder),
        "--skip-invalid-size-inputs-valid-test",
    )
    path = tmp_path / "t"
    checkpoint = folder / "checkpoint_best.pt"
    printed = skd("teach", corpus / "pair", "--path", checkpoint, "--output", path)
    count = int(re.search(r"(\d+) sentences are longer than a teacher reads", printed)[1])
    stored = StoredTargets(path)
    lengths = np.diff(stored.file.starts)
    source = [len(line.split()) + 1 for line in (corpus / "train.src").open()]
    too_long = (lengths > 8) | (np.array(source) > 8)
    assert count == too_long.sum() > 0
    for i in (np.flatnonzero(too_long)[0], np.flatnonzero(~too_long)[0]):
        share = stored.read([i], int(lengths[i])).share
        assert share.tolist() == [float(not too_long[i])] * int(lengths[i])
    rows = {row["what"]: row["found"] for row in machine("doctor", path)["file"]}
    assert rows["sentences without words"] == str(count)
    again = skd("teach", corpus / "pair", "--path", checkpoint, "--output", path)
    assert f"{count} sentences in it were longer than a teacher read" in again
    # One that is missing again is the only one of the text for this command, or of its shard.
    one = np.flatnonzero(too_long)[0]
    with path.open("r+b") as file:
        file.seek(stored.file.sizes.marks + 4 * int(one))
        file.write(bytes(4))
    shard = ["--num-shards", 160, "--shard-id", one]
    skd("teach", corpus / "pair", "--path", checkpoint, "--output", path, *shard)
    assert StoredTargets(path).file.empty().tolist() == np.flatnonzero(too_long).tolist()


def test_a_text_that_is_too_long_leaves_no_file(corpus, teachers, tmp_path):
    limit = ["--max-target-positions", 1]
    message = refused(
        "teach", corpus / "pair", "--path", teachers[0], "--output", tmp_path / "t", *limit
    )
    assert "all sentences are longer than a teacher reads ((1024, 1) positions)" in message
    assert os.listdir(tmp_path) == []


def test_teach_refuses_what_cannot_work(corpus, teachers, tmp_path):
    def message(*options, data=corpus / "pair", path=teachers[0]):
        return refused("teach", data, "--path", path, "--output", tmp_path / "t", *options)

    for options, expected in (
        (["--top-k", 0], "--top-k is 0; allowed: 1 or more"),
        (["--top-k", 999], "--top-k is 999; allowed: 1 to 48, the words of the dictionary"),
        (["--sampled", 10], "--sampled is 10; allowed: 0 to 9, below --top-k"),
        (["--temperature", 0], "--temperature is 0.0; allowed: a positive number"),
        (["--num-shards", 2, "--shard-id", 2], "--shard-id is 2; allowed: 0 to 1"),
        (["--fp16", "--cpu"], "--fp16 is for a GPU"),
        (["--subset", "absent"], "has no text 'absent'"),
        (
            ["--tokens", 4],
            "--tokens is no option of fairseq-skd teach, nor of the task Translation",
        ),
        (["--left-pad-target", "True"], "--left-pad-target is on"),
    ):
        assert expected in message(*options)
    message_of_a_folder = refused(
        "teach", corpus / "pair", "--path", teachers[0], "--output", tmp_path
    )
    assert f"--output is {tmp_path}, a folder; allowed: a file" in message_of_a_folder
    assert "in shards: one file for each" in message(data=f"{corpus / 'pair'}:{corpus / 'pair'}")
    assert "there is no such file" in message(path=tmp_path / "absent.pt")
    assert not (tmp_path / "t").exists()


def test_dictionaries_must_be_the_same(corpus, teachers, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for file in (corpus / "pair").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    lines = (other / "dict.tgt.txt").read_text().splitlines()
    lines[3], lines[4] = lines[4], lines[3]
    (other / "dict.tgt.txt").write_text("\n".join(lines) + "\n")
    words = [line.split()[0] for line in lines]
    message = refused("teach", other, "--path", teachers[0], "--output", tmp_path / "t")
    expected = f"word 7 is {words[4]!r} in one and {words[3]!r} in the other"
    assert expected in message


def test_data_that_a_checkpoint_names_from_elsewhere(corpus, teachers, tmp_path):
    """A path relative to where the training began; from here it is the data itself."""
    ours, theirs = tmp_path / "ours", tmp_path / "theirs"
    for project in (ours, theirs):
        (project / "run").mkdir(parents=True)
        (project / "data-bin").symlink_to(corpus / "pair")
    checkpoint = torch.load(teachers[0], weights_only=False)
    checkpoint["cfg"]["task"]["data"] = "data-bin"
    torch.save(checkpoint, theirs / "run" / "best.pt")

    def teach(name, status=0):
        command_line = "teach", "data-bin", "--path", name, "--output", tmp_path / f"{status}.skd"
        return command("fairseq-skd", *command_line, cwd=ours, status=status)

    not_found = "was trained with data-bin, which was not found: its dictionary is taken to be that"
    assert not_found not in teach(theirs / "run" / "best.pt")
    (theirs / "data-bin").unlink()
    (theirs / "data-bin").mkdir()
    other_order = sorted((corpus / "pair" / "dict.tgt.txt").read_text().splitlines())
    (theirs / "data-bin" / "dict.tgt.txt").write_text("\n".join(other_order) + "\n")
    assert "have different dictionaries: word" in teach(theirs / "run" / "best.pt", status=2)
    (theirs / "run" / "best.pt").rename(tmp_path / "best.pt")
    (tmp_path / "0.skd").unlink()
    assert not_found in teach(tmp_path / "best.pt")


def test_what_may_be_a_mistake_is_said(corpus, teachers, tmp_path):
    elsewhere = torch.load(teachers[0], weights_only=False)
    elsewhere["cfg"]["task"]["data"] = "absent"
    torch.save(elsewhere, tmp_path / "elsewhere.pt")
    path = f"{tmp_path / 'elsewhere.pt'}:{tmp_path / 'elsewhere.pt'}"
    options = ["--path", path, "--output", tmp_path / "t", "--temperature", 0.01]
    printed = " ".join(skd("teach", corpus / "pair", *options).split())
    assert "was trained with absent, which was not found: its dictionary is taken" in printed
    assert "names a model twice: it counts twice" in printed
    assert "less likely than words at random would be (perplexity above 48)" in printed
    usual = skd("teach", corpus / "pair", "--path", teachers[0], "--output", tmp_path / "u")
    for said in ("was not found", "twice", "at random"):
        assert said not in usual


def test_it_is_the_same_teacher_under_another_name_and_damage_is_mended(corpus, teachers, tmp_path):
    named = []
    for number, checkpoint in enumerate(teachers):
        named.append(tmp_path / f"{number}.pt")
        named[-1].symlink_to(checkpoint)
    path = tmp_path / "t"
    teach = ["teach", corpus / "pair", "--output", path, "--top-k", 3, "--path"]
    skd(*teach, ":".join(map(str, teachers)))
    fingerprint = StoredTargets(path).fingerprint
    stored = StoredTargets(path).file
    with path.open("r+b") as file:
        file.seek(stored.sizes.words + int(stored.starts[7]) * stored.words.itemsize)
        file.write(b"\x07\x07\x07")
    assert "The same fairseq-skd teach command mends it" in refused("doctor", path)
    assert "1 of 160 sentences are missing" in skd(*teach, f"{named[1]}:{named[0]}")
    assert StoredTargets(path).file.damaged() == []
    assert StoredTargets(path).fingerprint == fingerprint
    message = refused(*teach, teachers[0])
    assert "it differs in checkpoints. Remove it" in message
    both = ":".join(map(str, teachers))
    assert "it differs in temperature" in refused(*teach, both, "--temperature", 2)


def test_a_training_text_in_parts_is_taught_as_it_is_trained(corpus, teachers, tmp_path):
    """train and train1, as `--trainpref a,b` makes them."""
    data = tmp_path / "data"
    data.mkdir()
    for file in (corpus / "pair").iterdir():
        (data / file.name).write_bytes(file.read_bytes())
        if file.name.startswith("valid"):
            (data / file.name.replace("valid", "train1")).write_bytes(file.read_bytes())
    path = tmp_path / "t"
    once = ["--upsample-primary", 1]  # -1, fairseq's default, fails there
    skd("teach", data, "--path", teachers[0], "--output", path, *once)
    assert len(StoredTargets(path)) == 180
    base = [*MODELS["transformer"], *STORED, path, "--max-update", 2, "--disable-validation", *once]
    assert float(logged(train(data, tmp_path / "run", base=base))[-1]["self_kd_mass"]) > 0


def test_what_is_not_finite_is_not_written(tmp_path):
    writer = TargetsWriter(tmp_path / "t", {"top_k": 3}, TextLayout(np.array([2]), "a text"))
    ids, probabilities = rows(2)
    probabilities[1, 1] = float("nan")
    with pytest.raises(
        WordFileError, match=r"sentence 0 probabilities that are not finite.*--fp16"
    ):
        writer.write(np.array([0]), ids[None], probabilities[None])
    assert writer.missing().tolist() == [0]


@pytest.mark.parametrize("told", [{"checkpoints": ["a.pt"]}, {"checkpoints": 2}, {"mine": [1, 2]}])
def test_a_file_may_tell_anything_of_its_teacher(build, train_step, tmp_path, told):
    task = build(*MODELS["transformer"], *SELF_KD).task
    sentences = [(ids, p) for ids, p in (rows(n, 2) for n in text_layout(task).lengths.tolist())]
    sentences[0][0][0, 1], sentences[0][1][0, 1] = -100, 0  # no word
    write_stored_targets(tmp_path / "t", sentences, told)
    assert "whole" in skd("doctor", tmp_path / "t")
    built = build(*MODELS["transformer"], *STORED, tmp_path / "t", *NOW)
    assert train_step(built, built.samples[0]).log["self_kd_mass"] > 0


def test_commands_look_into_a_student(corpus, taught, tmp_path):
    base = [*MODELS["transformer"], *STORED, taught[0], "--max-epoch", 1]
    train(corpus / "pair", tmp_path, base=base)
    checkpoint = tmp_path / "checkpoint_best.pt"
    assert machine("neighbors", checkpoint, "--words", "t1")["neighbors"]
    found = machine("explain", checkpoint, corpus / "pair", "--text", "train")["positions"]
    assert found[0]["soft_target"]
    assert machine("explain", checkpoint, corpus / "pair", "--candidates", "past")["positions"]


def test_explain_shows_the_teachers_words(corpus, teachers, taught):
    arguments = ["explain", teachers[0], corpus / "pair", "--candidates", "stored", "--teacher"]
    found = machine(*arguments, taught[0], "--sentence", 3)["positions"]  # of the training text
    soft = StoredTargets(taught[0]).read([3], len(found))
    first = [float(row["soft_target"].split(",")[0].split()[1]) for row in found]
    assert first == pytest.approx(soft.weights.max(1).values.tolist(), abs=6e-3)
    other = refused(*arguments, taught[0], "--text", "valid")
    assert "does not hold the words of 'valid'" in other


def test_a_training_resumes_bit_by_bit_and_two_share_a_file(corpus, taught, tmp_path):
    options = ["--save-interval-updates", 1, "--max-update", 8, "--disable-validation"]
    base = [*MODELS["transformer"], *STORED, taught[0], "--max-tokens", 70]
    output = train(corpus / "pair", tmp_path / "whole", *options, base=base)
    assert "start at update 0, ramp of 0 updates" in output
    assert float(logged(output)[0]["self_kd_weight"]) == 0.3
    checkpoint = tmp_path / "whole" / "checkpoint_1_3.pt"
    resumed = [*options, "--restore-file", checkpoint]
    train(corpus / "pair", tmp_path / "resumed", *resumed, base=base)
    last = [tmp_path / name / "checkpoint_last.pt" for name in ("whole", "resumed")]
    assert_equal_weights(*last)
    assert os.listdir(taught[0].parent) == ["teacher.skd"]


def test_workers_equal_one_that_accumulates(corpus, taught, tmp_path):
    """Also in an epoch at whose end one of them has no batch left."""
    taught_by = ["--self-kd-candidates", "stored", "--self-kd-teacher", taught[0]]
    options = ["--dropout", 0, "--max-update", 7, "--disable-validation", *taught_by, *NOW]
    options += ["--max-tokens", 300]
    one = train(corpus / "pair", tmp_path / "one", *options, "--update-freq", 2)
    many = in_processes(2, corpus / "pair", tmp_path / "many", *options)
    last = [tmp_path / name / "checkpoint_last.pt" for name in ("one", "many")]
    assert_equal_weights(*last, tolerance=2e-5)
    for output in (one, many[0]):
        assert float(logged(output)[-1]["self_kd_mass"]) > 0


def test_blocks_of_a_language_model_and_half_precision(corpus, tmp_path):
    """The teacher read blocks of 12 words, the student reads blocks of 10."""
    model = ["--arch", "transformer_lm", *TINY_LM, *SETTINGS]
    command("fairseq-train", corpus / "lm", *LM, *model, "--save-dir", tmp_path / "teacher")
    path = tmp_path / "t"
    checkpoint = tmp_path / "teacher" / "checkpoint_best.pt"
    options = ["--path", checkpoint, "--output", path, "--top-k", 4]
    printed = skd("teach", corpus / "lm", *options, "--tokens-per-sample", 10)
    printed = " ".join(printed.split())
    assert "4 words of every position, 2 of them sampled, the mean of 1 model" in printed
    base = ["--arch", "transformer_lm", *TINY_LM, *STORED, path, "--task", "language_modeling"]
    output = train(
        corpus / "lm",
        tmp_path / "student",
        *("--max-epoch", 1, "--tokens-per-sample", 10, "--memory-efficient-fp16"),
        base=base,
    )
    assert float(logged(output)[-1]["self_kd_mass"]) > 0
    with pytest.raises(AssertionError, match="made for another text, dictionary or length of bl"):
        train(corpus / "lm", tmp_path / "other", "--tokens-per-sample", 12, base=base)
    # Named by its task, as fairseq's own commands are.
    again = tmp_path / "again"
    named = ["--task", "language_modeling", "--tokens-per-sample", 10]
    skd("teach", corpus / "lm", "--path", checkpoint, "--output", again, "--top-k", 4, *named)
    assert StoredTargets(again).fingerprint == StoredTargets(path).fingerprint


def test_a_file_for_every_shard_of_the_data(corpus, taught, tmp_path):
    """Every epoch reads the next part of the text, and the file that belongs to it."""
    data = in_shards(corpus, tmp_path)
    lines = (corpus / "valid.tgt").read_text().splitlines()
    write_stored_targets(tmp_path / "t", [rows(len(line.split()) + 1, 5) for line in lines])
    for files in ((taught[0], tmp_path / "t"), (tmp_path / "t", taught[0])):
        folder = tmp_path / f"run {files[0].name}"
        base = [*MODELS["transformer"], *STORED, ":".join(map(str, files))]
        output = train(data, folder, "--max-epoch", 4, base=base)
        masses = [float(record["self_kd_mass"]) for record in logged(output)]
        assert min(masses) > 0
        assert int(logged(output)[-1]["epoch"]) == 4


def test_with_plain_commands_of_hydra(corpus, taught, tmp_path):
    (tmp_path / "run.yaml").write_text(
        f"""# @package _group_
common: {{cpu: true, user_dir: {PLUGIN}, log_format: json, log_interval: 1}}
task: {{_name: translation, data: {corpus / "pair"}}}
model:
  _name: transformer
  base_layers: 0
  encoder: {{embed_dim: 16, layers: 1, ffn_embed_dim: 16, attention_heads: 2}}
  decoder: {{embed_dim: 16, layers: 1, ffn_embed_dim: 16, attention_heads: 2}}
criterion: {{_name: self_kd, self_kd_candidates: stored, self_kd_teacher: {taught[0]}}}
dataset: {{max_tokens: 200}}
optimization: {{max_update: 2, lr: [0.01]}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: fixed}}
checkpoint: {{save_dir: {tmp_path / "run"}}}
"""
    )
    arguments = ["--config-dir", tmp_path, "--config-name", "run", f"hydra.run.dir={tmp_path}"]
    output = command("fairseq-hydra-train", *arguments, cwd=tmp_path)
    assert "self_kd|cand:stored|teacher:2x5@1#" in output
