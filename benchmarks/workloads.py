"""What is measured: one training step of a fairseq model under each criterion, and its parts."""

import copy
import importlib
import tempfile
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple

import numpy as np
import torch
import torch.nn.functional as F
from fairseq import optim, options, tasks
from fairseq.criterions import CRITERION_REGISTRY
from fairseq.data import Dictionary
from fairseq.dataclass.utils import convert_namespace_to_omegaconf
from fairseq.tasks.language_modeling import LanguageModelingTask
from fairseq.tasks.translation import TranslationTask

from fairseq_skd import (
    PastPredictions,
    SelfTeacher,
    StoredTargets,
    TextLayout,
    nearest_neighbors,
    self_kd_cross_entropy,
    self_kd_linear_cross_entropy,
    write_stored_targets,
)

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
BASELINE = "label smoothing"
PAST = "self-KD, past"
STORED = "self-KD, stored"
_ELIGIBLE = 1_000
_SELF_KD = ["--self-kd-start-update", "0", "--self-kd-ramp-updates", "0", "--self-kd-weight", "0.5"]
CRITERIA = {
    BASELINE: ["label_smoothed_cross_entropy", "--label-smoothing", "0.1"],
    "self-KD": [
        *("self_kd", "--label-smoothing", "0.1", *_SELF_KD, "--self-kd-candidates", "neighbors")
    ],
    PAST: [
        *("self_kd", "--label-smoothing", "0.1", *_SELF_KD, "--self-kd-candidates", "past"),
        *("--self-kd-top-k", "8"),
    ],
    STORED: [
        *("self_kd", "--label-smoothing", "0.1", *_SELF_KD, "--self-kd-candidates", "stored"),
        *("--self-kd-teacher", "made"),
    ],
    "self-KD, weight 0": ["self_kd", "--label-smoothing", "0.1", "--self-kd-weight", "0"],
    "cross-entropy": ["cross_entropy"],
}
_R_DROP = "label_smoothed_cross_entropy_with_rdrop"
if _R_DROP in CRITERION_REGISTRY:  # fairseq 0.12.2 has none
    CRITERIA["R-Drop"] = [_R_DROP, "--label-smoothing", "0.1", "--rdrop-alpha", "5"]


class Shape(NamedTuple):
    """A model and a batch: ``layers`` in encoder and decoder (a language model has one stack)."""

    words: int
    positions: int
    dim: int
    ffn: int
    layers: int
    language_model: bool = False


# As the recipes share them: one table for source, target and output, or for input and output.
SHAPES = {
    "IWSLT, 1+1 layers": Shape(10_152, 3_000, 512, 1_024, 1),
    "WMT, 1+1 layers": Shape(32_768, 2_048, 512, 2_048, 1),
    "LM, 1 layer": Shape(100_000, 768, 256, 1_024, 1, language_model=True),
    "IWSLT, 6+6 layers": Shape(10_152, 3_000, 512, 1_024, 6),
    "WMT, 6+6 layers": Shape(32_768, 2_048, 512, 2_048, 6),
    "WikiText-103 LM, 6 layers": Shape(267_744, 1_024, 512, 2_048, 6, language_model=True),
}
# On a GPU, where small ones measure how fast Python is.
GPU_SHAPES = {
    "IWSLT, 6+6 layers": Shape(10_152, 4_096, 512, 1_024, 6),
    "WMT, 6+6 layers": Shape(32_768, 4_096, 512, 2_048, 6),
    "WikiText-103 LM, 6 layers": Shape(267_744, 2_048, 512, 2_048, 6, language_model=True),
    # Of a language model of today only projection and loss.
    "V = 128,256, d = 4,096": Shape(128_256, 8_192, 4_096, 0, 0, language_model=True),
}
# Of these only the memory of training and validation is measured.
LARGE = {"LM, V = 200,000, N = 2,048": Shape(200_000, 2_048, 256, 1_024, 1, language_model=True)}


