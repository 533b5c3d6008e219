"""What the model gave to a sentence when it last saw it: the file, and the criterion."""

import json
import math
import os
import platform
import subprocess
import sys

import numpy as np
import pytest
import torch
from fairseq.data import LanguagePairDataset

from fairseq_skd import compatibility
from fairseq_skd.compatibility import text_layout
from fairseq_skd.loss import TopWords
from fairseq_skd.past import PastError, PastPredictions
from fairseq_skd.word_file import TextLayout, WordFileError
from tests.conftest import TINY, TINY_LM
from tests.test_criterion import LANGUAGE_MODELS, MODELS, NOW, assert_same_gradients

LAYOUT = TextLayout(np.array([3, 1, 4, 0, 2]), "a text")
PAST = ["--criterion", "self_kd", "--label-smoothing", 0.1, "--self-kd-top-k", 4]
PAST += ["--self-kd-candidates", "past", "--self-kd-weight", 0.3]


def words(count, k, seed):
    generator = torch.Generator().manual_seed(seed)
    lprobs = torch.rand(count, 2 * k, generator=generator).log_softmax(1).topk(k, 1).values
    return TopWords(torch.randint(1000, (count, k), generator=generator), lprobs)


def test_what_is_written_is_read(tmp_path):
    past = PastPredictions(tmp_path / "past", LAYOUT, 2)
    sentences = np.array([2, 0])
    assert not past.read(sentences, 4, 99).share.any()
    top = words(8, 2, seed=1)
    past.write(sentences, 4, top, num_updates=7)
    for other in (past, PastPredictions(tmp_path / "past", LAYOUT, 2, num_updates=8)):
        soft = other.read(sentences, 4, 99)
        assert soft.share.tolist() == [1, 1, 1, 1, 1, 1, 1, 0]  # the second one is shorter
        assert soft.ids[:7].equal(top.ids[:7])
        assert torch.allclose(soft.weights[:7], top.lprobs[:7].exp(), rtol=1e-3)
        assert not soft.weights[7].any()
        soft = other.read(np.array([0, 4, 1]), 3, 99)  # in another order, with others
        assert soft.share.tolist() == [1, 1, 1, 0, 0, 0, 0, 0, 0]
        assert soft.ids[:3].equal(top.ids[4:7])
        # A record of the update itself, which is computed a second time after an overflow.
        assert not other.read(sentences, 4, 7).share.any()
        assert other.read(sentences, 4, 8).share.any()
    past.write(np.array([1]), 1, words(1, 2, seed=2), num_updates=9)
    assert past.read(sentences, 4, 99).ids[:7].equal(top.ids[:7])  # neighbours in the file stay


def test_a_file_of_another_text_dictionary_or_k_is_made_anew(tmp_path):
    def seen(layout, k, num_updates=1):
        lines = []
        past = PastPredictions(tmp_path / "past", layout, k, num_updates, say=lines.append)
        found = past.read(np.array([0]), int(layout.lengths[0]), 9).share.any().item()
        past.write(np.array([0]), int(layout.lengths[0]), words(int(layout.lengths[0]), k, 1), 0)
        return found, " ".join(lines)

    assert not seen(LAYOUT, 2)[0]
    assert seen(LAYOUT, 2)[0]
    for layout, k in (
        (LAYOUT._replace(fingerprint="another"), 2),
        (LAYOUT._replace(fingerprint="another"), 3),
        (LAYOUT._replace(lengths=np.array([3, 2])), 3),
    ):
        found, said = seen(layout, k)
        assert not found
        assert "belongs to another text, dictionary, k or prefix" in said
        assert seen(layout, k)[0]


def test_what_was_seen_later_than_the_run_goes_on_from_is_dropped(tmp_path):
    past = PastPredictions(tmp_path / "past", LAYOUT, 2)
    past.write(np.array([0]), 3, words(3, 2, 1), num_updates=4)
    past.write(np.array([2]), 4, words(4, 2, 1), num_updates=5)
    lines = []
    past = PastPredictions(tmp_path / "past", LAYOUT, 2, 5, say=lines.append)
    assert past.read(np.array([0]), 3, 9).share.all()
    assert not past.read(np.array([2]), 4, 9).share.any()
    assert "1 of 5 sentences in it were seen after update 5" in lines[-1]


