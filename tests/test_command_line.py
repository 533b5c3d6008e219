"""fairseq's commands, as users call them, on a tiny corpus."""

import json
import re
import socket
import sys
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import torch

from fairseq_skd import command_line
from fairseq_skd.checkpoints import read_checkpoint
from tests.conftest import PLUGIN, ROOT, TINY, TINY_LM, command, preprocess

TRAINING = [
    *("--user-dir", PLUGIN, "--cpu", "--optimizer", "adam", "--lr", 0.01, "--max-tokens", 200),
    *("--log-format", "json", "--log-interval", 1, "--seed", 3),
]
SELF_KD = [
    *("--criterion", "self_kd", "--label-smoothing", 0.1, "--self-kd-top-k", 5),
    *("--self-kd-weight", 0.5, "--self-kd-start-update", 4, "--self-kd-ramp-updates", 6),
    *("--self-kd-candidates", "neighbors"),
]
TRANSFORMER = ["--arch", "transformer", *TINY]


# Copies for the fused layer that `compatibility` does without; of later versions it has none.
FUSED = re.compile(r"encoder\.layers\.\d+\.(in_proj|out_proj|fc1|fc2)_(weight|bias)")


def train(data, save_dir, *arguments, base=(*TRANSFORMER, *SELF_KD)):
    return command("fairseq-train", data, *TRAINING, *base, "--save-dir", save_dir, *arguments)


def logged(output, kind="train_inner"):
    lines = (line.split(" | ", 3) for line in output.splitlines())
    return [json.loads(parts[3]) for parts in lines if len(parts) == 4 and parts[2] == kind]


def weights(checkpoint):
    return torch.load(checkpoint, weights_only=False)["model"]


def assert_equal_weights(one, other, tolerance=0.0):
    one, other = weights(one), weights(other)
    assert one.keys() == other.keys()
    for name, value in one.items():
        if tolerance and name.endswith("k_proj.bias"):
            continue  # its gradient is rounding alone, which Adam scales up
        if name.endswith("_float_tensor") or FUSED.fullmatch(name):
            continue  # of fairseq 0.12.2, which does not train with them
        assert (value - other[name]).abs().max() <= tolerance, name


@pytest.fixture(scope="module")
def translation(corpus, tmp_path_factory):
    """A trained translation model: its folder and fairseq-train's output."""
    folder = tmp_path_factory.mktemp("translation")
    output = train(corpus / "pair", folder, "--max-epoch", 2, "--report-accuracy")
    return folder, output


def test_training_says_what_it_does(translation):
    _, output = translation
    assert "self_kd|cand:neighbors|k:5|sim:cosine|sigma:auto*0.5|" in output
    assert "40 of 48 words are eligible" in output
    records = logged(output)
    assert float(records[0]["self_kd_weight"]) == 0
    assert "self_kd_loss" not in records[0]
    assert float(records[-1]["self_kd_weight"]) == 0.5
    assert 0 < float(records[-1]["self_kd_mass"]) <= 0.5
    assert float(records[-1]["self_kd_loss"]) > 0
    validation = logged(output, "valid")
    assert len(validation) == 2
    assert not any("self_kd" in key for record in validation for key in record)
    assert "valid_accuracy" in validation[0]


def test_generate_interactive_and_validate(translation, corpus):
    folder, _ = translation
    model = ["--path", folder / "checkpoint_best.pt", "--user-dir", PLUGIN, "--cpu"]
    # See BATCHES in examples/quickstart/arms.py.
    every = ["--required-batch-size-multiple", 1, "--scoring", "sacrebleu"]
    output = command("fairseq-generate", corpus / "pair", *model, *every)
    assert len(re.findall(r"^H-", output, re.MULTILINE)) == 12
    assert "BLEU" in output
    source = corpus / "test.src"
    output = command("fairseq-interactive", corpus / "pair", *model, "--input", source)
    assert len(re.findall(r"^H-", output, re.MULTILINE)) == 12
    output = command(
        "fairseq-validate", corpus / "pair", "--task", "translation", "--max-tokens", 99, *model
    )
    assert "nll_loss" in output