class Training:
    """A model, a batch and the criterion of a name.

    Calling it is a training step: forward, backward and Adam. Without ``update`` it ends after the
    backward pass.
    """

    def __init__(
        self,
        shape: Shape,
        name: str,
        update: bool = True,
        dtype: torch.dtype = torch.float32,
    ) -> None:
        dictionary = Dictionary()
        for i in range(len(dictionary), shape.words):
            # Of every word the neighbors among these few are found, which takes seconds where all
            # take minutes. What a step does is the same; a refresh is measured on its own.
            dictionary.add_symbol(f"w{i}", n=1)
            if i >= _ELIGIBLE:
                dictionary.symbols[i], dictionary.count[i] = f"madeupword{i:04d}", 0
        parser = options.get_training_parser()
        arguments = ["data", *_model_arguments(shape), "--criterion", *CRITERIA[name]]
        arguments += ["--optimizer", "adam", "--lr", "1e-5"]
        config = convert_namespace_to_omegaconf(options.parse_args_and_arch(parser, arguments))
        self.task: tasks.FairseqTask
        if shape.language_model:
            self.task = LanguageModelingTask(config.task, dictionary, dictionary)
        else:
            self.task = TranslationTask(config.task, dictionary, dictionary)
        torch.manual_seed(1)
        self.model = self.task.build_model(config.model).to(DEVICE, dtype)
        self.criterion = self.task.build_criterion(config.criterion).to(dtype).train()
        self.optimizer = optim.build_optimizer(config.optimizer, list(self.model.parameters()))
        self.sample = _sample(shape)
        self.update = update
        if name in (PAST, STORED):
            self.folder = tempfile.TemporaryDirectory()  # removed with the training
        if name == PAST:
            layout = TextLayout(np.full(*self.sample["target"].shape), "benchmark")
            self.criterion.source._past = PastPredictions(Path(self.folder.name, "past"), layout, 8)
        if name == STORED:
            path = Path(self.folder.name, "stored")
            sentences, length = self.sample["target"].shape
            top = torch.rand(sentences, length, 8).topk(8, 2)
            ids = torch.randint(shape.words, top.values.shape)
            write_stored_targets(path, zip(ids, top.values / 8))
            self.criterion.source._teacher = StoredTargets(path)

    def __call__(self) -> None:
        self.optimizer.zero_grad()
        if hasattr(self.criterion, "begin_update"):
            self.criterion.begin_update(1, [self.sample])
        # R-Drop writes into the batch that it is given.
        batch = copy.deepcopy(self.sample)
        self.task.train_step(batch, self.model, self.criterion, self.optimizer, 1)
        if self.update:
            self.optimizer.step()

    def validate(self) -> None:
        """Take a validation step."""
        self.task.valid_step(self.sample, self.model, self.criterion.eval())


def criteria(shape: Shape) -> List[str]:
    """Return the names of the criteria that are measured with this model."""
    # With more than IWSLT's words a step of fairseq's R-Drop takes from half a minute up.
    return [name for name in CRITERIA if name != "R-Drop" or shape.words < 20_000]


def _model_arguments(shape: Shape) -> List[str]:
    dims: List[Any] = [
        *("--decoder-embed-dim", shape.dim, "--decoder-ffn-embed-dim", shape.ffn),
        *("--decoder-layers", shape.layers, "--decoder-attention-heads", 4, "--dropout", 0.1),
    ]
    if shape.language_model:
        dims += ["--task", "language_modeling", "--arch", "transformer_lm"]
        dims += ["--tokens-per-sample", 256, "--share-decoder-input-output-embed"]
        # Without these the table stays 512 wide.
        dims += ["--decoder-input-dim", shape.dim, "--decoder-output-dim", shape.dim]
    else:
        dims += ["--arch", "transformer", "--encoder-embed-dim", shape.dim]
        dims += ["--encoder-ffn-embed-dim", shape.ffn, "--encoder-layers", shape.layers]
        dims += ["--encoder-attention-heads", 4, "--share-all-embeddings"]
    return [str(x) for x in dims]


def _sample(shape: Shape) -> Dict[str, Any]:
    length = 256 if shape.language_model else 25
    rows = shape.positions // length
    tokens = torch.randint(4, shape.words, (3, rows, length), device=DEVICE)
    net_input = {"src_tokens": tokens[0], "src_lengths": torch.full((rows,), length)}
    if not shape.language_model:
        net_input["prev_output_tokens"] = tokens[1]
    return {
        **{"id": torch.arange(rows), "net_input": net_input},
        **{"target": tokens[2], "ntokens": tokens[2].numel()},
    }