def test_a_kill_while_a_record_is_written_costs_that_record_alone(tmp_path, monkeypatch):
    past = PastPredictions(tmp_path / "past", LAYOUT, 2)
    for sentence, width in ((0, 3), (2, 4)):
        past.write(np.array([sentence]), width, words(width, 2, 1), num_updates=1)

    class Killed(BaseException):
        pass

    class DyingArray(np.ndarray):
        def __setitem__(self, key, value):
            raise Killed

    past.file.words = past.file.words.view(DyingArray)
    with pytest.raises(Killed):
        past.write(np.array([2]), 4, words(4, 2, 3), num_updates=2)
    again = PastPredictions(tmp_path / "past", LAYOUT, 2, num_updates=9)
    assert again.read(np.array([0]), 3, 9).share.all()
    assert not again.read(np.array([2]), 4, 9).share.any()


def test_what_cannot_be_is_refused(tmp_path, monkeypatch):
    (tmp_path / "letter").write_text("Dear reader")
    with pytest.raises(PastError, match="letter is no file of words and probabilities"):
        PastPredictions(tmp_path / "letter", LAYOUT, 2)
    assert (tmp_path / "letter").read_text() == "Dear reader"
    (tmp_path / "json").write_text(json.dumps({"format": "mine"}))
    with pytest.raises(PastError, match="json is no file of words and probabilities"):
        PastPredictions(tmp_path / "json", LAYOUT, 2)
    (tmp_path / "former").write_text(json.dumps({"format": "fairseq_skd past 1"}).ljust(4096))
    with pytest.raises(PastError, match=r"former was written by version 0\.1 .* Remove it"):
        PastPredictions(tmp_path / "former", LAYOUT, 2)
    with pytest.raises(PastError, match=r"needs 6\d*\.\d\d GB .* k = 2\).* GB free"):
        PastPredictions(tmp_path / "large", LAYOUT._replace(lengths=np.array([5 * 10**12])), 2)
    assert not (tmp_path / "large").exists()
    (tmp_path / "file").write_text("")
    with pytest.raises(PastError, match="--self-kd-past-file takes another place"):
        PastPredictions(tmp_path / "file" / "past", LAYOUT, 2)
    past = PastPredictions(tmp_path / "past", LAYOUT, 2)
    with pytest.raises(WordFileError, match="has 3 positions a sentence, and its longest one 4"):
        past.read(np.array([2]), 3, 9)
    with pytest.raises(WordFileError, match=r"sentence 5 is not in .*, which has 5"):
        past.read(np.array([5]), 3, 9)


IN_USE = """
import sys
from pathlib import Path

import numpy as np

from fairseq_skd.past import PastError, PastPredictions
from fairseq_skd.word_file import TextLayout

layout = TextLayout(np.array([3, 1, 4, 0, 2]), sys.argv[2])
try:
    for _ in range(2):  # of two in one process the first one is closed
        past = PastPredictions(Path(sys.argv[1]), layout, 2, guards=sys.argv[3] == "True")
except PastError as error:
    sys.exit(str(error))
print(flush=True)
sys.stdin.read()  # as long as the test wants
"""


def test_two_trainings_cannot_have_one_file(tmp_path):
    path, text = tmp_path / "past", LAYOUT.fingerprint
    command = [sys.executable, "-c", IN_USE, str(path)]

    def opened(text, guards):
        return subprocess.run([*command, text, guards], capture_output=True, text=True, input="")

    pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True}
    with subprocess.Popen([*command, text, "True"], **pipes) as training:
        training.stdout.readline()
        recorded = PastPredictions(path, LAYOUT, 2, num_updates=9, guards=False)
        recorded.write(np.array([0]), 3, words(3, 2, 1), num_updates=8)
        content = path.read_bytes()
        for other_text in (text, "another text"):
            refused = opened(other_text, "True")
            assert refused.returncode == 1
            assert f"{path} is used by another training now" in refused.stderr
            assert path.read_bytes() == content
        # Another process of the same training, and one of another that is before its first one.
        assert opened(text, "False").returncode == 0
        other = opened("another text", "False")
        assert other.returncode == 1
        assert f"{path} is not what the first process of this run has made" in other.stderr
        assert path.read_bytes() == content
        assert opened(text, "True").returncode == 1
        training.kill()
    assert opened(text, "True").returncode == 0  # what was killed holds nothing


