"""``fairseq-skd``, as users call it, on tiny models and on made-up logs and translations."""

import csv
import io
import json
import math
import pickle
import re
import shutil
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from PIL import Image
from sacrebleu import BLEU, CHRF

from fairseq_skd import SelfTeacher, automatic_sigma, nearest_neighbors
from fairseq_skd.commands import CommandError, calibration, compare, pictures, teaching, trained
from fairseq_skd.commands.logs import read_log
from fairseq_skd.compatibility import ordinary_words
from fairseq_skd.options import SelfKDOptions
from tests.conftest import PLUGIN, TINY, TINY_LM, command

BASE = ["--cpu", "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200, "--max-epoch", 2]
BASE += ["--required-batch-size-multiple", 1]  # else validation leaves sentences out
LOG = ["--log-format", "json", "--log-interval", 1]


def skd(*arguments, status=0):
    return command("fairseq-skd", *arguments, status=status)


def machine(*arguments):
    """Return what a command prints as JSON."""
    lines = skd(*arguments, "--json").splitlines()
    return json.loads(next(line for line in lines if line.startswith('{"')))


def refused(*arguments):
    """Return the sentence with which a command ends."""
    (line,) = [x for x in skd(*arguments, status=2).splitlines() if x.startswith("fairseq-skd: ")]
    return line


@pytest.fixture(scope="module")
def plain(corpus, tmp_path_factory):
    """A translation model of plain fairseq, with one dictionary for both sides."""
    folder = tmp_path_factory.mktemp("plain")
    output = command(
        *("fairseq-train", corpus / "joined", "--arch", "transformer", *TINY, *BASE, *LOG),
        *("--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1),
        *("--share-all-embeddings", "--save-dir", folder),
    )
    (folder / "train.log").write_text(output)
    return folder


@pytest.fixture(scope="module")
def language_model(corpus, tmp_path_factory):
    """A language model with self-KD of both kinds."""
    folder = tmp_path_factory.mktemp("lm")
    output = command(
        *("fairseq-train", corpus / "lm", "--task", "language_modeling", "--user-dir", PLUGIN),
        *("--arch", "transformer_lm", *TINY_LM, "--tokens-per-sample", 12, *BASE),
        *("--criterion", "self_kd", "--self-kd-candidates", "both", "--self-kd-top-k", 3),
        *("--self-kd-start-update", 2, "--self-kd-ramp-updates", 2, "--self-kd-sigma", 1.5),
        *("--log-format", "simple", "--log-interval", 1, "--save-dir", folder),
    )
    (folder / "train.log").write_text(output)
    return folder


def model_of(folder, data=None):
    loaded = trained.load(folder / "checkpoint_best.pt", data)
    return loaded, loaded.projection.weight.detach()


def test_neighbors_are_those_of_a_teacher(plain, tmp_path):
    picture = tmp_path / "near.png"
    checkpoint = plain / "checkpoint_best.pt"
    options = ["--top-k", 4, "--similarity", "euclidean", "--sigma-scale", 0.7, "--plot", picture]
    rows = machine("neighbors", checkpoint, "--words", "t3,t5", *options)["neighbors"]
    loaded, weight = model_of(plain)
    dictionary = loaded.task.target_dictionary
    eligible = torch.tensor([i for i, w in enumerate(dictionary.symbols) if w.startswith("t")])
    teacher = SelfTeacher("neighbors", 4, "euclidean", sigma_scale=0.7, eligible=eligible)
    teacher.refresh(weight)
    soft = teacher.soft_target(torch.tensor([dictionary.index("t3"), dictionary.index("t5")]))
    assert [row["word"] for row in rows] == ["t3"] * 4 + ["t5"] * 4
    for i, row in enumerate(rows):
        place = i // 4, i % 4 + 1
        assert row["neighbor"] == dictionary[soft.ids[place]]
        assert row["probability"] == pytest.approx(soft.weights[place].item(), rel=1e-4)
        assert row["keeps"] == pytest.approx(soft.weights[i // 4, 0].item(), rel=1e-4)
        ends = weight[dictionary.index(row["word"])], weight[dictionary.index(row["neighbor"])]
        assert row["distance"] == pytest.approx(torch.dist(*ends).item(), rel=1e-4)
    width, height = Image.open(picture).size
    assert min(width, height) > 200


def test_neighbors_of_some_words_of_a_large_table():
    """The sigma of a sample is near that of all, and each neighbour is the same."""
    torch.manual_seed(1)
    weight = torch.randn(5_001, 8)
    eligible = torch.arange(5_000)
    fake = type(
        "Fake", (), {"path": Path("made-up.pt"), "eligible": lambda self: (eligible, "all")}
    )()
    fake.projection = type("Projection", (), {"weight": weight})()
    words = torch.tensor([7, 5_000, 11])
    teacher, title = teaching.teacher_for(fake, SelfKDOptions(candidates="neighbors"), words)
    whole = nearest_neighbors(weight, 10, eligible, "cosine")
    assert teacher.sigma == pytest.approx(automatic_sigma(whole, eligible, 0.5).item(), rel=0.02)
    assert "of 2000 words" in title
    soft = teacher.soft_target(words)
    assert (soft.ids[:, 1:] == whole.ids[words]).all()
    with pytest.raises(ValueError, match="sigma must be a number"):
        SelfTeacher().refresh(weight, words)


def test_random_and_most_confused_words(language_model):
    checkpoint = language_model / "checkpoint_best.pt"
    rows = machine("neighbors", checkpoint, "--random", 5)["neighbors"]
    assert len({row["word"] for row in rows}) == 5
    assert len(rows) == 5 * 3  # the k of its training
    confused = machine("neighbors", checkpoint, "--most-confused", 4)["neighbors"]
    loaded, _ = model_of(language_model)
    wrong = Counter()
    for lprobs, target in loaded.predictions("valid"):
        wrong.update(target[lprobs.argmax(1) != target].tolist())
    words = list(dict.fromkeys(row["word"] for row in confused))
    counts = [wrong[loaded.task.target_dictionary.index(word)] for word in words]
    eligible = ordinary_words(loaded.task.target_dictionary)
    assert counts == sorted((wrong[i] for i in eligible), reverse=True)[:4]


def test_plausibility_by_its_definition(plain, corpus):
    rows = machine("neighbors", plain / "checkpoint_best.pt", "--plausible", "--top-k", 4)
    near, *_, frequent = rows["plausibility"]
    loaded, table = model_of(plain)
    dictionary = loaded.task.target_dictionary
    words = [word for line in (corpus / "train.tgt").open() for word in line.split()]
    common = [dictionary.index(word) for word, _ in Counter(words).most_common(4)]
    eligible = torch.tensor([dictionary.index(word) for word in sorted(set(words))]).sort().values
    nearest = nearest_neighbors(table, 4, eligible).ids
    for row, named in ((near, lambda t: nearest[t].tolist()), (frequent, lambda t: common)):
        elsewhere = on = wrong = among = 0.0
        for lprobs, target in loaded.predictions("valid"):
            for p, t in zip(lprobs.exp().tolist(), target.tolist()):
                first = p.index(max(p))
                elsewhere += 1 - p[t]
                on += sum(p[j] for j in named(t) if j != t)
                wrong += first != t
                among += first != t and first in named(t)
        assert row["of_the_probability_of_other_words"] == pytest.approx(on / elsewhere, rel=1e-4)
        assert row["of_the_wrong_first_choices"] == pytest.approx(among / wrong)
    counts = sorted(Counter(words)[dictionary[i]] for i in common)
    assert frequent["median_count"] == counts[1]


@pytest.mark.parametrize("candidates", ["neighbors", "prediction", "both", "past"])
def test_explain_adds_up(plain, corpus, candidates, tmp_path):
    picture = tmp_path / "sentence.svg"
    arguments = ["explain", plain / "checkpoint_best.pt", corpus / "joined", "--sentence", 2]
    arguments += ["--candidates", candidates, "--weight", 0.4, "--top-k", 3, "--plot", picture]
    rows = machine(*arguments)["positions"]
    sentence = (corpus / "valid.tgt").read_text().splitlines()[2].split()
    assert [row["target"] for row in rows] == [*sentence, "</s>"]
    loaded, _ = model_of(plain)
    dataset = loaded.dataset("valid")
    lprobs, target = loaded.predict(dataset.collater([dataset[2]]))
    for row, p, t in zip(rows, lprobs.exp(), target.tolist()):
        assert row["probability"] == pytest.approx(p[t].item(), rel=1e-4)
        assert row["first_choices"].split()[0] == loaded.task.target_dictionary[p.argmax()]
        assert 0 < row["on_all_words"] < row["trained_on"] <= 1
        if candidates == "past":
            # What the model gives counts as far as it gives it to the target; the rest of that goes
            # to all words alike, as a part of label smoothing does.
            rest, words = 1 - p.topk(3).values.sum().item(), len(p)
            share = 0.4 * p[t].item() * (t in p.topk(3).indices)
            smoothing = 0.1 * words / (words - 1)
            expected = (1 - share) * smoothing + share * rest
            assert row["on_all_words"] == pytest.approx(expected, rel=1e-3)
    assert "position" in picture.read_text()


def test_calibration_of_several_checkpoints(plain, corpus, tmp_path):
    picture = tmp_path / "calibration.png"
    checkpoints = [plain / "checkpoint1.pt", plain / "checkpoint2.pt"]
    found = machine("calibration", *checkpoints, corpus / "joined", "--plot", picture)
    one, two = found["calibration"]
    words = sum(len(line.split()) + 1 for line in (corpus / "valid.tgt").open())
    assert one["words"] == two["words"] == words
    assert [one["checkpoint"], two["checkpoint"]] == ["checkpoint1.pt", "checkpoint2.pt"]
    assert two["nll"] < one["nll"]
    log = read_log(plain / "train.log")
    assert two["nll"] == pytest.approx(log.valid[-1]["nll_loss"] * math.log(2), rel=1e-3)
    assert picture.stat().st_size > 10_000
    printed = skd("calibration", *checkpoints, corpus / "joined", "--csv")
    table = printed[printed.index("checkpoint,") :]
    assert [row["ece"] for row in csv.DictReader(io.StringIO(table))] == [
        str(one["ece"]),
        str(two["ece"]),
    ]


def test_calibration_with_a_temperature(plain, corpus):
    checkpoint = plain / "checkpoint_best.pt"
    arguments = ["calibration", checkpoint, corpus / "joined", "--temperature"]
    (cool,) = machine(*arguments, 0.5)["calibration"]
    (as_it_is,) = machine(*arguments, 1)["calibration"]
    loaded, _ = model_of(plain)
    nll, confidence = [], []
    for lprobs, target in loaded.predictions("valid"):
        p = lprobs.double().exp() ** 2
        p /= p.sum(1, keepdim=True)
        nll += (-p.log()[range(len(target)), target]).tolist()
        confidence += p.max(1).values.tolist()
    assert cool["nll"] == pytest.approx(sum(nll) / len(nll), rel=1e-5)
    assert cool["confidence"] == pytest.approx(sum(confidence) / len(nll), rel=1e-5)
    assert cool["accuracy"] == as_it_is["accuracy"]
    assert cool["confidence"] > 1.05 * as_it_is["confidence"]
    assert (cool["temperature"], as_it_is["temperature"]) == (0.5, 1)


def test_calibration_is_that_of_its_definition():
    # Two bins: choices made with 0.9 are right in 2 of 4 cases, one made with 0.2 is wrong.
    confidence = torch.tensor([0.9, 0.9, 0.9, 0.9, 0.2])
    right = torch.tensor([True, True, False, False, False])
    found = calibration.measure(confidence, right, torch.tensor([1.0, 2, 3, 4, 5]))
    assert found.words == 5
    assert found.accuracy == pytest.approx(0.4)
    assert found.confidence == pytest.approx(0.76)
    assert found.ece == pytest.approx((4 * abs(0.5 - 0.9) + 0.2) / 5)
    assert found.nll == pytest.approx(3)
    assert found.own_nll == pytest.approx(-(4 * math.log(0.9) + math.log(0.2)) / 5)
    assert [count for count, _, _ in found.bins if count] == [1, 4]
    assert found.bins[13] == (4, 0.5, pytest.approx(0.9))
    certain = calibration.measure(torch.ones(3), torch.ones(3).bool(), torch.zeros(3))
    assert (certain.ece, certain.accuracy) == (0, 1)


def test_curves_of_both_formats(plain, language_model, tmp_path):
    picture = tmp_path / "curves.png"
    both = machine("curves", plain, language_model / "train.log", "--plot", picture)["runs"]
    first, second = both
    records = [
        json.loads(line.split(" | ", 3)[3])
        for line in (plain / "train.log").read_text().splitlines()
        if " | valid | {" in line
    ]
    assert first["best_perplexity"] == min(float(record["valid_ppl"]) for record in records)
    assert first["alpha"] is None
    assert second["alpha"] == 0.5  # the default weight, at the end of the ramp
    assert 0 < second["mass"] <= 0.5
    assert second["loss"] == read_log(language_model / "train.log").train[-1]["loss"]
    assert second["updates"] > 4
    assert picture.stat().st_size > 10_000
    by_time = machine("curves", plain, "--by", "time")["runs"]
    assert by_time == [{**first, "run": by_time[0]["run"]}]


def test_a_log_with_an_interruption(tmp_path):
    log = tmp_path / "train.log"
    line = "2026-01-01 00:00:00 | INFO | train_inner | epoch 001:  {n} / 9 loss={loss}, "
    line += "num_updates={n}, train_wall={wall}, wall=99\n"
    lines = [(100, 5, 20), (200, 4, 30), (200, 3, 40), (300, 2, 10)]
    log.write_text("".join(line.format(n=n, loss=x, wall=w) for n, x, w in lines))
    found = read_log(log)
    assert [fields["loss"] for fields in found.train] == [5, 3, 2]
    assert found.seconds_an_update() == pytest.approx(0.2)


GENERATED = """S-{i}\t{source}
T-{i}\t{reference}
H-{i}\t-0.5\t{hypothesis}
D-{i}\t-0.5\t{hypothesis}
P-{i}\t-0.1 -0.2
"""


def outputs(folder, seeds):
    """Make outputs of fairseq-generate of two systems, of which the second is better."""
    draw = torch.Generator().manual_seed(3)
    words = [f"w{i}" for i in range(30)]

    def sentence(length):
        return [words[i] for i in torch.randint(30, (length,), generator=draw).tolist()]

    references = [sentence(6 + i % 5) for i in range(60)]
    files = {}
    for system, wrong in (("one", 2), ("two", 1)):
        for seed in range(seeds):
            path = folder / f"{system}{seed}.out"
            blocks = []
            for i, reference in enumerate(references):
                hypothesis = list(reference)
                for j in torch.randint(len(reference), (wrong,), generator=draw).tolist():
                    hypothesis[j] = "x"
                fields = {"source": f"source {i}", "reference": " ".join(reference)}
                blocks.append(GENERATED.format(i=i, hypothesis=" ".join(hypothesis), **fields))
            path.write_text("INFO | something\n" + "".join(reversed(blocks)) + "Generate test\n")
            files.setdefault(system, []).append(path)
    return files, [" ".join(reference) for reference in references]


def test_compare_with_several_seeds(tmp_path):
    files, references = outputs(tmp_path, 3)
    arms = [f"{name}={','.join(map(str, paths))}" for name, paths in files.items()]
    found = machine("compare", *arms, "--changed", 1)
    hypotheses, same, _ = compare.read_generated(files["two"][1].read_text().split("\n"))
    assert same == references
    (row,) = [r for r in found["scores"] if (r["system"], r["seed"]) == ("two", 2)]
    assert row["BLEU"] == pytest.approx(BLEU().corpus_score(hypotheses, [references]).score)
    assert row["chrF2"] == pytest.approx(CHRF().corpus_score(hypotheses, [references]).score)
    assert row["length_ratio"] == pytest.approx(1)
    assert all(row["p_bootstrap"] < 0.01 for row in found["differences"])
    assert all(row["p_randomisation"] < 0.01 for row in found["differences"])
    (over,) = [r for r in found["over_seeds"] if (r["system"], r["metric"]) == ("two", "BLEU")]
    scores = {
        name: [r["BLEU"] for r in found["scores"] if r["system"] == name] for name in ("one", "two")
    }
    differences = [b - a for a, b in zip(scores["one"], scores["two"])]
    assert over["difference"] == pytest.approx(sum(differences) / 3)
    assert over["from"] < over["difference"] < over["to"]
    # Student's t with two degrees of freedom.
    half = 4.302653 * torch.tensor(differences, dtype=torch.float64).std().item() / 3**0.5
    assert over["to"] - over["difference"] == pytest.approx(half, rel=1e-5)
    gained = [row for row in found["changed"] if row["chrF"] > 0]
    assert [row["of"] for row in gained] == ["source", "reference", "one", "two"]
    assert gained[0]["text"] == f"source {gained[0]['sentence']}"
    printed = skd("compare", *arms)
    assert "nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:" in printed
    for paths in files.values():
        paths[0].write_text(paths[0].read_text().replace("\tw7 ", "\t<<unk>> "))
    printed = skd("compare", *(paths[0] for paths in files.values()))
    assert re.search(r"\d+ of the references hold <<unk>>", printed)


def test_compare_plain_hypotheses(tmp_path):
    files, references = outputs(tmp_path, 1)
    (tmp_path / "reference").write_text("\n".join(references) + "\n")
    plain_files = []
    for name, (path,) in files.items():
        hypotheses, _, _ = compare.read_generated(path.read_text().split("\n"))
        (tmp_path / name).write_text("\n".join(hypotheses).upper() + "\n")
        plain_files.append(tmp_path / name)
    arguments = ["compare", *plain_files, "--reference", tmp_path / "reference", "--lowercase"]
    found = machine(*arguments)
    generated = machine("compare", *(path for (path,) in files.values()))
    assert [row["BLEU"] for row in found["scores"]] == pytest.approx(
        [row["BLEU"] for row in generated["scores"]]
    )
    assert "over_seeds" not in found
    assert "seed" not in found["scores"][0]


def test_doctor_checks_the_loss():
    found = machine("doctor")
    versions = {row["what"]: row["found"] for row in found["versions"]}
    assert versions["torch"] == torch.__version__
    assert {row["check"] for row in found["loss"]} == {"as the reference"}
    assert {row["type"] for row in found["loss"]} == {"float32", "bfloat16", "float16"}


class Evil:
    def __reduce__(self):
        return (exec, ("open('owned', 'w')",))


def test_what_is_refused(plain, corpus, tmp_path):
    """One sentence and exit status 2, for everything that a user can mend."""
    checkpoint, data = plain / "checkpoint_best.pt", corpus / "joined"
    evil = tmp_path / "evil.pt"
    torch.save({"model": {"w": torch.zeros(1)}, "args": Evil()}, evil)
    (tmp_path / "evil.pkl").write_bytes(pickle.dumps(Evil()))
    (tmp_path / "none.log").write_text("nothing\n")
    (tmp_path / "short").write_text("one\n")
    (tmp_path / "empty").write_text("")
    torch.save({"model": 3}, tmp_path / "three.pt")
    other = shutil.copytree(data, tmp_path / "other")
    for side in ("src", "tgt"):
        lines = (data / f"dict.{side}.txt").read_text().splitlines()
        (other / f"dict.{side}.txt").write_text("\n".join(lines[:-9]) + "\n")
    words = ["--words", "t1"]
    for arguments, message in [
        (["neighbors", tmp_path / "none.pt", *words], "none.pt: there is no such file"),
        (["neighbors", evil, *words], "evil.pt cannot be read as a checkpoint: "),
        (["explain", tmp_path / "evil.pkl", data], "evil.pkl cannot be read as a checkpoint: "),
        (["calibration", tmp_path / "three.pt", data], "is no fairseq checkpoint: it holds no"),
        (["average", evil, "--output", tmp_path / "m.pt"], "evil.pt cannot be read as a check"),
        (["average", checkpoint, "--output", tmp_path], f"--output is {tmp_path}, a folder"),
        (["average", checkpoint, "--output", "."], "--output is ., a folder"),
        (["average", evil, "--output", tmp_path / "no" / "m.pt"], "and there is no folder"),
        (["neighbors", checkpoint, "--words", "t1,house,boat"], "house, boat not in the dicti"),
        (["neighbors", checkpoint], "give one of --words, --random, --most-confused and"),
        (["neighbors", checkpoint, *words, "--data", tmp_path], "holds no dictionary"),
        (["neighbors", checkpoint, *words, "--data", other], "has another size than the words of"),
        (["neighbors", checkpoint, *words, "--top-k", 99], "--top-k is 99; allowed: 1 to 39"),
        (["neighbors", checkpoint, *words, "--similarity", "near"], "--similarity is near; all"),
        (["neighbors", checkpoint, *words, "--sigma", "wide"], "--sigma is 'wide'; allowed: 'a"),
        (["neighbors", checkpoint, *words, "--plot", "a.gif"], "--plot is a.gif; allowed: a fi"),
        (["neighbors", checkpoint, *words, "--plot", "no/a.png"], "there is no folder no"),
        (["neighbors", checkpoint, *words, "--json", "--csv"], "--json and --csv were given"),
        (["explain", checkpoint, data, "--sentence", 20], "--sentence is 20; allowed: 0 to 19 in"),
        (["explain", checkpoint, data, "--text", "other"], "has no text 'other'"),
        (["calibration", checkpoint, data, "--temperature", 0], "is 0.0; allowed: a positive n"),
        (["explain", checkpoint, data, "--weight", 2], "--weight is 2.0; allowed: a number from"),
        (["curves", tmp_path / "none.log"], "none.log holds no line of a training"),
        (["curves", tmp_path / "gone.log"], "gone.log: there is no such file"),
        (["curves", plain, "--by", "hour"], "--by is hour; allowed: updates, time"),
        (["compare", tmp_path / "short"], "short holds no references"),
        (["compare", tmp_path / "empty"], "empty is empty"),
        (["compare", "a=x,y", "b=x"], "b has 1 files and a 2; allowed: as many"),
        (["compare", "a=x", "a=y"], "two systems are called a"),
    ]:
        assert message in refused(*arguments), arguments
    reference = ["--reference", tmp_path / "short"]
    files, _ = outputs(tmp_path, 1)
    assert "has 60 translations, and" in refused("compare", files["one"][0], *reference)
    assert not (tmp_path / "owned").exists()


def test_words_of_pieces_are_readable():
    from fairseq.data import Dictionary

    pieces, bpe = Dictionary(), Dictionary()
    for word in ("\u2581house", "s", "\u2581"):
        pieces.add_symbol(word)
    for word in ("hou@@", "se"):
        bpe.add_symbol(word)
    show = trained.readable(pieces)
    assert [show(i) for i in (2, 4, 5, 6)] == ["</s>", "house", "\u2026s", "\u2423"]
    show = trained.readable(bpe)
    assert [show(i) for i in (4, 5)] == ["hou\u2026", "se"]
    assert trained.word_ids(pieces, ["house", "s"]).tolist() == [4, 5]
    assert trained.word_ids(bpe, ["hou", "hou\u2026"]).tolist() == [4, 4]
    pieces.add_symbol("house")
    assert trained.word_ids(pieces, ["house", "\u2026house", "\u2026s"]).tolist() == [4, 7, 5]


def test_pictures_need_matplotlib(monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(CommandError, match=r"pip install matplotlib"):
        pictures.pyplot()


def test_training_imports_no_command():
    code = "import sys, fairseq_skd; print([m for m in sys.modules if 'skd.commands' in m])"
    done = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, text=True)
    assert done.stdout.strip().endswith("[]")
