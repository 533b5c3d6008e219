"""A tiny corpus, made here, and fairseq's objects on it."""

import multiprocessing
import os
import random
import runpy
import sys
import tempfile
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

# Two workers on two cores: more threads would only wait for each other. Also makes sums repeatable.
torch.set_num_threads(1)

ROOT = Path(__file__).resolve().parents[1]
PLUGIN = ROOT / "fairseq_skd"

TINY = [
    *("--encoder-embed-dim", "16", "--decoder-embed-dim", "16"),
    *("--encoder-layers", "1", "--decoder-layers", "1"),
    *("--encoder-ffn-embed-dim", "16", "--decoder-ffn-embed-dim", "16"),
    *("--encoder-attention-heads", "2", "--decoder-attention-heads", "2"),
]
TINY_LM = [
    *("--decoder-embed-dim", "16", "--decoder-layers", "1", "--decoder-ffn-embed-dim", "16"),
    *("--decoder-attention-heads", "2"),
]

# Without these a machine with a GPU may not find its driver, or packages in a folder.
_OF_THE_MACHINE = ("LD_LIBRARY_PATH", "CUDA_VISIBLE_DEVICES", "PYTHONPATH")
LOADED = multiprocessing.get_context("forkserver")
# torch loads the last one for its first optimizer.
LOADED.set_forkserver_preload(["fairseq_cli.train", "fairseq_cli.generate", "torch._dynamo"])


def command(name, *arguments, cwd=None, status=0):
    """Run a command of this environment, or a script of Python; return its output.

    Fails if its exit status is not the one that is expected.

    It runs in a process that is forked from one that has loaded fairseq and done nothing else:
    loading takes seconds, and there are 25 commands. (Recipes and examples start real ones.)
    """
    script = Path(sys.executable).parent / name
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder, "output")
        process = LOADED.Process(target=be, args=(script, arguments, cwd, output))
        process.start()
        process.join()
        printed = output.read_text(encoding="utf-8")
    assert process.exitcode == status, f"{name} {arguments}\n{printed[-4000:]}"
    return printed


def be(script, arguments, cwd, output):
    """Turn this process into that of a script: its streams, its environment and nobody else's."""
    stream = os.open(output, os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(stream, 1)
    os.dup2(stream, 2)
    kept = {name: os.environ[name] for name in _OF_THE_MACHINE if name in os.environ}
    os.environ.clear()
    path = str(Path(sys.executable).parent)
    if torch.cuda.is_available():
        path += f":{os.defpath}"  # Triton looks for a C compiler
    os.environ.update(PATH=path, OMP_NUM_THREADS="1", **kept)
    os.chdir(cwd or ROOT)
    multiprocessing.set_start_method(None, force=True)  # of the workers that load data
    sys.argv = [str(script), *map(str, arguments)]
    sys.path[0] = str(script.parent)
    runpy.run_path(sys.argv[0], run_name="__main__")


def sentences(count, seed):
    """Pairs in which the target is a word-for-word translation in reverse order."""
    draw = random.Random(seed)
    for _ in range(count):
        words = [draw.randrange(40) for _ in range(draw.randint(3, 9))]
        yield " ".join(f"s{w}" for w in words), " ".join(f"t{w}" for w in reversed(words))


@pytest.fixture(scope="session")
def corpus(tmp_path_factory):
    """Folders of binarised text: pair, joined (one dictionary) and lm (target side alone)."""
    folder = tmp_path_factory.mktemp("corpus")
    for part, count, seed in (("train", 160, 1), ("valid", 20, 2), ("test", 12, 3)):
        source, target = zip(*sentences(count, seed))
        (folder / f"{part}.src").write_text("\n".join(source) + "\n")
        (folder / f"{part}.tgt").write_text("\n".join(target) + "\n")
    files = [*("--trainpref", folder / "train", "--validpref", folder / "valid")]
    files += ["--testpref", folder / "test"]
    sides = ["-s", "src", "-t", "tgt"]
    preprocess(*sides, *files, "--destdir", folder / "pair")
    preprocess(*sides, *files, "--joined-dictionary", "--destdir", folder / "joined")
    files = [f"{f}.tgt" if not str(f).startswith("--") else f for f in files]
    preprocess("--only-source", *files, "--destdir", folder / "lm")
    return folder


def preprocess(*arguments):
    """Run fairseq-preprocess in this process: every worker needs the corpus before it begins."""
    from fairseq import options
    from fairseq_cli.preprocess import main

    main(options.get_preprocessing_parser().parse_args([str(argument) for argument in arguments]))


@pytest.fixture
def build(corpus):
    """Make a task, a model, a criterion and batches from a fairseq-train command line."""
    from fairseq import options, tasks
    from fairseq.dataclass.utils import convert_namespace_to_omegaconf

    def make(*arguments, data="pair", lm=False, load=True):
        if lm:
            data = "lm"
            arguments = ("--task", "language_modeling", "--tokens-per-sample", "12", *arguments)
        base = [str(corpus / data), "--max-tokens", "60", "--user-dir", str(PLUGIN), "--cpu"]
        base += ["--dropout", "0.0"]
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, [*base, *map(str, arguments)])
        config = convert_namespace_to_omegaconf(args)
        torch.manual_seed(1)
        task = tasks.setup_task(config.task)
        model = task.build_model(config.model)
        criterion = task.build_criterion(config.criterion)
        samples = []
        if load:
            task.load_dataset("train")
            batches = task.get_batch_iterator(task.dataset("train"), max_tokens=60, seed=1)
            samples = list(batches.next_epoch_itr(shuffle=False))[:3]
        return SimpleNamespace(
            task=task, model=model, criterion=criterion, samples=samples, config=config
        )

    return make


class Gradients:
    """Stands in for an optimizer in task.train_step: goes backward, changes nothing."""

    def backward(self, loss):
        loss.backward()


@pytest.fixture
def train_step():
    """Compute loss, gradients by parameter name and logging output of one batch."""

    def step(built, sample, update_num=0, **overrides):
        model = overrides.get("model", built.model)
        criterion = overrides.get("criterion", built.criterion)
        model.zero_grad(set_to_none=True)
        criterion.train()
        if hasattr(criterion, "begin_update"):
            criterion.begin_update(update_num)
        loss, sample_size, log = built.task.train_step(
            sample, model, criterion, Gradients(), update_num
        )
        gradients = {name: p.grad for name, p in model.named_parameters() if p.grad is not None}
        return SimpleNamespace(loss=loss, sample_size=sample_size, log=log, gradients=gradients)

    return step