FIRST_ALONE = """
import sys

import torch

from fairseq_skd.compatibility import first_alone

place, rank = sys.argv[1], int(sys.argv[2])
torch.distributed.init_process_group("gloo", init_method=f"file://{place}", rank=rank, world_size=2)
said = []

def fails():
    said.append("called")
    raise ValueError("in use")

for first in (0, 1):
    with open(f"{place}.order", "a") as order:
        first_alone(rank == first, lambda: print(rank, file=order, flush=True))
    torch.distributed.barrier()
try:
    first_alone(rank == 1, fails)
except (RuntimeError, ValueError) as error:
    said.append(f"{type(error).__name__}: {error}")
print(*said)
"""


def test_the_first_process_makes_the_file_before_the_others_open_it(tmp_path):
    command = [sys.executable, "-c", FIRST_ALONE, str(tmp_path / "meet")]
    pipes = {"stdout": subprocess.PIPE, "text": True}
    workers = [subprocess.Popen([*command, str(rank)], **pipes) for rank in (0, 1)]
    said = [worker.communicate(timeout=100)[0].strip() for worker in workers]
    assert (tmp_path / "meet.order").read_text().split() == ["0", "1", "1", "0"]
    assert said == ["RuntimeError: in use", "called ValueError: in use"]


def test_the_file_takes_six_bytes_a_word(tmp_path):
    lengths = np.full(1000, 20)
    PastPredictions(tmp_path / "past", TextLayout(lengths, "x"), 8)
    words, sentences = 6 * 8 * 20_000, 8 * 1001 + 4 * 1000
    assert os.path.getsize(tmp_path / "past") == 2**16 + words + sentences


def by_definition(built, sample, before, weight, k=4, epsilon=0.1, prefix=0):
    """A second writing: word by word in float64; ``before`` are all log-probabilities of then."""
    output = built.model(**sample["net_input"])
    lprobs = built.model.get_normalized_probs(output, log_probs=True)[:, prefix:].double()
    target = built.model.get_targets(sample, output)[:, prefix:]
    loss = kd = mass = 0.0
    rows = zip(lprobs.flatten(0, 1), before[:, prefix:].flatten(0, 1), target.flatten().tolist())
    for row, then, t in rows:
        if t == built.task.target_dictionary.pad():
            continue
        p = then.double().exp()
        best = p.topk(k).indices.tolist()
        q = torch.full_like(row, (1 - sum(p[j].item() for j in best)) / len(row))
        for j in best:
            q[j] += p[j].item()
        off = epsilon / (len(row) - 1)
        smoothed = -(1 - epsilon) * row[t] - off * (row.sum() - row[t])
        distilled = -(q * row).sum()
        # As far as the past gave probability to the true word, if that is one of the k.
        trust = p[t].item() if t in best else 0.0
        share = weight * trust
        loss = loss + (1 - share) * smoothed + share * distilled
        kd, mass = kd + trust * distilled.item(), mass + trust * (1 - q[t].item())
    built.model.zero_grad(set_to_none=True)
    loss.backward()
    gradients = {n: p.grad for n, p in built.model.named_parameters() if p.grad is not None}
    return loss.item(), kd, mass, gradients


