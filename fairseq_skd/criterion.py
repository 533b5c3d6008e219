"""The fairseq criterion: label-smoothed cross-entropy with self-knowledge distillation."""

import logging
import math
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import (
    Any,
    ClassVar,
    Deque,
    Dict,
    List,
    Mapping,
    Optional,
    Sequence,
    Set,
    Tuple,
    Type,
    Union,
)

import torch
from fairseq import metrics
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from torch import Tensor

from fairseq_skd import compatibility
from fairseq_skd.linear_loss import self_kd_linear_cross_entropy
from fairseq_skd.loss import TopWords, ends_in_product, reference_loss, self_kd_cross_entropy
from fairseq_skd.neighbors import SIMILARITIES
from fairseq_skd.options import TEACHERS, SelfKDOptions, parse_number
from fairseq_skd.output_projection import (
    OutputProjection,
    UnsupportedModelError,
    check_inputs,
    find_output_projection,
)
from fairseq_skd.schedule import UNKNOWN, TrainingLength
from fairseq_skd.schedule import self_kd_weight as weight_at
from fairseq_skd.self_check import check_linear_loss, check_loss, soft_target_of
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget
from fairseq_skd.sources import SOURCES, Batch, Host, Source, Text

__all__ = ["SelfKDCriterion", "SelfKDCriterionConfig", "options_of"]

logger = logging.getLogger(__name__)

compatibility.allow_fairseqs_checkpoints()
compatibility.tell_criteria_of_updates()
compatibility.remember_words_from_files()
compatibility.do_without_the_fused_encoder_layer()


@dataclass
class SelfKDCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """The command-line options and Hydra fields; `SelfKDOptions` says what is allowed."""

    self_kd_weight: float = field(
        default=SelfKDOptions.weight,
        metadata={"help": "final share of the distillation term in the loss (alpha), 0 to 1"},
    )
    self_kd_start_update: str = field(
        default="auto",
        metadata={
            "help": "update up to which nothing is distilled (K); auto derives it from the length "
            "of the training"
        },
    )
    self_kd_ramp_updates: str = field(
        default="auto",
        metadata={
            "help": "updates in which alpha grows from 0 to its final value; auto derives it from "
            "the length of the training"
        },
    )
    self_kd_candidates: ChoiceEnum(("auto", *TEACHERS)) = field(  # type: ignore[valid-type]
        default="auto",
        metadata={
            "help": "words that share the target's probability: the target's nearest neighbors in "
            "the output projection (also auto), the model's prediction, or both of these; those to "
            "which the model gave most when it last saw the sentence (past); those of finished "
            "models, from the file of --self-kd-teacher (stored)"
        },
    )
    self_kd_top_k: int = field(
        default=SelfKDOptions.top_k,
        metadata={"help": "number of nearest neighbors, or of words of the past (k)"},
    )
    self_kd_similarity: ChoiceEnum(SIMILARITIES) = field(  # type: ignore[valid-type]
        default=SelfKDOptions.similarity,
        metadata={"help": "distance between words; cosine normalises their vectors first"},
    )
    self_kd_sigma: str = field(
        default="auto",
        metadata={
            "help": "width of the affinity exp(-distance^2/sigma^2): a positive number, or auto "
            "for the mean distance of words to their k nearest neighbors"
        },
    )
    self_kd_sigma_scale: float = field(
        default=SelfKDOptions.sigma_scale,
        metadata={"help": "factor on the automatic sigma"},
    )
    self_kd_max_mass: float = field(
        default=SelfKDOptions.max_mass,
        metadata={"help": "largest probability that a target gives away, 0 to 1"},
    )
    self_kd_refresh_interval: int = field(
        default=SelfKDOptions.refresh_interval,
        metadata={"help": "updates between two measurements of all neighbors"},
    )
    self_kd_past_file: str = field(
        default="auto",
        metadata={
            "help": "where the model's past predictions are kept, 6 k bytes a target token; auto "
            "for self_kd_past.bin in --save-dir; on several machines each adds its name"
        },
    )
    self_kd_teacher: Optional[str] = field(
        default=None,
        metadata={
            "help": "file of stored, written by fairseq-skd teach; with data in shards one for "
            "each, with colons between. It is read and never written"
        },
    )