def test_a_trained_model_is_served_by_ctranslate2(translation, corpus, tmp_path):
    ctranslate2 = pytest.importorskip("ctranslate2")
    folder, _ = translation
    checkpoint = folder / "checkpoint_best.pt"
    command(
        *("ct2-fairseq-converter", "--model_path", checkpoint, "--data_dir", corpus / "pair"),
        *("--user_dir", PLUGIN, "--output_dir", tmp_path / "served"),
    )
    translator = ctranslate2.Translator(str(tmp_path / "served"))
    source = [line.split() for line in (corpus / "test.src").read_text().splitlines()]
    served = translator.translate_batch(source, beam_size=5, max_decoding_length=12)
    options = ["--beam", 5, "--max-len-b", 11, "--required-batch-size-multiple", 1]
    model = ["--path", checkpoint, "--user-dir", PLUGIN, "--cpu"]
    output = command("fairseq-generate", corpus / "pair", *model, *options)
    found = dict(re.findall(r"^H-(\d+)\t\S+\t(.*)$", output, re.MULTILINE))
    ours = [" ".join(result.hypotheses[0]) for result in served]
    theirs = [found[str(i)] for i in range(len(source))]
    # Each ends a beam in its own way.
    assert sum(a == b for a, b in zip(ours, theirs)) >= 0.7 * len(ours), (ours, theirs)


def test_averaged_checkpoints(translation, tmp_path):
    """What they translate, the recipes' tests show."""
    folder, _ = translation
    inputs = [folder / f"checkpoint{epoch}.pt" for epoch in (1, 2)]
    mean = tmp_path / "mean.pt"
    output = command("fairseq-skd", "average", *inputs, "--output", mean)
    assert "checkpoint2.pt (2 of 2)" in output
    one, two, averaged = (weights(path) for path in (*inputs, mean))
    for name, value in averaged.items():
        assert torch.allclose(value, (one[name] + two[name]) / 2, atol=1e-6), name


def test_a_resumed_run_equals_the_uninterrupted_one(corpus, tmp_path):
    """Bit by bit: from a checkpoint before the start, and from one when fresh tables are due.

    Within the first epoch: in later ones fairseq 0.12.3 resumes with other batches, whatever the
    criterion.
    """
    options = ["--self-kd-refresh-interval", 3, "--save-interval-updates", 1]
    options += ["--max-update", 14, "--disable-validation", "--max-tokens", 70]
    train(corpus / "pair", tmp_path / "whole", *options)
    for stop in (4, 9):
        checkpoint = tmp_path / "whole" / f"checkpoint_1_{stop}.pt"
        folder = tmp_path / f"from {stop}"
        output = train(corpus / "pair", folder, *options, "--restore-file", checkpoint)
        assert f"@ {stop} updates" in output
        assert_equal_weights(
            tmp_path / "whole" / "checkpoint_last.pt", folder / "checkpoint_last.pt"
        )


def test_float16_follows_float32(corpus, tmp_path):
    """fairseq's other half-precision modes, and what it does on overflow, need CUDA: tests/gpu."""
    options = ["--max-update", 8, "--update-freq", 2, "--clip-norm", 1, "--max-tokens", 100]
    options += ["--self-kd-start-update", 2, "--self-kd-ramp-updates", 2, "--dropout", 0]
    half = [*options, "--memory-efficient-fp16"]
    full = logged(train(corpus / "pair", tmp_path / "float32", *options))
    ours = logged(train(corpus / "pair", tmp_path / "float16", *half))
    for key in ("loss", "nll_loss", "self_kd_weight"):
        expected = [float(record[key]) for record in full]
        assert [float(record[key]) for record in ours] == pytest.approx(expected, rel=0.02)
    assert {float(record["loss_scale"]) for record in ours} == {128}