@pytest.mark.parametrize(
    ("model", "lm", "prefix"),
    [
        (MODELS["transformer"], False, 0),
        (MODELS["transformer"], False, 2),
        (MODELS["lstm"], False, 0),
        (LANGUAGE_MODELS["transformer_lm"], True, 0),
    ],
)
def test_the_second_time_it_learns_from_the_first(build, train_step, tmp_path, model, lm, prefix):
    built = build(
        *(*model, *PAST, *NOW, "--self-kd-past-file", tmp_path / "past"),
        *("--ignore-prefix-size", prefix),
        lm=lm,
    )
    with torch.no_grad():
        befores = []
        for sample in built.samples:
            output = built.model(**sample["net_input"])
            befores.append(built.model.get_normalized_probs(output, log_probs=True))
    for sample in built.samples:
        first = train_step(built, sample)
        assert first.log["self_kd_mass"] == first.log["self_kd_loss"] == 0
    with torch.no_grad():
        for parameter in built.model.parameters():
            parameter += 0.1 * torch.randn_like(parameter)
    for sample, before in zip(reversed(built.samples), reversed(befores)):
        loss, kd, mass, gradients = by_definition(built, sample, before, 0.3, prefix=prefix)
        ours = train_step(built, sample, 1)
        # Probabilities are kept as float16.
        assert ours.loss.item() == pytest.approx(loss, rel=2e-4)
        # The trust is one of them, too.
        assert ours.log["self_kd_loss"].item() == pytest.approx(kd, rel=1e-3)
        assert ours.log["self_kd_mass"].item() == pytest.approx(mass, rel=1e-3)
        assert_same_gradients(ours.gradients, gradients, rel=2e-3)


def test_before_a_sentence_was_seen_it_is_label_smoothing(build, train_step, tmp_path):
    built = build(*MODELS["transformer"], *PAST, *NOW, "--self-kd-past-file", tmp_path / "past")
    plain = build(
        *(*MODELS["transformer"], "--criterion", "label_smoothed_cross_entropy"),
        *("--label-smoothing", 0.1),
    )
    one, other = built.samples[:2]
    train_step(built, one)
    ours, theirs = train_step(built, other, 1), train_step(plain, other)
    assert ours.loss.item() == pytest.approx(theirs.loss.item(), rel=1e-6)
    assert_same_gradients(ours.gradients, theirs.gradients)


def test_it_is_recorded_before_distillation_begins(build, train_step, tmp_path):
    built = build(
        *(*MODELS["transformer"], *PAST, "--self-kd-past-file", tmp_path / "past"),
        *("--self-kd-start-update", 5, "--self-kd-ramp-updates", 0),
    )
    sample = built.samples[0]
    assert "self_kd_loss" not in train_step(built, sample, 4).log
    assert train_step(built, sample, 5).log["self_kd_mass"] > 0


def test_a_dummy_batch_neither_learns_from_it_nor_is_recorded(build, train_step, tmp_path):
    built = build(*MODELS["transformer"], *PAST, *NOW, "--self-kd-past-file", tmp_path / "past")
    sample = built.samples[0]
    built.model.train()
    built.criterion.begin_update(0, [{}])
    dummy, _, _ = built.criterion(built.model, sample)
    assert train_step(built, sample, 1).log["self_kd_mass"] == 0  # not seen yet
    assert math.isfinite(dummy.item())
    built.criterion.begin_update(2, [{}])
    _, _, log = built.criterion(built.model, sample)
    # The logs of all workers are added up: each must have the same entries.
    assert log.keys() == train_step(built, sample, 2).log.keys()


def test_validation_is_not_recorded(build, tmp_path):
    built = build(*MODELS["transformer"], *PAST, *NOW, "--self-kd-past-file", tmp_path / "past")
    built.task.valid_step(built.samples[0], built.model, built.criterion.eval())
    assert not (tmp_path / "past").exists()


def test_the_fingerprint_is_of_the_text_and_the_dictionary(build):
    layout = text_layout(build(*MODELS["transformer"]).task)
    again = text_layout(build(*MODELS["transformer"]).task)
    joined = text_layout(build(*MODELS["transformer"], data="joined").task)
    assert layout.fingerprint == again.fingerprint != joined.fingerprint
    assert (layout.lengths == joined.lengths).all()
    assert isinstance(build(*MODELS["transformer"]).task.dataset("train"), LanguagePairDataset)


