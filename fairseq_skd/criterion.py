"""The fairseq criterion: label-smoothed cross-entropy with self-knowledge distillation."""

import atexit
import functools
import logging
import math
from collections import deque
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, Deque, Dict, List, Optional, Sequence, Set, Tuple, Union

import numpy as np
import torch
from fairseq import metrics
from fairseq.criterions import register_criterion
from fairseq.criterions.label_smoothed_cross_entropy import (
    LabelSmoothedCrossEntropyCriterion,
    LabelSmoothedCrossEntropyCriterionConfig,
)
from fairseq.dataclass import ChoiceEnum
from fairseq.tasks.translation import TranslationTask
from torch import Tensor

from fairseq_skd import compatibility
from fairseq_skd.linear_loss import self_kd_linear_cross_entropy
from fairseq_skd.loss import TopWords, ends_in_product, reference_loss, self_kd_cross_entropy
from fairseq_skd.neighbors import SIMILARITIES
from fairseq_skd.options import TEACHERS, SelfKDOptions, parse_number
from fairseq_skd.output_projection import (
    OutputProjection,
    UnsupportedModelError,
    find_output_projection,
)
from fairseq_skd.past import PastPredictions
from fairseq_skd.schedule import UNKNOWN, TrainingLength, derived_schedule
from fairseq_skd.schedule import self_kd_weight as weight_at
from fairseq_skd.self_check import check_linear_loss, check_loss, soft_target_of
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget

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
            "help": "words that share the target's probability: those to which the model gave most "
            "when it last saw the sentence (past), the target's nearest neighbors in the output "
            "projection, the model's prediction, or both of these; auto is past for translation, "
            "and neighbors for other tasks"
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