def in_processes(count, data, folder, *options):
    """Train with several workers over gloo; return what each printed."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    # fairseq cannot wrap a model on a CPU in PyTorch's DDP (see test_criterion for that one).
    shared = [*options, "--ddp-backend", "legacy_ddp", "--distributed-world-size", count]
    shared += ["--distributed-no-spawn", "--distributed-backend", "gloo"]
    shared += ["--distributed-init-method", f"tcp://127.0.0.1:{port}"]

    def worker(rank):
        return train(data, folder, *shared, "--distributed-rank", rank)

    with ThreadPoolExecutor(count) as workers:
        return list(workers.map(worker, range(count)))


@pytest.mark.parametrize("workers", [2, 3])
def test_workers_equal_one_that_accumulates(corpus, tmp_path, workers):
    options = ["--dropout", 0, "--max-update", 9, "--disable-validation", "--max-tokens", 100]
    options += ["--self-kd-start-update", 2, "--self-kd-refresh-interval", 3]
    train(corpus / "pair", tmp_path / "one", *options, "--update-freq", workers)
    outputs = in_processes(workers, corpus / "pair", tmp_path / "many", *options)
    assert float(logged(outputs[0])[-1]["self_kd_weight"]) > 0
    assert_equal_weights(
        tmp_path / "one" / "checkpoint_last.pt",
        tmp_path / "many" / "checkpoint_last.pt",
        tolerance=2e-5,
    )


@pytest.mark.parametrize("candidates", ["neighbors", "past"])
def test_epochs_of_one_batch_without_the_sentences_that_are_too_long(corpus, tmp_path, candidates):
    limits = ["--max-source-positions", 7, "--max-target-positions", 7]
    limits += ["--skip-invalid-size-inputs-valid-test", "--max-epoch", 12]
    limits += ["--required-batch-size-multiple", 1]
    options = [*limits, "--max-tokens", 100_000, "--self-kd-candidates", candidates]
    log = train(corpus / "pair", tmp_path, *options)
    assert re.search(r"\d+ samples have invalid sizes and will be skipped", log)
    losses = [float(record["loss"]) for record in logged(log)]
    assert len(losses) == 12
    assert losses[-1] < losses[0]
    assert float(logged(log)[-1]["self_kd_mass"]) > 0


def in_shards(corpus, folder):
    """Return the data in two parts, of which every epoch trains another one."""
    other = folder / "other"
    other.mkdir()
    for file in (corpus / "pair").iterdir():
        name = file.name.replace("valid", "train") if "valid" in file.name else file.name
        if not file.name.startswith("train"):
            (other / name).write_bytes(file.read_bytes())
    return f"{corpus / 'pair'}:{other}"


ANY_OPTIONS = {
    "shards": ["--max-epoch", 3],
    "a multiple of 8": ["--required-seq-len-multiple", 8],
    "padding at the left": ["--left-pad-target"],
    "a prefix": ["--ignore-prefix-size", 1],
    "a folder that holds nothing": ["--no-save"],
    "accumulated": ["--update-freq", 3],
    "long sentences left out": [
        "--max-target-positions",
        7,
        "--skip-invalid-size-inputs-valid-test",
    ],
}


@pytest.mark.parametrize("case", list(ANY_OPTIONS))
def test_one_swap_trains_what_label_smoothing_trains(corpus, tmp_path, case):
    """Nothing but the criterion is another one, and nothing that was not asked for is refused."""
    data = in_shards(corpus, tmp_path) if case == "shards" else corpus / "pair"
    options = ["--max-epoch", 2, "--label-smoothing", 0.1, *ANY_OPTIONS[case]]
    losses = []
    for criterion in ("label_smoothed_cross_entropy", "self_kd"):
        base = [*TRANSFORMER, "--criterion", criterion]
        output = train(data, tmp_path / criterion, *options, base=base)
        losses.append([float(record["loss"]) for record in logged(output)])
    theirs, ours = losses
    assert len(ours) == len(theirs) > 3
    assert ours[0] == pytest.approx(theirs[0])
    assert float(logged(output)[-1]["self_kd_mass"]) > 0
    files = tmp_path / "self_kd", tmp_path / "label_smoothed_cross_entropy"
    ours, theirs = ({file.name for file in folder.glob("*")} for folder in files)
    assert ours == theirs


@pytest.mark.parametrize("task", [["--add-bos-token"], ["--sample-break-mode", "complete"], []])
def test_one_swap_trains_a_language_model(corpus, tmp_path, task):
    base = ["--task", "language_modeling", "--tokens-per-sample", 12, *task, "--arch"]
    base += ["transformer_lm", *TINY_LM, "--label-smoothing", 0.1, "--max-update", 12]
    base += ["--criterion"]
    for criterion in ("label_smoothed_cross_entropy", "self_kd"):
        output = train(
            f"{corpus / 'lm'}:{corpus / 'lm'}", tmp_path / criterion, base=[*base, criterion]
        )
    assert "start at update 3, ramp of 1 updates" in output
    assert float(logged(output)[-1]["self_kd_mass"]) > 0


@pytest.mark.parametrize(
    ("alphabet", "said"), [("acgt", "4 words can be .*: k is 3"), ("a", "k is 0")]
)
def test_one_swap_trains_on_a_text_of_few_words(tmp_path, alphabet, said):
    """Nobody has chosen k = 10; where nobody can share, it is label smoothing."""
    for part, count in (("train", 60), ("valid", 8)):
        lines = [
            " ".join(alphabet[(i * j) % len(alphabet)] for j in range(1, 9)) for i in range(count)
        ]
        (tmp_path / part).write_text("\n".join(lines) + "\n")
    parts = [
        f"--{part}pref" if k else tmp_path / part for part in ("train", "valid") for k in (1, 0)
    ]
    preprocess("--only-source", *parts, "--destdir", tmp_path / "data")
    base = ["--task", "language_modeling", "--tokens-per-sample", 12, "--arch", "transformer_lm"]
    base += [*TINY_LM, "--max-update", 8, "--label-smoothing", 0.1, "--criterion", "self_kd"]
    base += ["--required-batch-size-multiple", 1]
    output = train(tmp_path / "data", tmp_path / "run", base=base)
    assert re.search(said, output)
    assert (float(logged(output)[-1]["self_kd_mass"]) > 0) == (alphabet != "a")
    with pytest.raises(AssertionError, match="--self-kd-top-k is 9; allowed: 1 to "):
        train(tmp_path / "data", tmp_path / "other", "--self-kd-top-k", 9, base=base)


def test_weight_0_is_label_smoothing_without_any_file(corpus, tmp_path):
    base = [*TRANSFORMER, "--criterion", "self_kd", "--self-kd-weight", 0, "--max-epoch", 1]
    base += ["--self-kd-candidates"]
    train(corpus / "pair", tmp_path / "past", base=[*base, "past"])
    absent = ["stored", "--self-kd-teacher", tmp_path / "absent"]
    train(corpus / "pair", tmp_path / "stored", base=[*base, *absent])
    assert not list(tmp_path.glob("*/self_kd_past*"))


@pytest.mark.parametrize("candidates", ["past", "neighbors"])
def test_the_past_with_padding_beyond_the_sentences(corpus, tmp_path, candidates):
    """It counts for nothing: the same training without it."""
    options = ["--max-epoch", 3, "--self-kd-candidates", candidates, "--dropout", 0]
    options += ["--self-kd-start-update", 0, "--self-kd-ramp-updates", 0]
    found = []
    for multiple in (1, 8):
        more = ["--required-seq-len-multiple", multiple, "--max-tokens", 4000]
        output = train(corpus / "pair", tmp_path / str(multiple), *options, *more)
        found.append([float(record["self_kd_loss"]) for record in logged(output)])
    assert found[0] == pytest.approx(found[1], abs=2e-3)
    assert len(found[0]) >= 3


@pytest.mark.parametrize("kind", ["pair", "lm"])
def test_the_past_of_shards_is_refused(corpus, tmp_path, kind):
    """A language model's too, whose task keeps its settings elsewhere."""
    data = in_shards(corpus, tmp_path) if kind == "pair" else f"{corpus / 'lm'}:{corpus / 'lm'}"
    lm = ["--task", "language_modeling", "--tokens-per-sample", 12, "--arch", "transformer_lm"]
    base = [*(TRANSFORMER if kind == "pair" else [*lm, *TINY_LM]), *SELF_KD]
    with pytest.raises(AssertionError, match="past, and the training data is in shards"):
        train(data, tmp_path / "run", "--self-kd-candidates", "past", base=base)


