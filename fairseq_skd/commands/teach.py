"""``fairseq-skd teach``: write what finished models give to every word of a training text."""

import copy
import hashlib
import math
import time
from argparse import Namespace
from pathlib import Path
from typing import Any, Dict, Iterator, List, Mapping, Optional, Sequence, Tuple

import numpy as np
import torch
import typer
from fairseq import options, tasks, utils
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.models import FairseqLanguageModel
from torch import Tensor
from torch.utils.data import DataLoader
from typing_extensions import Annotated

from fairseq_skd import compatibility
from fairseq_skd.checkpoints import read_checkpoint
from fairseq_skd.commands import CommandError, output
from fairseq_skd.commands.output import AsJSON, Titled, note, progress, waiting
from fairseq_skd.commands.teaching import Settings
from fairseq_skd.commands.trained import Trained, data_of, load
from fairseq_skd.likeliest import likeliest_words
from fairseq_skd.output_projection import UnsupportedModelError, find_output_projection
from fairseq_skd.stored import TargetsWriter
from fairseq_skd.word_file import WordFileError

__all__ = ["teach"]


def teach(
    context: typer.Context,
    data: Annotated[Path, typer.Argument(help="Folder made by fairseq-preprocess.")],
    path: Annotated[
        str, typer.Option(help="Checkpoints of the teacher, with colons between: their mean.")
    ],
    output_file: Annotated[Path, typer.Option("--output", help="The file to write.")],
    top_k: Annotated[int, typer.Option(help="Words kept of every position.")] = 10,
    sampled: Annotated[
        Optional[int],
        typer.Option(
            help="So many of them sampled, to stand for the words that are less likely.",
            show_default="half for a language model, 0 for a translation",
        ),
    ] = None,
    temperature: Annotated[
        float, typer.Option(help="By which the teachers' logits are divided.")
    ] = 1.0,
    subset: Annotated[str, typer.Option(help="The training text: train, valid, ...")] = "train",
    max_tokens: Annotated[int, typer.Option(help="Words of a batch, on the longer side.")] = 4096,
    fp16: Annotated[bool, typer.Option("--fp16", help="In float16, on a GPU.")] = False,
    bf16: Annotated[bool, typer.Option("--bf16", help="In bfloat16.")] = False,
    cpu: Annotated[bool, typer.Option("--cpu", help="Not on the GPU.")] = False,
    num_shards: Annotated[
        int, typer.Option(help="So many commands share the work and write into one file.")
    ] = 1,
    shard_id: Annotated[int, typer.Option(help="Which of them this is, from 0.")] = 0,
    task: Annotated[
        Optional[str], typer.Option(help="fairseq's task. Default: that of the first checkpoint.")
    ] = None,
    user_dir: Settings.user_dir = None,
    as_json: AsJSON = False,
) -> None:
    """Let finished models teach: write their likeliest words of a training text into a file.

    For trainings with --self-kd-candidates stored --self-kd-teacher FILE, any number of them. The
    teacher is the mean of the checkpoints' probabilities, in evaluation mode. What was interrupted
    goes on with the same command.

    Options of the task, such as --tokens-per-sample, are those of the first checkpoint's training
    unless they are given here (after --task those of the task, as in fairseq's commands); the
    training that learns from the file needs the same ones.

    Example:

      fairseq-skd teach data-bin --path one/checkpoint_best.pt:two/checkpoint_best.pt --output t.skd
    """
    _check(
        data,
        output_file,
        top_k,
        sampled,
        temperature,
        max_tokens,
        fp16,
        bf16,
        cpu,
        num_shards,
        shard_id,
    )
    checkpoints = [Path(name) for name in path.split(":")]
    dtype = torch.float16 if fp16 else torch.bfloat16 if bf16 else torch.float32
    own = _overrides(context.args)
    models = [load(one, data, user_dir, on_gpu=False) for one in checkpoints]
    first = models[0]
    changed = _changed(first, own) if task is None else _task(task, data, context.args)
    first = first._replace(task=changed)
    for trained in models:
        _check_dictionaries(trained, first, data)
    device = torch.device("cuda" if torch.cuda.is_available() and not cpu else "cpu")
    modules = [trained.model.to(device, dtype).eval() for trained in models]
    if sampled is None:
        # The ten likeliest words of a translation hold 89 % of what its teachers give, of a
        # language model 61 %: docs/results.
        sampled = top_k // 2 if isinstance(modules[0], FairseqLanguageModel) else 0
    dataset = first.dataset(subset, training=True)
    first.task.self_kd_train_subset = subset
    try:
        layout = compatibility.text_layout(first.task)
    except ValueError as error:
        raise CommandError(f"{subset} cannot be taught: {error}") from error
    if top_k > len(first.task.target_dictionary):
        raise CommandError(
            f"--top-k is {top_k}; allowed: 1 to {len(first.task.target_dictionary)}, the words of "
            "the dictionary"
        )
    limits = utils.resolve_max_positions(
        first.task.max_positions(), *(module.max_positions() for module in modules)
    )
    everything = np.arange(len(dataset))
    if len(dataset) and not len(dataset.filter_indices_by_size(everything, limits)[0]):
        raise CommandError(f"all sentences are longer than a teacher reads ({limits} positions)")
    with waiting("reading the checkpoints' checksums"):
        named = zip(output.labels(checkpoints), checkpoints)
        described = [{"file": name, "sha256": _sha256(one)} for name, one in named]
    if len({one["sha256"] for one in described}) < len(described):
        note(f"--path is {path}, which names a model twice: it counts twice")
    teacher = {
        "checkpoints": described,
        "temperature": temperature,
        "precision": str(dtype).replace("torch.", ""),
    }
    if sampled:
        teacher["sampled"] = sampled
    try:
        begun = output_file.exists()
        writer = TargetsWriter(output_file, {"top_k": top_k, "teacher": teacher}, layout, note)
    except WordFileError as error:
        raise CommandError(str(error)) from error
    with waiting("looking at what is written"):
        missing = writer.missing(check=begun)
    # Each shard has its own stretch of the file, so that machines do not write side by side.
    mine = missing[missing * num_shards // max(len(layout.lengths), 1) == shard_id]
    if not len(missing):
        note(f"{output_file} is complete: nothing is left to do")
        empty = len(writer.file.empty())
        if empty:
            note(
                f"{empty} sentences in it were longer than a teacher read: nothing is taught there"
            )
    elif begun or len(mine) < len(missing):
        note(f"{len(missing)} of {len(layout.lengths)} sentences are missing; {len(mine)} are ours")
    batches = Batches(dataset, mine, limits, max_tokens)
    seen = Seen()
    began = time.time()
    try:
        if len(batches.too_long):
            note(
                f"{len(batches.too_long)} sentences are longer than a teacher reads "
                f"({limits} positions): nothing is taught there"
            )
            _leave_empty(writer, batches.too_long, top_k)
        for batch in progress(batches, "teaching", len(batches)):
            batch = utils.move_to_cuda(batch) if device.type == "cuda" else batch
            seen.add(*_write(writer, modules, first.task, batch, top_k, temperature, sampled))
    except KeyboardInterrupt:
        raise CommandError("interrupted; the same command goes on from here") from None
    except WordFileError as error:
        raise CommandError(str(error)) from error
    finally:
        writer.close()
    seconds = time.time() - began
    speed = seen.words / max(seconds, 1e-9)
    left_out = len(batches.too_long)
    rows = [{**seen.figures(), "left_out": left_out, "seconds": seconds, "words_a_second": speed}]
    left, done = len(writer.missing()), len(layout.lengths) - len(mine)
    words = f"{top_k} words of every position" + (f", {sampled} of them sampled" if sampled else "")
    title = f"{output_file}: {words}, the mean of {len(models)} model(s)"
    if len(mine) and done:
        title += f"; of the {len(mine)} sentences that this command wrote"
    if left:
        title += f"; {left} sentences are still missing, those of other shards"
    formats = {"perplexity": ".2f", "right_first_choices": ".4f", "mass_of_the_likeliest": ".4f"}
    formats.update(seconds=".1f", words_a_second=",.0f")
    num_words = len(first.task.target_dictionary)
    if seen.words and seen.nll / seen.words > math.log(num_words):
        note(
            f"the teacher finds this text less likely than words at random would be (perplexity "
            f"above {num_words:,}): is it the data, or the dictionary, that it was trained with?"
        )
    if len(missing) or as_json:
        output.show({"teacher": Titled(title, rows)}, formats, as_json, False)


def _check(
    data: Path,
    output_file: Path,
    top_k: int,
    sampled: Optional[int],
    temperature: float,
    max_tokens: int,
    fp16: bool,
    bf16: bool,
    cpu: bool,
    num_shards: int,
    shard_id: int,
) -> None:
    """Refuse what cannot be meant before anything is loaded."""
    for wrong, message in (
        (output_file.is_dir(), f"--output is {output_file}, a folder; allowed: a file"),
        (top_k < 1, f"--top-k is {top_k}; allowed: 1 or more"),
        (
            sampled is not None and not 0 <= sampled < max(top_k, 1),
            f"--sampled is {sampled}; allowed: 0 to {top_k - 1}, below --top-k",
        ),
        (
            not 0 < temperature < math.inf,
            f"--temperature is {temperature}; allowed: a positive number",
        ),
        (max_tokens < 1, f"--max-tokens is {max_tokens}; allowed: 1 or more"),
        (num_shards < 1, f"--num-shards is {num_shards}; allowed: 1 or more"),
        (
            not 0 <= shard_id < num_shards,
            f"--shard-id is {shard_id}; allowed: 0 to {num_shards - 1}, below --num-shards",
        ),
        (fp16 and bf16, "--fp16 and --bf16 were given; allowed: one of them"),
        (
            fp16 and (cpu or not torch.cuda.is_available()),
            "--fp16 is for a GPU, and none is used; leave it out",
        ),
        (
            len(utils.split_paths(str(data))) != 1,
            f"{data} is in shards: one file for each, by a command of its own",
        ),
    ):
        if wrong:
            raise CommandError(message)


def _overrides(arguments: Sequence[str]) -> Dict[str, Any]:
    """Return options of a task that are no options of the command, as fairseq names them."""
    found: Dict[str, Any] = {}
    rest = list(arguments)
    while rest:
        name = rest.pop(0)
        if not name.startswith("--"):
            raise CommandError(f"{name!r} is not understood; see fairseq-skd teach --help")
        key, equals, value = name[2:].replace("-", "_").partition("=")
        if equals:
            found[key] = _value(value)
        elif rest and not rest[0].startswith("--"):
            found[key] = _value(rest.pop(0))
        else:
            found[key] = True
    return found


def _value(text: str) -> Any:
    if text in ("True", "False"):
        return text == "True"
    for kind in (int, float):
        try:
            return kind(text)
        except ValueError:
            continue
    return text


def _changed(trained: Trained, own: Mapping[str, Any]) -> Any:
    """Return a model's task with other options, as they are given; the model stays what it is."""
    settings = copy.deepcopy(trained.config.task)
    known = vars(settings) if isinstance(settings, Namespace) else settings
    for name, value in own.items():
        option = f"--{name.replace('_', '-')}"
        if name not in known or name in ("data", "_name"):
            raise CommandError(
                f"{option} is no option of fairseq-skd teach, nor of the task "
                f"{type(trained.task).__name__}"
            )
        try:
            if isinstance(settings, Namespace):
                setattr(settings, name, value)
            else:
                settings[name] = value
        except Exception as error:  # omegaconf's, of a type that does not fit
            raise CommandError(f"{option} is {value}: {str(error).splitlines()[0]}") from error
    return tasks.setup_task(settings) if own else trained.task


def _task(name: str, data: Path, arguments: Sequence[str]) -> Any:
    """Set up a task as fairseq's commands do."""
    parser = options.get_validation_parser(name)
    try:
        namespace = options.parse_args_and_arch(parser, [str(data), "--task", name, *arguments])
    except SystemExit as error:
        raise CommandError(f"--task {name} does not take these options") from error
    return tasks.setup_task(convert_namespace_to_omegaconf(namespace).task)


def _check_dictionaries(trained: Trained, first: Trained, data: Path) -> None:
    """Refuse a model whose words are others, or stand in another order."""
    named = data_of(read_checkpoint(trained.path, mmap=True))
    if named is not None:
        # A path may be relative to where the training began, which is most often above what it has
        # saved. From here it may be the data itself, and would agree with it whatever it was.
        above = (parent / named for parent in trained.path.resolve().parents)
        folder = next((one for one in above if one.is_dir()), named)
        here = folder.resolve() == data.resolve()
        if not folder.is_dir() or (here and folder == named and not named.is_absolute()):
            note(
                f"{trained.path} was trained with {named}, which was not found: its dictionary is "
                f"taken to be that of {data}"
            )
        for file in [] if here else sorted(data.glob("dict*.txt")):
            if (folder / file.name).is_file():
                its, ours = (Dictionary.load(str(f)).symbols for f in (folder / file.name, file))
                _same_words(its, ours, trained.path, f"{file} (trained with {folder})")
    its, ours = (one.task.target_dictionary.symbols for one in (trained, first))
    _same_words(its, ours, trained.path, str(first.path))


def _same_words(its: List[str], ours: List[str], path: Path, other: str) -> None:
    for i, (one, two) in enumerate(zip(its, ours)):
        if one != two:
            raise CommandError(
                f"{path} and {other} have different dictionaries: word {i} is {one!r} in one and "
                f"{two!r} in the other. Models that teach together need the same words in the same "
                "order"
            )
    if len(its) != len(ours):
        raise CommandError(
            f"{path} has {len(its)} words and {other} {len(ours)}; models that teach together need "
            "the same words in the same order"
        )


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for part in iter(lambda: file.read(2**24), b""):
            digest.update(part)
    return digest.hexdigest()


class Batches:
    """Batches of some sentences of a data set, those of like length together.

    Parameters
    ----------
    dataset : FairseqDataset
        The text.
    sentences : numpy.ndarray
        int64: which of its sentences.
    limits : int or tuple of int
        Positions that a model takes.
    max_tokens : int
        Words of a batch.

    Attributes
    ----------
    too_long : numpy.ndarray
        Sentences that no batch has.
    """

    def __init__(self, dataset: Any, sentences: np.ndarray, limits: Any, max_tokens: int) -> None:
        self.dataset = dataset
        wanted = np.zeros(len(dataset), dtype=bool)
        wanted[sentences] = True
        ordered = np.asarray(dataset.ordered_indices())
        ordered = ordered[wanted[ordered]]
        kept, ignored = dataset.filter_indices_by_size(ordered, limits)
        self.too_long = np.asarray(ignored, dtype=np.int64)
        longest = max((int(dataset.num_tokens(i)) for i in kept), default=1)
        # Without a multiple of 1 fairseq 0.12.3 leaves sentences out.
        self.batches = dataset.batch_by_size(
            kept, max_tokens=max(longest, max_tokens), required_batch_size_multiple=1
        )

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[Any]:
        return iter(
            DataLoader(
                self.dataset,
                collate_fn=self.dataset.collater,
                batch_sampler=[[int(i) for i in batch] for batch in self.batches],
            )
        )


class Seen:
    """What was seen of a teacher: sums over words."""

    def __init__(self) -> None:
        self.words = 0
        self.nll = self.right = self.mass = 0.0

    def add(self, words: int, nll: float, right: float, mass: float) -> None:
        """Count a batch."""
        self.words += words
        self.nll, self.right, self.mass = self.nll + nll, self.right + right, self.mass + mass

    def figures(self) -> Dict[str, Any]:
        """Return means over the words."""
        words = self.words
        return {
            "words": words,
            "perplexity": math.exp(min(self.nll / words, 700)) if words else None,
            "right_first_choices": self.right / words if words else None,
            "mass_of_the_likeliest": self.mass / words if words else None,
        }


def _write(
    writer: TargetsWriter,
    modules: Sequence[Any],
    task: Any,
    batch: Any,
    top_k: int,
    temperature: float,
    sampled: int,
) -> Tuple[int, float, float, float]:
    """Write what the models give to a batch; return words and sums for `Seen`."""
    target = batch["target"]
    shape = tuple(target.shape)
    sentences = batch["id"].cpu().numpy()
    features, embeddings = [], []
    with torch.no_grad():
        for module in modules:
            x, embedding = _before_the_words(module, task, batch)
            features.append(x)
            embeddings.append(embedding)
    flat = target.reshape(-1)
    offsets = None
    if sampled:
        places = np.zeros(shape, np.int64)
        places[: len(sentences)] = writer.file.records(sentences, shape[1]).rows
        offsets = torch.from_numpy(_spread(places.reshape(-1))).to(flat.device)
    found = likeliest_words(
        features, embeddings, flat, top_k, temperature, sampled=sampled, offsets=offsets
    )
    real = flat.ne(task.target_dictionary.pad())
    writer.write(
        sentences,
        *(x.view(*shape, top_k)[: len(sentences)] for x in (found.ids, found.probabilities)),
    )
    nll = -found.of_target.clamp(min=1e-38).log()
    likeliest = found.probabilities[:, : top_k - sampled]
    sums = (nll, found.ids[:, 0].eq(flat), likeliest.sum(1))
    return int(real.sum()), *(float(x.masked_fill(~real, 0).double().sum()) for x in sums)  # type: ignore[return-value]


def _spread(places: np.ndarray) -> np.ndarray:
    """Return a number from 0 to 1 for each place in the text, float32, evenly spread over it.

    The fractions of multiples of the golden ratio: whatever process or batch comes to a place, it
    samples the same words there.
    """
    return np.modf(places * ((math.sqrt(5) - 1) / 2))[0].astype(np.float32)


def _before_the_words(module: Any, task: Any, batch: Any) -> Tuple[Tensor, Optional[Tensor]]:
    """Return features and projection of a model, N x d and V x d; or its log-probabilities."""
    try:
        projection = find_output_projection(module, task.target_dictionary)
    except UnsupportedModelError:  # it can be asked for its probabilities all the same
        projection = None
    if projection is not None and projection.features_suffice:
        x = module(**batch["net_input"], features_only=True)[0]
        return x.reshape(-1, x.size(-1)), projection.weight
    lprobs = module.get_normalized_probs(module(**batch["net_input"]), log_probs=True)
    return lprobs.reshape(-1, lprobs.size(-1)), None


def _leave_empty(writer: TargetsWriter, sentences: np.ndarray, top_k: int) -> None:
    for sentence in sentences:
        length = int(writer.file.lengths(np.array([sentence]))[0])
        nothing = torch.zeros(1, length, top_k)
        writer.write(np.array([sentence]), nothing.int(), nothing)