def options_of(cfg: Any, task: Any) -> SelfKDOptions:
    """Return the options of a criterion's configuration; what an older run lacks is the default.

    Candidates that are ``auto`` are those that have helped in tasks of this kind (docs/results.md):
    the past in translation, the nearest neighbors elsewhere, in language modelling that is.

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
    if values["candidates"] == "auto":
        values["candidates"] = "past" if isinstance(task, TranslationTask) else "neighbors"
    for name, kind, allowed in (
        ("sigma", float, "a positive number"),
        ("start_update", int, "0 or more updates"),
        ("ramp_updates", int, "0 or more updates"),
    ):
        option = f"--self-kd-{name.replace('_', '-')}"
        values[name] = parse_number(option, values[name], kind, allowed)
    values["past_file"] = None if values["past_file"] == "auto" else values["past_file"]
    return SelfKDOptions(**values)


class _Taught:
    """A projection, its teacher, and for which interval of updates that was last refreshed."""

    def __init__(self, owner: Any, teacher: SelfTeacher) -> None:
        self.owner = owner  # kept alive, so that no other one gets its id
        self.teacher = teacher
        self.interval = -1


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

    #: What makes the soft targets; a subclass may have another teacher.
    teacher_class = SelfTeacher
    #: What keeps the past.
    past_class = PastPredictions

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(
            task, cfg.sentence_avg, cfg.label_smoothing, cfg.ignore_prefix_size, cfg.report_accuracy
        )
        if not 0 <= cfg.label_smoothing <= 1:
            raise ValueError(f"--label-smoothing is {cfg.label_smoothing}; allowed: 0 to 1")
        self.options = options_of(cfg, task)
        if getattr(task, "target_dictionary", None) is None:
            raise ValueError(f"self_kd needs a target dictionary; {type(task).__name__} has none")
        if getattr(task, "dicts", None) is None:  # one a language: which, the model will show
            self._check_top_k(len(compatibility.ordinary_words(task.target_dictionary)))
        self._taught: Dict[int, _Taught] = {}
        self._past: Optional[PastPredictions] = None
        self._checked: Set[Tuple[str, bool]] = set()
        self._num_updates: Optional[int] = None
        start, ramp = self.options.start_update, self.options.ramp_updates
        self._schedule = None if start is None or ramp is None else (start, ramp)
        self._sentences: Deque[Optional[np.ndarray]] = deque()
        self._save_dir: Optional[str] = None
        logger.info(self.options.signature())

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
            empty one stands for a dummy batch. For `past` they say which sentences these are
            without waiting for a GPU.
        save_dir : str, optional
            The run's folder.
        length : TrainingLength, optional
            From which a schedule that is `auto` is derived, once.
        """
        self._num_updates = num_updates
        if self._schedule is None:
            self._schedule = self._derive(length)
        self._save_dir = save_dir
        if self.options.candidates == "past":
            self._sentences = deque(
                sample["id"].cpu().numpy() if isinstance(sample, dict) and "id" in sample else None
                for sample in samples
            )

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
        sentences = self._which_sentences(sample)
        alpha = weight = self._weight()
        projection = self._projection(model)
        together = reduce and projection.features_suffice
        net_output = model(**sample["net_input"], **({"features_only": True} if together else {}))
        if not together:
            projection = self._projection(model)  # weight normalisation has just remade it
        target = self._targets(model, net_output, sample)
        source: Union[SoftTarget, SelfTeacher, None]
        if self.options.candidates == "past":
            source = self._past_of(weight, sentences, sample)
            weight = 0.0 if source is None else weight  # a dummy batch, whose gradient is ignored
        else:
            source = self._teacher(weight, projection)
        if together:
            result, top = self._linear_loss(net_output, target, weight, projection, source)
        else:
            result, top = self._loss(model, net_output, target, weight, projection, source)
            if reduce:
                result = {name: value.sum() for name, value in result.items()}
        if top is not None and sentences is not None:
            width = sample["target"].size(1)
            self._past_predictions().write(sentences, width, top, self._updates_done())
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
        """Whether a loss is computed for the first time, or distils for the first time."""
        key = which, weight > 0
        new = key not in self._checked
        self._checked.add(key)
        return new

    def _updates_done(self) -> int:
        return self._num_updates or 0

    def _derive(self, length: Optional[TrainingLength]) -> Tuple[int, int]:
        """Return start and ramp, those that were given and derived ones, and log them."""
        options = self.options
        start, ramp = derived_schedule(options.candidates, length)
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

    def _teacher(self, weight: float, projection: OutputProjection) -> Optional[SelfTeacher]:
        """Return the projection's teacher, with neighbours as fresh as the update number asks for.

        It is made at the first batch, so that settings that cannot work are refused then, and
        refreshed when there is something to teach. A table belongs to a projection and an interval
        of update numbers: all workers measure it at the same update, and the passes of one update
        share it, also those of several models with one projection.
        """
        if self.options.weight == 0:
            return None
        taught = self._taught.get(id(projection.owner))
        if taught is None:
            teacher = self._new_teacher(projection)
            taught = self._taught[id(projection.owner)] = _Taught(projection.owner, teacher)
        if weight == 0:
            return None
        interval = self._updates_done() // self.options.refresh_interval
        if interval != taught.interval:
            if taught.interval < 0:
                logger.info(
                    f"self_kd: distillation has begun; at update {self._updates_done()} the "
                    f"neighbors of {len(projection.weight)} words are measured for the first time"
                )
            taught.teacher.refresh(projection.weight)
            taught.interval = interval
        return taught.teacher

    def _new_teacher(self, projection: OutputProjection) -> SelfTeacher:
        options, dictionary = self.options, projection.dictionary
        eligible, on_target_side = compatibility.eligible_words(dictionary, self.task)
        self._check_top_k(len(eligible))
        side = " (joined dictionary: those of the target side)" if on_target_side else ""
        logger.info(f"self_kd: {len(eligible)} of {len(dictionary)} words are eligible{side}")
        return self.teacher_class(
            candidates=options.candidates,
            top_k=options.top_k,
            similarity=options.similarity,
            sigma=options.sigma,
            sigma_scale=options.sigma_scale,
            max_mass=options.max_mass,
            eligible=torch.from_numpy(eligible).to(projection.weight.device),
        )

    def _check_top_k(self, num_eligible: int) -> None:
        if self.options.top_k >= num_eligible:
            raise ValueError(
                f"--self-kd-top-k is {self.options.top_k}; allowed: 1 to {num_eligible - 1}, since "
                f"{num_eligible} words of the target dictionary can be neighbors (special symbols "
                "and words that never occur in the target language cannot)"
            )

    def _recorded_words(self) -> int:
        """How many words of every position are kept for the next time."""
        records = self.training and self.options.candidates == "past" and self.options.weight > 0
        return self.options.top_k if records else 0

    def _which_sentences(self, sample: Dict[str, Any]) -> Optional[np.ndarray]:
        """Return the indices of a batch's sentences, for `past`; None for a dummy batch.

        Before the model's forward pass, so that one that runs out of memory takes its own along.
        """
        if not self._recorded_words():
            return None
        self._past_predictions()  # of every process at once, also of one with a dummy batch
        if self._sentences:
            return self._sentences.popleft()
        return sample["id"].cpu().numpy()  # waits for the device: a loop of one's own

    def _past_of(
        self, weight: float, sentences: Optional[np.ndarray], sample: Dict[str, Any]
    ) -> Optional[SoftTarget]:
        if weight == 0 or sentences is None:
            return None
        target = sample["target"]
        done = self._updates_done()
        soft = self._past_predictions().read(sentences, target.size(1), done, target.device)
        return self._trust(soft, target[:, self.ignore_prefix_size :].reshape(-1))

    def _trust(self, soft: SoftTarget, target: Tensor) -> SoftTarget:
        """Say how far the past is to be believed at every position."""
        return soft.trusted(target)

    def _past_predictions(self) -> PastPredictions:
        """Open the file at the first batch: only then all processes are there, and the text."""
        if self._past is None:
            path = self.options.past_file
            if path is None and self._save_dir is None:
                raise RuntimeError(
                    "self_kd does not know the folder of the run; pass --self-kd-past-file"
                )
            place = Path(path or Path(self._save_dir or "", "self_kd_past.bin"))
            machine = compatibility.machine()
            if machine.name:
                # A network's file system would not keep the memory of two machines the same.
                place = place.with_name(f"{place.stem}.{machine.name}{place.suffix}")
            opened = functools.partial(
                self.past_class,
                place,
                compatibility.text_layout(self.task),
                self.options.top_k,
                self._updates_done(),
                self.ignore_prefix_size,
                lambda line: logger.info(f"self_kd: {line}"),
                machine.first,
            )
            # None writes before those that guard a file have dropped what is of no use.
            self._past = compatibility.first_alone(machine.first, opened)
            atexit.register(self._past.flush)  # what is still being copied from a GPU
        return self._past

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