def test_the_past_of_another_training_set(corpus, tmp_path):
    subsets = ["--train-subset", "valid", "--valid-subset", "train", "--max-epoch", 6]
    log = train(corpus / "pair", tmp_path, *subsets, "--self-kd-candidates", "past")
    assert float(logged(log)[-1]["self_kd_mass"]) > 0


def test_two_workers_share_the_past_also_if_one_has_no_batch_left(corpus, tmp_path):
    """An odd number of batches an epoch: at its end one worker has a dummy batch."""
    options = [
        "--max-epoch",
        3,
        "--max-tokens",
        999,
        "--disable-validation",
        "--batch-size",
        32,
        "--dropout",
        0,
    ]
    options += ["--self-kd-candidates", "past", "--self-kd-start-update", 0]
    options += ["--self-kd-ramp-updates", 0]
    outputs = in_processes(2, corpus / "pair", tmp_path, *options)
    masses = [float(record["self_kd_mass"]) for record in logged(outputs[0])]
    assert len(masses) == 9  # five batches an epoch
    assert masses[:3] == [0] * 3  # nothing was seen before
    assert min(masses[3:]) > 0
    assert (tmp_path / "self_kd_past.bin").is_file()


def test_language_model(corpus, tmp_path):
    base = ["--task", "language_modeling", "--tokens-per-sample", 20, "--arch", "transformer_lm"]
    output = train(
        corpus / "lm",
        tmp_path,
        *("--max-epoch", 2, "--self-kd-candidates", "both"),
        base=[*base, *TINY_LM, "--share-decoder-input-output-embed", *SELF_KD],
    )
    assert "self_kd_loss" in logged(output)[-1]


