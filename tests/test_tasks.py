"""fairseq's trainer with tasks of more than one language: schedule, tables and dictionaries."""

import pytest
import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.trainer import Trainer

from fairseq_skd import soft_targets
from fairseq_skd.compatibility import ordinary_words
from tests.conftest import PLUGIN, TINY, preprocess, sentences

SELF_KD = ["--criterion", "self_kd", "--self-kd-top-k", "4", "--label-smoothing", "0.1"]
SELF_KD += ["--self-kd-candidates", "neighbors"]
SHARED = ["--share-encoders", "--share-decoders"]


@pytest.fixture(scope="module")
def languages(tmp_path_factory):
    """German and French to English: `joined` has one dictionary, `apart` one a language."""
    folder = tmp_path_factory.mktemp("languages")
    for pair, words, count in (("de-en", "d", 120), ("fr-en", "f", 90)):
        for part, size, seed in (("train", count, 1), ("valid", 12, 2)):
            source, target = zip(*sentences(size, seed + count))
            lines = "\n".join(source).replace("s", words) + "\n"
            (folder / f"{part}.{pair}.{pair[:2]}").write_text(lines)
            (folder / f"{part}.{pair}.en").write_text("\n".join(target) + "\n")
    for language in ("de", "fr"):
        text = (folder / f"train.{language}-en.{language}").read_text()
        dictionary = Dictionary()
        for word in text.split() + [f"rare{i}" for i in range(9 if language == "de" else 2)]:
            dictionary.add_symbol(word)
        dictionary.finalize(padding_factor=1)
        dictionary.save(str(folder / f"{language}.txt"))
    english = Dictionary()
    for pair in ("de-en", "fr-en"):
        for word in (folder / f"train.{pair}.en").read_text().split():
            english.add_symbol(word)
    english.finalize(padding_factor=1)
    english.save(str(folder / "en.txt"))
    joined = Dictionary()
    for language in ("de", "fr", "en"):
        joined.update(Dictionary.load(str(folder / f"{language}.txt")))
    joined.finalize(padding_factor=8)
    joined.save(str(folder / "joined.txt"))
    for pair in ("de-en", "fr-en"):
        source = pair[:2]
        common = ["--source-lang", source, "--target-lang", "en"]
        common += ["--trainpref", folder / f"train.{pair}", "--validpref", folder / f"valid.{pair}"]
        dictionaries = ["--srcdict", folder / "joined.txt", "--tgtdict", folder / "joined.txt"]
        preprocess(*common, *dictionaries, "--destdir", folder / "joined")
        dictionaries = ["--srcdict", folder / f"{source}.txt", "--tgtdict", folder / "en.txt"]
        preprocess(*common, *dictionaries, "--destdir", folder / "apart")
    return folder


@pytest.fixture
def training(languages, tmp_path):
    """Make a trainer and its batches as fairseq-train does."""

    def make(data, *arguments):
        base = [str(languages / data), "--user-dir", str(PLUGIN), "--cpu", "--optimizer", "adam"]
        base += ["--lr", "0.01", "--max-tokens", "200", "--save-dir", str(tmp_path), *TINY]
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, [*base, *map(str, arguments)])
        config = convert_namespace_to_omegaconf(args)
        torch.manual_seed(1)
        task = tasks.setup_task(config.task)
        model, criterion = task.build_model(config.model), task.build_criterion(config.criterion)
        trainer = Trainer(config, task, model, criterion)
        task.load_dataset("train")
        batches = task.get_batch_iterator(task.dataset("train"), max_tokens=200, seed=1)
        return trainer, list(batches.next_epoch_itr(shuffle=False))

    return make


@pytest.fixture
def measured(monkeypatch):
    """The sizes of all tables whose neighbours have been measured."""
    found = []
    original = soft_targets.nearest_neighbors

    def counting(embedding, *arguments, **named):
        found.append(len(embedding))
        return original(embedding, *arguments, **named)

    monkeypatch.setattr(soft_targets, "nearest_neighbors", counting)
    return found


def multilingual(*more):
    return ["--task", "multilingual_translation", "--lang-pairs", "de-en,fr-en", *more, *SELF_KD]


def shares(trainer, batches, updates):
    """Train, and return alpha of every update."""
    found = []
    for n in range(updates):
        log = trainer.train_step([batches[n % len(batches)]])
        total = {key: float(value) for key, value in log.items()}
        found.append(total["self_kd_weight"])
    return found