def options_of(cfg: Any) -> SelfKDOptions:
    """Return the options of a criterion's configuration; what an older run lacks is the default.

    Raises
    ------
    ValueError
        For a value that is not allowed.
    """
    default = SelfKDCriterionConfig()
    values = {}
    for f in fields(SelfKDOptions):
        name = f"self_kd_{f.name}"
        values[f.name] = getattr(cfg, name, getattr(default, name))
    for choice in ("candidates", "similarity"):
        values[choice] = str(values[choice])  # fairseq's ChoiceEnum
    if values["candidates"] == "auto":  # needs no file, and has no exception
        values["candidates"] = "neighbors"
    for name, kind, allowed in (
        ("sigma", float, "a positive number"),
        ("start_update", int, "0 or more updates"),
        ("ramp_updates", int, "0 or more updates"),
    ):
        option = f"--self-kd-{name.replace('_', '-')}"
        values[name] = parse_number(option, values[name], kind, allowed)
    values["past_file"] = None if values["past_file"] == "auto" else values["past_file"]
    return SelfKDOptions(**values)


@register_criterion("self_kd", dataclass=SelfKDCriterionConfig)
@register_criterion("self_kd_label_smoothed_cross_entropy", dataclass=SelfKDCriterionConfig)
class SelfKDCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy, of which a growing share is self-distillation.

    In evaluation mode it is `LabelSmoothedCrossEntropyCriterion`, to float32 rounding, but makes no
    logits of all positions. In training it computes the same function of the same inputs in closed
    form while alpha is 0, and the loss of `fairseq_skd.loss` after that. It has no parameters and
    no buffers, so that nothing of it is in a checkpoint, and ``--fp16`` cannot round what it keeps.

    fairseq's trainer tells it when an update begins (`begin_update`); another training loop has to
    do that itself.

    A resumed run equals the uninterrupted one bit by bit if fairseq resumes with the same batches
    and: with neighbours, if the checkpoint was made at an update that is a multiple of
    ``--self-kd-refresh-interval``, or before distillation had begun, since then both measure the
    neighbours from the same weights; with `past`, if nothing was trained after the checkpoint that
    the run is resumed from (and, on a GPU, the run was not killed: the last batch's record is
    written with the next one, or at the end). A schedule that is `auto` follows ``--max-update``
    and ``--max-epoch``: with others the resumed run has another schedule, and logs it.

    Parameters
    ----------
    cfg : SelfKDCriterionConfig
        The options, or any object with these attributes.
    task : FairseqTask
        With a target dictionary.

    Raises
    ------
    ValueError
        If an option is not allowed.
    """

    #: Where soft targets come from, by the candidates; a subclass may have others.
    sources: ClassVar[Mapping[str, Type[Source]]] = SOURCES

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(
            task, cfg.sentence_avg, cfg.label_smoothing, cfg.ignore_prefix_size, cfg.report_accuracy
        )
        if not 0 <= cfg.label_smoothing <= 1:
            raise ValueError(f"--label-smoothing is {cfg.label_smoothing}; allowed: 0 to 1")
        self.options = options_of(cfg)
        if getattr(task, "target_dictionary", None) is None:
            raise ValueError(f"self_kd needs a target dictionary; {type(task).__name__} has none")
        self.source = self.sources[self.options.candidates](self.options, self._host())
        if getattr(task, "dicts", None) is None:  # one a language: which, the model will show
            self.source.check_words(len(compatibility.ordinary_words(task.target_dictionary)))
        self._checked: Set[Tuple[str, bool]] = set()
        self._num_updates: Optional[int] = None
        start, ramp = self.options.start_update, self.options.ramp_updates
        self._schedule = None if start is None or ramp is None else (start, ramp)
        self._texts: Deque[Optional[Text]] = deque()
        self._save_dir: Optional[str] = None
        logger.info(self.options.signature(self.source.described()))

    def begin_update(
        self,
        num_updates: int,
        samples: Sequence[Any] = (),
        save_dir: Optional[str] = None,
        length: Optional[TrainingLength] = None,
    ) -> None:
        """Take note that an update begins. fairseq's trainer says so, by `compatibility`.

        Parameters
        ----------
        num_updates : int
            Parameter updates done so far: what the schedule follows.
        samples : sequence of dict
            The batches of this update as they are loaded, in the order of the forward passes; an
            empty one stands for a dummy batch. For `past` and `stored` they say which sentences
            these are without waiting for a GPU.
        save_dir : str, optional
            The run's folder.
        length : TrainingLength, optional
            From which a schedule that is `auto` is derived, once.
        """
        self._num_updates = num_updates
        if self._schedule is None:
            self._schedule = self._derive(length)
        self._save_dir = save_dir
        if self._asks_for_text and samples:
            self.source.open(num_updates)
            self._texts = deque(map(self._text_of, samples))
            for text in filter(None, self._texts):
                self.source.expect(text)

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Compute the loss of a batch.

        Returns
        -------
        loss : Tensor
            float32: a sum, or with ``reduce=False`` one value a position (N x 1).
        sample_size : int
            What gradients are divided by: tokens, or sentences with ``--sentence-avg``.
        logging_output : dict
            Sums over positions, without waiting for the device.

        Raises
        ------
        UnsupportedModelError
            At the first batch, whatever the schedule, if the model cannot be trained with it.
        LossCheckError
            At the first batch, and at the first one that distils, if the loss is wrong here.
        RuntimeError
            If the output projection is no longer finite, or the update number is not known.
        """
        if not (self.training and model.training):
            return self._evaluate(model, sample, reduce)
        self.source.open(self._updates_done())
        # Before the model's forward pass: one that runs out of memory takes its own along.
        text = self._next_text(sample)
        alpha = weight = self._weight()
        if self._first("inputs", weight):
            check_inputs(model, sample["net_input"])
        projection = self._projection(model)
        together = reduce and projection.features_suffice
        net_output = model(**sample["net_input"], **({"features_only": True} if together else {}))
        if not together:
            projection = self._projection(model)  # weight normalisation has just remade it
        target = self._targets(model, net_output, sample)
        batch = Batch(
            target,
            sample["target"].size(1),
            text,
            self._updates_done(),
            weight,
            projection.weight,
            projection.dictionary,
            projection.owner,
        )
        source = self.source.targets(batch)
        weight = 0.0 if source is None else weight  # a dummy batch, whose gradient is ignored
        if together:
            result, top = self._linear_loss(net_output, target, weight, projection, source)
        else:
            result, top = self._loss(model, net_output, target, weight, projection, source)
            if reduce:
                result = {name: value.sum() for name, value in result.items()}
        if top is not None:
            self.source.note(batch, top)
        if alpha == 0:
            del result["self_kd_loss"], result["self_kd_mass"]
        positions = target.ne(self.padding_idx).sum()
        result.update(self_kd_weight=alpha * positions, self_kd_ntokens=positions)
        return self._returned(sample, target, result)

    def _evaluate(
        self, model: Any, sample: Dict[str, Any], reduce: bool
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Compute label smoothing, without all logits where the model allows it."""
        try:
            projection = self._projection(model)
        except UnsupportedModelError:  # it can be evaluated all the same
            projection = None
        if not reduce or projection is None or not projection.features_suffice:
            return super().forward(model, sample, reduce=reduce)
        net_output = model(**sample["net_input"], features_only=True)
        target = self._targets(model, net_output, sample)
        result, _ = self._linear_loss(net_output, target, 0.0, projection, None)
        del result["self_kd_loss"], result["self_kd_mass"]
        return self._returned(sample, target, result)

    def _returned(
        self, sample: Dict[str, Any], target: Tensor, result: Dict[str, Tensor]
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Return what fairseq wants of a criterion: loss, sample size and what is logged."""
        loss = result.pop("loss")
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            **result,
        }
        if self.report_accuracy:
            logging_output["total"] = target.ne(self.padding_idx).sum()
        return loss, sample_size, logging_output

    def _linear_loss(
        self,
        net_output: Any,
        target: Tensor,
        weight: float,
        projection: OutputProjection,
        source: Union[SoftTarget, SelfTeacher, None],
    ) -> Tuple[Dict[str, Tensor], Optional[TopWords]]:
        """Project and compute the loss together; sums."""
        features = net_output[0][:, self.ignore_prefix_size :]
        features = features.reshape(-1, features.size(-1))
        if self.training and len(target) and self._first("linear", weight):
            check_linear_loss(
                *(features, projection.weight, target, source, self.eps, weight, self.padding_idx)
            )
        losses = self_kd_linear_cross_entropy(
            features,
            projection.weight,
            target,
            source,
            label_smoothing=self.eps,
            weight=weight,
            ignore_index=self.padding_idx,
            count_correct=self.report_accuracy,
            top_k=self._recorded_words(),
        )
        result = {"loss": losses.loss, "nll_loss": losses.nll_loss}
        # Also of a dummy batch: every worker has to log the same, or they cannot be added up.
        result.update(self_kd_loss=losses.self_kd_loss, self_kd_mass=losses.mass)
        if losses.correct is not None:
            result["n_correct"] = losses.correct
        return result, losses.top

    def _loss(
        self,
        model: Any,
        net_output: Any,
        target: Tensor,
        weight: float,
        projection: OutputProjection,
        source: Union[SoftTarget, SelfTeacher, None],
    ) -> Tuple[Dict[str, Tensor], Optional[TopWords]]:
        """Compute the loss from the model's logits, or its log-probabilities; N x 1 each."""
        if projection.plain_softmax:
            scores = net_output[0]
        else:
            scores = model.get_normalized_probs(net_output, log_probs=True)
        scores = scores[:, self.ignore_prefix_size :].reshape(-1, scores.size(-1))
        if isinstance(source, SelfTeacher):
            source = soft_target_of(source, scores.detach(), target, projection.weight)
        settings = (target, source, self.eps, weight, self.padding_idx)
        if projection.plain_softmax:
            if len(target) and self._first("logits", weight):
                check_loss(scores, *settings)
            losses = self_kd_cross_entropy(
                scores,
                *settings,
                overwrite_logits=ends_in_product(scores),
                top_k=self._recorded_words(),
            )
            top = losses.top
        else:
            losses = reference_loss(scores, *settings)
            top = None
            if self._recorded_words():
                values, ids = scores.detach().topk(self._recorded_words(), 1)
                top = TopWords(ids, values)
        result = {"loss": losses.loss, "nll_loss": losses.nll_loss.detach()}
        if self.report_accuracy:
            result["n_correct"] = target.ne(self.padding_idx) & scores.argmax(1).eq(target)
        result["self_kd_loss"] = losses.self_kd_loss.detach()
        result["self_kd_mass"] = losses.mass.detach()
        return {name: value.unsqueeze(1) for name, value in result.items()}, top

    def _targets(self, model: Any, net_output: Any, sample: Dict[str, Any]) -> Tensor:
        target = model.get_targets(sample, net_output)
        return target[:, self.ignore_prefix_size :].reshape(-1)

    def _first(self, which: str, weight: float) -> bool:
        """Whether something is done for the first time, or for the first time that it distils."""
        key = which, weight > 0
        new = key not in self._checked
        self._checked.add(key)
        return new

    def _updates_done(self) -> int:
        return self._num_updates or 0

    def _derive(self, length: Optional[TrainingLength]) -> Tuple[int, int]:
        """Return start and ramp, those that were given and derived ones, and log them."""
        options = self.options
        start, ramp = self.source.schedule(length, options.start_update)
        start = start if options.start_update is None else options.start_update
        ramp = ramp if options.ramp_updates is None else options.ramp_updates
        source = "no length of the training" if length is None else length.source
        if options.weight:
            logger.info(
                f"self_kd: from {source}: start at update {start}, ramp of {ramp} updates "
                f"(--self-kd-start-update {start} --self-kd-ramp-updates {ramp})"
            )
        return start, ramp

    def _weight(self) -> float:
        options = self.options
        schedule = options.weight, *(self._schedule or UNKNOWN)
        if self._num_updates is None and weight_at(0, *schedule) != options.weight:
            # Without a schedule the number does not matter; with one, guessing it would train
            # another objective than the one that was asked for.
            raise RuntimeError(
                "self_kd does not know the update number, since it is not trained by fairseq's "
                "Trainer: call criterion.begin_update(num_updates) before each update, or use "
                "--self-kd-start-update 0 --self-kd-ramp-updates 0"
            )
        return weight_at(self._updates_done(), *schedule)

    def _projection(self, model: Any) -> OutputProjection:
        return find_output_projection(model, self.task.target_dictionary)

    def _recorded_words(self) -> int:
        """How many words of every position the source takes note of."""
        notes = self.training and self.source.notes and self.options.weight > 0
        return self.options.top_k if notes else 0

    @property
    def _asks_for_text(self) -> bool:
        return self.source.needs_text and self.options.weight > 0

    def _next_text(self, sample: Dict[str, Any]) -> Optional[Text]:
        """Return which sentences a batch has; None for a dummy batch, or if nobody asks."""
        if not self._asks_for_text:
            return None
        if self._texts:
            return self._texts.popleft()
        return self._text_of(sample)  # waits for the device: a loop of one's own

    def _text_of(self, sample: Any) -> Optional[Text]:
        if not isinstance(sample, dict) or "id" not in sample:
            return None
        sentences = sample["id"].cpu().numpy()
        real = sample["target"][: len(sentences)].ne(self.padding_idx)
        # Up to the last one that is no padding: a text may hold the word "<pad>".
        places = torch.arange(1, real.size(1) + 1, device=real.device)
        return Text(sentences, (real * places).amax(1).cpu().numpy())

    def _host(self) -> Host:
        """Return what sources may ask of fairseq."""
        task = self.task
        return Host(
            say=lambda line: logger.info(f"self_kd: {line}"),
            eligible=lambda dictionary: compatibility.eligible_words(dictionary, task),
            data=lambda: compatibility.training_set(task),
            layout=lambda: compatibility.text_layout(task),
            shards=lambda: compatibility.shards(task),
            place=self._place,
            machine=compatibility.machine,
            first_alone=compatibility.first_alone,
            skip=self.ignore_prefix_size,
        )

    def _place(self, name: str) -> Path:
        if self._save_dir is None:
            raise RuntimeError(
                "self_kd does not know the folder of the run; pass --self-kd-past-file"
            )
        return Path(self._save_dir, name)

    @classmethod
    def reduce_metrics(cls, logging_outputs: List[Dict[str, Any]]) -> None:
        """Add up and log what the workers have counted, losses in bits as fairseq does."""
        super().reduce_metrics(logging_outputs)

        def total(key: str) -> Any:
            return sum(log[key] for log in logging_outputs if key in log)

        if not any("self_kd_ntokens" in log for log in logging_outputs):
            return  # evaluation
        ntokens = total("self_kd_ntokens")
        metrics.log_scalar("self_kd_weight", total("self_kd_weight") / ntokens, ntokens, round=4)
        if any("self_kd_loss" in log for log in logging_outputs):
            loss = total("self_kd_loss") / ntokens / math.log(2)
            metrics.log_scalar("self_kd_loss", loss, ntokens, round=3)
            metrics.log_scalar("self_kd_mass", total("self_kd_mass") / ntokens, ntokens, round=4)