@pytest.mark.parametrize(
    "base",
    [
        ["--arch", "lstm", "--encoder-embed-dim", 16, "--decoder-embed-dim", 16],
        ["--arch", "fconv", "--encoder-layers", "[(16, 3)]", "--decoder-layers", "[(16, 3)]"],
    ],
    ids=["lstm", "convolutional"],
)
def test_other_models(corpus, tmp_path, base):
    output = train(corpus / "pair", tmp_path, "--max-epoch", 1, base=[*base, *SELF_KD])
    assert "self_kd_loss" in logged(output)[-1]


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_hydra_train_from_a_yaml(corpus, tmp_path, precision):
    (tmp_path / "run.yaml").write_text(
        f"""# @package _group_
common: {{cpu: true, user_dir: {PLUGIN}, log_format: json, log_interval: 1, seed: 3}}
task: {{_name: translation, data: {corpus / "pair"}}}
model:
  _name: transformer
  base_layers: 0  # None by default, with which fairseq 0.12.2 saves no checkpoint
  encoder: {{embed_dim: 16, layers: 1, ffn_embed_dim: 16, attention_heads: 2}}
  decoder: {{embed_dim: 16, layers: 1, ffn_embed_dim: 16, attention_heads: 2}}
criterion:
  _name: self_kd
  label_smoothing: 0.1
  self_kd_candidates: neighbors
  self_kd_weight: 0.4
  self_kd_start_update: 0
  self_kd_ramp_updates: 0
  self_kd_top_k: 5
  self_kd_sigma: 2.5
  self_kd_similarity: cosine
dataset: {{max_tokens: 200}}
optimization: {{max_epoch: 1, lr: [0.01]}}
optimizer: {{_name: adam}}
lr_scheduler: {{_name: inverse_sqrt, warmup_updates: 4}}
checkpoint: {{save_dir: {tmp_path / "save"}}}
"""
    )
    run = ["--config-dir", tmp_path, "--config-name", "run"]
    bf16 = f"common.bf16={str(precision == 'bf16').lower()}"
    output = command("fairseq-hydra-train", *run, bf16, cwd=tmp_path)
    log = "".join(path.read_text() for path in tmp_path.rglob("*.log")) + output
    assert "k:5|sim:cosine|sigma:2.5|" in log
    assert '"self_kd_weight": "0.4"' in log
    assert (tmp_path / "save" / "checkpoint_last.pt").exists()


def test_eval_bleu_during_validation_and_going_on_from_its_checkpoint(corpus, tmp_path):
    """With --eval-bleu a checkpoint also holds numpy's numbers."""
    for epochs in (1, 2):
        output = train(
            corpus / "pair",
            tmp_path,
            *("--eval-bleu", "--eval-bleu-args", '{"beam": 2, "max_len_b": 10}'),
            *("--best-checkpoint-metric", "bleu", "--maximize-best-checkpoint-metric"),
            *("--max-epoch", epochs),
            base=["--task", "translation", *TRANSFORMER, *SELF_KD],
        )
        assert "valid_bleu" in logged(output, "valid")[0]
    assert "Loaded checkpoint" in output