@pytest.mark.parametrize(
    ("options", "lm", "reason"),
    [
        (["--arch", "transformer", *TINY, "--left-pad-target"], False, "left-pad-target is on"),
        (
            ["--arch", "transformer_lm", *TINY_LM, "--add-bos-token"],
            True,
            "add-bos-token is on",
        ),
    ],
)
def test_text_without_places_of_its_own(build, train_step, tmp_path, options, lm, reason):
    built = build(*options, *PAST, *NOW, "--self-kd-past-file", tmp_path / "past", lm=lm)
    with pytest.raises((ValueError, PastError), match=reason):
        train_step(built, built.samples[0])


@pytest.mark.parametrize("mode", ["none", "complete"])
def test_blocks_of_a_language_model(build, train_step, tmp_path, mode):
    built = build(
        *(*LANGUAGE_MODELS["transformer_lm"], *PAST, *NOW, "--sample-break-mode", mode),
        *("--self-kd-past-file", tmp_path / "past"),
        lm=True,
    )
    for epoch in (0, 1):
        for sample in built.samples:
            assert (train_step(built, sample, epoch).log["self_kd_mass"] > 0) == bool(epoch)


def test_what_is_not_finite_is_not_recorded(tmp_path):
    past = PastPredictions(tmp_path / "past", LAYOUT, 2)
    top = words(8, 2, seed=1)
    top.lprobs[1] = float("nan")
    top.lprobs[7] = float("nan")  # at padding
    past.write(np.array([2, 0]), 4, top, num_updates=1)
    assert past.read(np.array([2, 0]), 4, 9).share.tolist() == [0, 0, 0, 0, 1, 1, 1, 0]


class FailingModel:
    """A model whose forward pass needs more memory than there is."""

    def __init__(self, module):
        self.module = module
        self.training = True

    def __call__(self, **net_input):
        raise RuntimeError("out of memory")


def test_a_batch_that_runs_out_of_memory_takes_its_sentences_along(build, train_step, tmp_path):
    built = build(*MODELS["transformer"], *PAST, *NOW, "--self-kd-past-file", tmp_path / "past")
    lost, other = built.samples[:2]
    built.model.train()
    built.criterion.begin_update(0, [lost, other])
    with pytest.raises(RuntimeError, match="out of memory"):
        built.criterion(FailingModel(built.model), lost)
    built.criterion(built.model, other)
    assert train_step(built, lost, 1).log["self_kd_mass"] == 0
    assert train_step(built, other, 1).log["self_kd_mass"] > 0


def test_several_machines_have_a_file_each(monkeypatch):
    assert compatibility.machine() == ("", True)
    distributed = torch.distributed
    monkeypatch.setattr(distributed, "is_initialized", lambda: True)
    monkeypatch.setattr(distributed, "get_world_size", lambda: 2)
    here = platform.node()
    for first, second, rank, expected in (
        (here, "elsewhere", 0, (here, True)),
        ("elsewhere", here, 1, (here, True)),
        (here, here, 0, ("", True)),
        (here, here, 1, ("", False)),
    ):

        def gather(names, own, of_all=(first, second), rank=rank):
            assert own == of_all[rank]
            names[:] = of_all

        monkeypatch.setattr(distributed, "all_gather_object", gather)
        monkeypatch.setattr(distributed, "get_rank", lambda rank=rank: rank)
        assert compatibility.machine() == expected


@pytest.mark.parametrize("name", ["past", "past.bin"])
def test_each_machine_has_a_file_of_its_own(build, train_step, tmp_path, monkeypatch, name):
    machine = compatibility.Machine("host", True)
    monkeypatch.setattr(compatibility, "machine", lambda: machine)
    built = build(*MODELS["transformer"], *PAST, *NOW, "--self-kd-past-file", tmp_path / name)
    train_step(built, built.samples[0])
    assert {file.name for file in tmp_path.iterdir()} == {
        *(name.replace("past", "past.host"), name.replace("past", "past.host") + ".lock"),
    }