def test_the_schedule_follows_the_trainer_in_a_task_that_never_tells_the_model(
    training, measured, tmp_path
):
    schedule = ["--self-kd-weight", 0.4, "--self-kd-start-update", 2, "--self-kd-ramp-updates", 4]
    arguments = multilingual("--arch", "multilingual_transformer", *SHARED, *schedule)
    trainer, batches = training("joined", *arguments, "--self-kd-refresh-interval", 3)
    assert shares(trainer, batches, 8) == pytest.approx([0, 0, 0, 0.1, 0.2, 0.3, 0.4, 0.4])
    # Two model objects, one projection: one table an interval.
    assert len(measured) == 2
    trainer.consolidate_optimizer()
    trainer.save_checkpoint(str(tmp_path / "eight.pt"), {})
    resumed, batches = training("joined", *arguments)
    resumed.load_checkpoint(str(tmp_path / "eight.pt"))
    assert shares(resumed, batches, 2) == pytest.approx([0.4, 0.4])


def test_every_projection_has_its_own_table_and_its_own_dictionary(training, measured, languages):
    """Of English to German and to French; the task's target dictionary is another one."""
    now = ["--self-kd-start-update", 0, "--self-kd-ramp-updates", 0]
    pairs = ["--task", "multilingual_translation", "--lang-pairs", "en-de,en-fr", "--arch"]
    trainer, batches = training("apart", *pairs, "multilingual_transformer", *SELF_KD, *now)
    shares(trainer, batches, 3)
    sizes = [len(Dictionary.load(str(languages / f"{name}.txt"))) for name in ("de", "fr")]
    assert measured == sizes
    assert sizes[0] != sizes[1]


def test_language_tags_are_no_neighbors(training, caplog):
    now = ["--self-kd-start-update", 0, "--self-kd-ramp-updates", 0]
    arguments = multilingual("--arch", "multilingual_transformer", *SHARED, *now)
    tags = ["--encoder-langtok", "tgt", "--decoder-langtok"]
    trainer, batches = training("joined", *arguments, *tags)
    dictionary = trainer.task.dicts["en"]
    assert dictionary.symbols[-3:] == ["__de__", "__en__", "__fr__"]
    shares(trainer, batches, 1)
    (taught,) = trainer.get_criterion().source.taught.values()
    eligible = {dictionary[i] for i in taught.teacher.eligible.tolist()}
    assert not any(symbol.startswith(("__", "madeup", "<")) for symbol in eligible)
    assert {"d1", "f1", "t1"} <= eligible


def test_which_symbols_are_words(tmp_path):
    made = Dictionary(extra_special_symbols=["<special>"])
    for word in ("house", "madeupword", "madeupword0007"):
        made.add_symbol(word)
    made.finalize(padding_factor=16)
    made.save(str(tmp_path / "dict.txt"))
    loaded = Dictionary.load(str(tmp_path / "dict.txt"))
    for symbol in ("[de]", "<mask>"):
        loaded.add_symbol(symbol)
    for dictionary in (made, loaded):
        words = [dictionary[i] for i in ordinary_words(dictionary)]
        # A user's own word may look like a filler, but it occurs.
        expected = {"house", "madeupword", "madeupword0007"}
        assert set(words) - {"<special>"} == expected
    assert "<special>" not in [made[i] for i in ordinary_words(made)]


def test_too_few_words_on_the_target_side_are_told_before_the_first_update(training):
    """Of a joined dictionary, which has enough."""
    trainer, batches = training(
        *("joined", "--task", "translation", "--source-lang", "de", "--target-lang", "en"),
        *("--arch", "transformer", *SELF_KD, "--self-kd-top-k", 45),
    )
    with pytest.raises(ValueError, match=r"--self-kd-top-k is 45; allowed: 1 to 39"):
        trainer.train_step([batches[0]])
    assert trainer.get_num_updates() == 0


def test_sharded_parameters_are_refused_before_the_first_batch(training):
    """fairscale, which makes them, is not needed for that."""
    translation = ("--task", "translation", "--source-lang", "de", "--target-lang", "en")
    trainer, batches = training("joined", *translation, "--arch", "transformer", *SELF_KD)
    trainer.cfg.distributed_training.ddp_backend = "fully_sharded"
    with pytest.raises(ValueError, match=r"--ddp-backend is fully_sharded; allowed.*legacy_ddp"):
        trainer.train_step([batches[0]])