def test_going_on_from_a_checkpoint_of_another_criterion(corpus, tmp_path):
    """As the README's troubleshooting says."""
    label_smoothing = ["--criterion", "label_smoothed_cross_entropy", "--label-smoothing", 0.1]
    short = ["--max-update", 2, "--disable-validation"]
    train(corpus / "pair", tmp_path / "first", *short, base=[*TRANSFORMER, *label_smoothing])
    checkpoint = tmp_path / "first" / "checkpoint_last.pt"
    restore = ["--restore-file", checkpoint, "--reset-optimizer", "--reset-lr-scheduler"]
    output = train(corpus / "pair", tmp_path / "second", *short, *restore, "--reset-dataloader")
    assert "Loaded checkpoint" in output


@pytest.mark.parametrize(
    ("candidates", "length", "found"),
    [
        # Three batches an epoch, two of them in an update.
        (
            "past",
            ["--max-epoch", 3, "--update-freq", 2],
            "--max-epoch 3: start at update 0, ramp of 6",
        ),
        (
            "past",
            ["--max-update", 5, "--max-epoch", 3],
            "--max-update 5: start at update 0, ramp of 5",
        ),
        ("neighbors", ["--max-update", 24], "--max-update 24: start at update 12, ramp of 12"),
        (
            "neighbors",
            ["--max-update", 24, "--self-kd-start-update", 3],
            "start at update 3, ramp of 21",
        ),
    ],
)
def test_a_schedule_is_derived_from_the_length_of_the_training(
    corpus, tmp_path, candidates, length, found
):
    output = train(
        corpus / "pair",
        tmp_path,
        *("--max-tokens", 400, "--disable-validation", "--no-save", *length),
        *("--lr-scheduler", "inverse_sqrt", "--warmup-updates", 2),
        *("--criterion", "self_kd", "--self-kd-candidates", candidates),
        base=TRANSFORMER,
    )
    assert found in output
    assert "|start:auto|ramp:auto" in output or "|start:3|ramp:auto" in output
    start, ramp = map(int, re.search(r"start at update (\d+), ramp of (\d+)", output).groups())
    last = logged(output)[-1]
    done = int(last["num_updates"])
    # alpha of the last update is that of the one before it was made.
    alpha = 0.5 * min(1, (done - 1 - start) / ramp)
    assert float(last["self_kd_weight"]) == pytest.approx(alpha, abs=1e-4)
    assert done == start + ramp


def test_the_other_name_goes_on_with_a_run(translation, corpus, tmp_path):
    checkpoint = translation[0] / "checkpoint1.pt"
    other = ["--criterion", "self_kd_label_smoothed_cross_entropy", *SELF_KD[2:]]
    short = ["--disable-validation", "--max-epoch", 2, "--restore-file", checkpoint]
    output = train(corpus / "pair", tmp_path, *short, base=[*TRANSFORMER, *other])
    assert "Loaded checkpoint" in output


def test_bad_options_stop_before_training(corpus, tmp_path):
    with pytest.raises(
        AssertionError, match=r"--self-kd-max-mass is 2\.0; allowed: a number from 0"
    ):
        train(corpus / "pair", tmp_path, "--self-kd-max-mass", 2)
    assert not list(tmp_path.iterdir())


def test_the_installed_plugin(capsys, monkeypatch):
    assert Path(command("fairseq-skd", "path").splitlines()[-1]) == PLUGIN
    monkeypatch.setattr(sys, "argv", ["fairseq-skd", "--version"])
    with pytest.raises(SystemExit, match="0"):
        command_line.main()
    assert re.fullmatch(r"\d+\.\d+\.\d+\n", capsys.readouterr().out)


def quickstart(*arguments):
    return command(ROOT / "examples" / "quickstart" / "run.py", *arguments)