def losses(shape: Shape, dtype: torch.dtype = torch.float32) -> Dict[str, Callable[[], object]]:
    """Return projection and loss alone, from features to gradients, and what bounds them below."""
    torch.manual_seed(1)
    like = {"device": DEVICE, "dtype": dtype}
    features = torch.randn(shape.positions, shape.dim, **like).requires_grad_()
    embedding = (torch.randn(shape.words, shape.dim, **like) * 0.05).requires_grad_()
    target = torch.randint(shape.words, (shape.positions,), device=DEVICE)
    teacher = SelfTeacher(eligible=torch.arange(_ELIGIBLE))
    teacher.refresh(embedding)

    def label_smoothing() -> torch.Tensor:
        # As fairseq's label_smoothed_nll_loss has it.
        lprobs = torch.log_softmax(features @ embedding.t(), -1, dtype=torch.float32)
        nll = -lprobs.gather(1, target.unsqueeze(1)).sum()
        off = 0.1 / (shape.words - 1)
        return (0.9 - off) * nll - off * lprobs.sum()

    def in_blocks() -> torch.Tensor:
        return self_kd_linear_cross_entropy(features, embedding, target, teacher, 0.1, 0.5).loss

    def plain() -> torch.Tensor:
        return self_kd_linear_cross_entropy(features, embedding, target).loss

    def pytorchs(label_smoothing: float, chunk: int) -> Callable[[], torch.Tensor]:
        # Of its own choice it takes a few positions on a CPU, and many times as long.
        chunked = {"chunking_method": None, "batch_chunk_size": chunk}
        return lambda: F.linear_cross_entropy(
            features,
            embedding,
            target,
            reduction="sum",
            label_smoothing=label_smoothing,
            options=torch.nn.LinearCrossEntropyOptions(**chunked) if chunk else None,
        )

    def from_logits() -> torch.Tensor:
        logits, soft = features @ embedding.t(), teacher.soft_target(target)
        return self_kd_cross_entropy(
            logits, target, soft, 0.1, 0.5, overwrite_logits=True
        ).loss.sum()

    def products() -> None:
        with torch.no_grad():
            logits = features @ embedding.t()
            logits @ embedding
            logits.t() @ features

    def to_gradients(loss: Callable[[], torch.Tensor]) -> Callable[[], object]:
        def run() -> None:
            features.grad = embedding.grad = None
            loss().backward()

        return run

    found = {
        BASELINE: to_gradients(label_smoothing),
        "self-KD": to_gradients(in_blocks),
        "self-KD from logits": to_gradients(from_logits),
        "self-KD, weight 0, no smoothing": to_gradients(plain),
        "three products": products,
    }
    if hasattr(F, "linear_cross_entropy"):  # torch 2.13; with label smoothing it makes all logits
        found["PyTorch's"] = to_gradients(pytorchs(0.1, 0))
        found["PyTorch's, no smoothing"] = to_gradients(pytorchs(0.0, 0))
        found["PyTorch's, chunked, no smoothing"] = to_gradients(pytorchs(0.0, 256))
    if DEVICE.type == "cuda":
        for name, loss in _kernels(features, embedding, target).items():
            found[name] = to_gradients(loss)
    return found


def _kernels(
    features: torch.Tensor, embedding: torch.Tensor, target: torch.Tensor
) -> Dict[str, Callable[[], torch.Tensor]]:
    """Return the losses of packages that need a GPU, those that are installed."""
    found: Dict[str, Callable[[], torch.Tensor]] = {}
    try:
        liger = importlib.import_module("liger_kernel.transformers")
        for smoothing, name in ((0.1, "Liger"), (0.0, "Liger, no smoothing")):
            loss = liger.LigerFusedLinearCrossEntropyLoss(
                reduction="sum", label_smoothing=smoothing
            )
            found[name] = lambda loss=loss: loss(embedding, features, target)
    except ImportError:
        pass
    try:
        cce = importlib.import_module("cut_cross_entropy").linear_cross_entropy
        if features.dtype != torch.float32:
            found["cut-cross-entropy, no smoothing"] = lambda: cce(
                features, embedding, target, reduction="sum"
            )
    except ImportError:
        pass
    return found


def refreshes(words: int, dim: int) -> Dict[str, Callable[[], object]]:
    """Return the measurement of all neighbors, and the products that it needs."""
    embedding = torch.randn(words, dim, device=DEVICE)
    rows = 64 * 2**20 // (4 * words)

    def products() -> None:
        block = embedding.new_empty(rows, words)
        for start in range(0, words, rows):
            part = embedding[start : start + rows]
            torch.mm(part, embedding.t(), out=block[: len(part)])

    return {"products": products, "refresh": lambda: nearest_neighbors(embedding, 10)}
