"""What is measured: one training step of a fairseq model under each criterion, and its parts."""

import copy
from typing import Any, Callable, Dict, NamedTuple, Tuple

import torch
from fairseq import options, tasks
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask

from fairseq_skd import SelfTeacher, nearest_neighbors, self_kd_linear_cross_entropy

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
_SELF_KD = ["--self-kd-start-update", "0", "--self-kd-ramp-updates", "0", "--self-kd-weight", "0.5"]
CRITERIA = {
    "label smoothing": ["label_smoothed_cross_entropy", "--label-smoothing", "0.1"],
    "self-KD": ["self_kd", "--label-smoothing", "0.1", *_SELF_KD],
    "self-KD, weight 0": ["self_kd", "--label-smoothing", "0.1", "--self-kd-weight", "0"],
    "cross-entropy": ["cross_entropy"],
    "R-Drop": [
        *("label_smoothed_cross_entropy_with_rdrop", "--label-smoothing", "0.1"),
        *("--rdrop-alpha", "5"),
    ],
}


class Shape(NamedTuple):
    """A model and a batch: ``layers`` in encoder and decoder (a language model has one stack)."""

    words: int
    positions: int
    dim: int
    ffn: int
    layers: int
    language_model: bool = False


SHAPES = {
    "IWSLT, 1+1 layers": Shape(10_152, 3_000, 512, 1_024, 1),
    "WMT, 1+1 layers": Shape(32_768, 2_048, 512, 2_048, 1),
    "LM, 1 layer": Shape(100_000, 768, 256, 1_024, 1, language_model=True),
    "IWSLT, 6+6 layers": Shape(10_152, 3_000, 512, 1_024, 6),
}


def training_steps(shape: Shape) -> Dict[str, Callable[[], object]]:
    """Return a complete training step for each criterion: forward, backward, Adam."""
    dictionary = Dictionary()
    for i in range(shape.words - len(dictionary)):
        dictionary.add_symbol(f"w{i}")
    arguments = _model_arguments(shape)
    sample = _sample(shape)
    steps = {}
    for name, criterion in CRITERIA.items():
        if shape.language_model and name == "R-Drop":
            continue  # fairseq's criterion fails on the batches of a language model
        parser = options.get_training_parser()
        args = options.parse_args_and_arch(parser, ["data", *arguments, "--criterion", *criterion])
        config = convert_namespace_to_omegaconf(args)
        if shape.language_model:
            task: tasks.FairseqTask = LanguageModelingTask(config.task, dictionary, dictionary)
        else:
            task = TranslationTask(config.task, dictionary, dictionary)
        steps[name] = _step(config, task, sample)
    return steps


def _step(config: Any, task: Any, sample: Dict[str, Any]) -> Callable[[], object]:
    torch.manual_seed(1)
    model = task.build_model(config.model).to(DEVICE)
    criterion = task.build_criterion(config.criterion).train()
    adam = torch.optim.Adam(model.parameters(), lr=1e-5)

    class Optimizer:
        def backward(self, loss: torch.Tensor) -> None:
            loss.backward()

    def step() -> None:
        adam.zero_grad(set_to_none=True)  # as fairseq's optimizers do
        # R-Drop writes into the batch that it is given.
        task.train_step(copy.deepcopy(sample), model, criterion, Optimizer(), 1)
        adam.step()

    return step


def _model_arguments(shape: Shape) -> list:
    dims = [
        *("--decoder-embed-dim", shape.dim, "--decoder-ffn-embed-dim", shape.ffn),
        *("--decoder-layers", shape.layers, "--decoder-attention-heads", 4),
        *("--dropout", 0.1, "--share-decoder-input-output-embed"),
    ]
    if shape.language_model:
        dims += ["--task", "language_modeling", "--arch", "transformer_lm"]
        dims += ["--tokens-per-sample", 256]
    else:
        dims += ["--arch", "transformer", "--encoder-embed-dim", shape.dim]
        dims += ["--encoder-ffn-embed-dim", shape.ffn, "--encoder-layers", shape.layers]
        dims += ["--encoder-attention-heads", 4]
    return [str(x) for x in dims]


def _sample(shape: Shape) -> Dict[str, Any]:
    length = 256 if shape.language_model else 25
    rows = shape.positions // length
    tokens = torch.randint(4, shape.words, (3, rows, length), device=DEVICE)
    net_input = {"src_tokens": tokens[0], "src_lengths": torch.full((rows,), length)}
    if not shape.language_model:
        net_input["prev_output_tokens"] = tokens[1]
    return {"net_input": net_input, "target": tokens[2], "ntokens": tokens[2].numel()}


def losses(shape: Shape) -> Dict[str, Callable[[], object]]:
    """Return projection and loss alone, from features to gradients, and what bounds them below."""
    features, embedding, target = _tensors(shape)
    teacher = SelfTeacher()
    teacher.refresh(embedding)

    def label_smoothing() -> None:
        lprobs = torch.log_softmax(features @ embedding.t(), -1, dtype=torch.float32)
        nll = -lprobs.gather(1, target.unsqueeze(1)).sum()
        off = 0.1 / (shape.words - 1)
        ((0.9 - off) * nll - off * lprobs.sum()).backward()
        features.grad = embedding.grad = None

    def self_kd() -> None:
        self_kd_linear_cross_entropy(features, embedding, target, teacher, 0.1, 0.5).loss.backward()
        features.grad = embedding.grad = None

    def products() -> None:
        with torch.no_grad():
            logits = features @ embedding.t()
            logits @ embedding
            logits.t() @ features

    return {"label smoothing": label_smoothing, "self-KD": self_kd, "three products": products}


def refreshes(words: int, dim: int) -> Dict[str, Callable[[], object]]:
    """Return the measurement of all neighbors, and the products that it needs."""
    embedding = torch.randn(words, dim, device=DEVICE)
    rows = 64 * 2**20 // (4 * words)

    def products() -> None:
        block = embedding.new_empty(rows, words)
        for start in range(0, words, rows):
            part = embedding[start : start + rows]
            torch.mm(part, embedding.t(), out=block[: len(part)])

    return {"refresh": lambda: nearest_neighbors(embedding, 10), "products": products}


def _tensors(shape: Shape) -> Tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    torch.manual_seed(1)
    features = torch.randn(shape.positions, shape.dim, device=DEVICE, requires_grad=True)
    embedding = (torch.randn(shape.words, shape.dim, device=DEVICE) * 0.05).requires_grad_()
    return features, embedding, torch.randint(shape.words, (shape.positions,), device=DEVICE)