def test_quickstart_with_an_own_corpus_then_again(corpus, tmp_path):
    """From a file of pairs to both tables; a second time nothing is repeated."""
    pairs = tmp_path / "pairs.tsv"
    source = (corpus / "train.src").read_text().splitlines()
    target = (corpus / "train.tgt").read_text().splitlines()
    numbers = str.maketrans("0123456789", "abcdefghij")
    pairs.write_text(
        "".join(f"{s}\t{t}\n".translate(numbers) for s, t in zip(source, target)), encoding="utf-8"
    )
    # Few epochs: each one validates and saves.
    arguments = ["--pairs", pairs, "--langs", "xx-yy", "--out", tmp_path / "out"]
    arguments += ["--updates", 50, "--max-tokens", 200]
    output = quickstart(*arguments)
    translations = "small", "small, taught", "large"
    for name in ("label smoothing", "self-KD", *translations):
        assert len(re.findall(rf"^  {name} +update    50 of 50", output, re.MULTILINE)) == 1
    assert re.search(r"label smoothing +│ +\d+\.\d\d │ +\d+\.\d\d │ +\d+\.\d\d", output)
    figures = r" +│ +\d+\.\d │ +\d+\.\d │ +\d+\.\d\d │ +\d+\.\d\d"
    sizes = [re.search(rf"{name} +│ +([\d,]+){figures}", output)[1] for name in translations]
    small, taught, large = (int(size.replace(",", "")) for size in sizes)
    assert small == taught < large / 2
    assert "nrefs:1|bs:1000|seed:12345|case:mixed|eff:no|tok:13a|smooth:exp|version:" in output
    assert len(re.findall(r"^small, taught: ", output, re.MULTILINE)) == 3
    assert (tmp_path / "out" / "quickstart.png").stat().st_size > 10_000
    results = json.loads((tmp_path / "out" / "results.json").read_text())
    assert set(results["translation"]) == {*translations, "signature", "p_value"}
    # What the student learns from is what the large one gives to the text that both have seen.
    (teacher,) = (tmp_path / "out").glob("large-*/teacher.skd")
    assert f"--self-kd-teacher {teacher}" in results["translation"]["small, taught"]["command"]
    assert "the mean of 1 model(s)" in " ".join((teacher.parent / "teach.log").read_text().split())
    baseline, ours = (results["language model"][arm] for arm in ("label smoothing", "self-KD"))
    # What is tested is what has the perplexity that is shown.
    (best,) = (tmp_path / "out" / "language-model").glob("label-smoothing-*/checkpoint_best.pt")
    assert read_checkpoint(best)["extra_state"]["best"] == baseline["valid_ppl"]
    change = 100 * (ours["test_ppl"] / baseline["test_ppl"] - 1)
    assert f"self-KD: {change:+.1f} % against label smoothing. One seed." in output
    again = quickstart(*arguments)
    for title in ("Corpus:", "Vocabulary:", "Language model,", "Translation,", "What large gives"):
        assert title in output
        assert title not in again
    assert "$ fairseq" not in again
    assert output[output.index("xx, language") :].split("\n\n")[0] in again
    assert output[output.index("xx-yy, ") :].split("Done")[0] in again


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("one\ttwo\nalone\n", "line 2: 1 columns; each line must be"),
        ("12\t34\n" * 9, "0 usable pairs are left"),
        (None, "there is no such file"),
    ],
)
def test_quickstart_with_a_bad_corpus(tmp_path, content, message):
    pairs = tmp_path / "pairs.tsv"
    if content is not None:
        pairs.write_text(content)
    with pytest.raises(AssertionError, match=message):
        quickstart("--pairs", pairs, "--out", tmp_path / "out")


def test_quickstart_with_another_corpus_in_its_folder(tmp_path):
    (tmp_path / "out" / "text").mkdir(parents=True)
    (tmp_path / "out" / "text" / "done").write_text("quickstart-de-fr")
    message = (
        "out is of quickstart-de-fr, not of quickstart-en-de, up to 12 words; --out takes another"
    )
    with pytest.raises(AssertionError, match=message):
        quickstart("--out", tmp_path / "out")


def test_quickstart_without_debians_tools(tmp_path):
    """The environment of these tests has no PATH to them."""
    with pytest.raises(AssertionError, match=r"no apt-get on this machine(.|\n)*PAIRS=file\.tsv"):
        quickstart("--langs", "en-cs", "--out", tmp_path / "out")
