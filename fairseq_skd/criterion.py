"""The fairseq criterion: label-smoothed cross-entropy with self-knowledge distillation."""

import logging
import math
from dataclasses import dataclass, field, fields
from typing import Any, Dict, List, Optional, Tuple

import numpy as np
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
from fairseq_skd.loss import ends_in_product, reference_loss, self_kd_cross_entropy
from fairseq_skd.neighbors import SIMILARITIES
from fairseq_skd.options import SelfKDOptions, parse_sigma
from fairseq_skd.output_projection import OutputProjection, find_output_projection
from fairseq_skd.schedule import self_kd_weight as weight_at
from fairseq_skd.soft_targets import CANDIDATES, SelfTeacher

__all__ = ["SelfKDCriterion", "SelfKDCriterionConfig", "eligible_words"]

logger = logging.getLogger(__name__)

compatibility.allow_fairseqs_checkpoints()
compatibility.remember_num_updates()


@dataclass
class SelfKDCriterionConfig(LabelSmoothedCrossEntropyCriterionConfig):
    """The command-line options and Hydra fields; `SelfKDOptions` says what is allowed."""

    self_kd_weight: float = field(
        default=SelfKDOptions.weight,
        metadata={"help": "final share of the distillation term in the loss (alpha), 0 to 1"},
    )
    self_kd_start_update: int = field(
        default=SelfKDOptions.start_update,
        metadata={"help": "update up to which nothing is distilled (K)"},
    )
    self_kd_ramp_updates: int = field(
        default=SelfKDOptions.ramp_updates,
        metadata={"help": "updates in which alpha grows from 0 to its final value"},
    )
    self_kd_candidates: ChoiceEnum(CANDIDATES) = field(  # type: ignore[valid-type]
        default=SelfKDOptions.candidates,
        metadata={
            "help": "words that share the target's probability: its nearest neighbors in the "
            "output projection, the model's prediction, or both"
        },
    )
    self_kd_top_k: int = field(
        default=SelfKDOptions.top_k,
        metadata={"help": "number of nearest neighbors (k)"},
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


@register_criterion("self_kd", dataclass=SelfKDCriterionConfig)
@register_criterion("self_kd_label_smoothed_cross_entropy", dataclass=SelfKDCriterionConfig)
class SelfKDCriterion(LabelSmoothedCrossEntropyCriterion):
    """Label-smoothed cross-entropy, of which a growing share is self-distillation.

    In evaluation mode it is exactly `LabelSmoothedCrossEntropyCriterion`. In training it computes
    the same function of the same inputs in closed form while alpha is 0, and the loss of
    `fairseq_skd.loss` after that. It has no parameters and no buffers, so that nothing of it is in
    a checkpoint, and ``--fp16`` cannot round what it keeps.

    A resumed run equals the uninterrupted one bit by bit if the checkpoint was made at an update
    that is a multiple of ``--self-kd-refresh-interval``, or before distillation had begun: then
    both measure the neighbours from the same weights. Otherwise the resumed run measures them
    anew where it resumes, and the other still has its older table.

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

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(
            task, cfg.sentence_avg, cfg.label_smoothing, cfg.ignore_prefix_size, cfg.report_accuracy
        )
        if not 0 <= cfg.label_smoothing <= 1:
            raise ValueError(f"--label-smoothing is {cfg.label_smoothing}; allowed: 0 to 1")
        values = {f.name: getattr(cfg, f"self_kd_{f.name}") for f in fields(SelfKDOptions)}
        for choice in ("candidates", "similarity"):
            values[choice] = str(values[choice])  # fairseq's ChoiceEnum
        self.options = SelfKDOptions(**{**values, "sigma": parse_sigma(values["sigma"])})
        if getattr(task, "target_dictionary", None) is None:
            raise ValueError(f"self_kd needs a target dictionary; {type(task).__name__} has none")
        self._check_top_k(len(eligible_words(task.target_dictionary)))
        self._teacher: Optional[SelfTeacher] = None
        self._table_of: Optional[Tuple[int, int]] = None
        logger.info(self.options.signature())

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
        RuntimeError
            If the output projection is no longer finite, or the update number is not known.
        """
        if not (self.training and model.training):
            return super().forward(model, sample, reduce=reduce)
        weight = self._weight(model)
        projection = self._projection(model)
        net_input = sample["net_input"]
        if reduce and projection.features_suffice and _linear_loss_is_safe(projection.weight):
            net_output = model(**net_input, features_only=True)
            result = self._linear_loss(model, net_output, sample, weight, projection)
        else:
            net_output = model(**net_input)
            projection = self._projection(model)  # weight normalisation has just remade it
            result = self._loss(model, net_output, sample, weight, projection)
            if reduce:
                result = {name: value.sum() for name, value in result.items()}
        loss = result.pop("loss")
        sample_size = sample["target"].size(0) if self.sentence_avg else sample["ntokens"]
        positions = self._targets(model, net_output, sample).ne(self.padding_idx).sum()
        logging_output = {
            "loss": loss.data,
            "ntokens": sample["ntokens"],
            "nsentences": sample["target"].size(0),
            "sample_size": sample_size,
            "self_kd_weight": weight * positions,
            "self_kd_ntokens": positions,
            **result,
        }
        if self.report_accuracy:
            logging_output["total"] = positions
        return loss, sample_size, logging_output

    def _linear_loss(
        self,
        model: Any,
        net_output: Any,
        sample: Dict[str, Any],
        weight: float,
        projection: OutputProjection,
    ) -> Dict[str, Tensor]:
        """Project and compute the loss together; sums."""
        features = net_output[0][:, self.ignore_prefix_size :]
        losses = self_kd_linear_cross_entropy(
            features.reshape(-1, features.size(-1)),
            projection.weight,
            self._targets(model, net_output, sample),
            self._taught(model, weight, projection),
            label_smoothing=self.eps,
            weight=weight,
            ignore_index=self.padding_idx,
            count_correct=self.report_accuracy,
        )
        result = {"loss": losses.loss, "nll_loss": losses.nll_loss}
        if losses.correct is not None:
            result["n_correct"] = losses.correct
        if weight > 0:
            result.update(self_kd_loss=losses.self_kd_loss, self_kd_mass=losses.mass)
        return result

    def _loss(
        self,
        model: Any,
        net_output: Any,
        sample: Dict[str, Any],
        weight: float,
        projection: OutputProjection,
    ) -> Dict[str, Tensor]:
        """Compute the loss from the model's logits, or its log-probabilities; N x 1 each."""
        target = self._targets(model, net_output, sample)
        if projection.plain_softmax:
            scores = net_output[0]
        else:
            scores = model.get_normalized_probs(net_output, log_probs=True)
        scores = scores[:, self.ignore_prefix_size :].reshape(-1, scores.size(-1))
        teacher = self._taught(model, weight, projection)
        prediction = None
        if self.report_accuracy or (teacher is not None and teacher.needs_prediction):
            prediction = scores.argmax(1)
        soft = None
        if teacher is not None:
            soft = teacher.soft_target(target, prediction, projection.weight)
        arguments = (scores, target, soft, self.eps, weight, self.padding_idx)
        if projection.plain_softmax:
            losses = self_kd_cross_entropy(*arguments, overwrite_logits=ends_in_product(scores))
        else:
            losses = reference_loss(*arguments)
        result = {"loss": losses.loss, "nll_loss": losses.nll_loss.detach()}
        kept = target.ne(self.padding_idx)
        if prediction is not None and self.report_accuracy:
            result["n_correct"] = kept & prediction.eq(target)
        if soft is not None:
            result.update(self_kd_loss=losses.self_kd_loss.detach(), self_kd_mass=kept * soft.mass)
        return {name: value.unsqueeze(1) for name, value in result.items()}

    def _targets(self, model: Any, net_output: Any, sample: Dict[str, Any]) -> Tensor:
        target = model.get_targets(sample, net_output)
        return target[:, self.ignore_prefix_size :].reshape(-1)

    def _weight(self, model: Any) -> float:
        options = self.options
        schedule = options.weight, options.start_update, options.ramp_updates
        done = compatibility.num_updates(model)
        if done is None:
            # Without a schedule the number does not matter; with one, guessing it would train
            # another objective than the one that was asked for.
            if weight_at(0, *schedule) != options.weight:
                raise RuntimeError(
                    f"self_kd does not know the update number: {type(self.task).__name__} has "
                    "not called model.set_num_updates(update_num), as fairseq's tasks do at the "
                    "start of train_step. Call it there, or use --self-kd-start-update 0 "
                    "--self-kd-ramp-updates 0"
                )
            done = 0
        return weight_at(done, *schedule)

    def _projection(self, model: Any) -> OutputProjection:
        return find_output_projection(model, len(self.task.target_dictionary))

    def _taught(
        self, model: Any, weight: float, projection: OutputProjection
    ) -> Optional[SelfTeacher]:
        """Return the teacher, with neighbours as fresh as the update number asks for.

        A table belongs to one model and one interval of update numbers, so all workers measure it
        at the same update, and the passes of one update share it.
        """
        if weight == 0:
            return None
        if self._teacher is None:
            self._teacher = self._new_teacher(projection.weight.device)
        done = compatibility.num_updates(model) or 0
        table_of = id(compatibility.unwrap(model)), done // self.options.refresh_interval
        if table_of != self._table_of:
            if self._table_of is None:
                logger.info(
                    f"self_kd: distillation has begun; at update {done} the neighbors of "
                    f"{len(projection.weight)} words are measured for the first time"
                )
            self._teacher.refresh(projection.weight)
            self._table_of = table_of
        return self._teacher

    def _new_teacher(self, device: torch.device) -> SelfTeacher:
        options = self.options
        eligible = eligible_words(self.task.target_dictionary)
        on_target_side = compatibility.target_side_words(self.task)
        if on_target_side is not None:
            eligible = np.intersect1d(eligible, on_target_side)
            self._check_top_k(len(eligible))
        logger.info(
            f"self_kd: {len(eligible)} of {len(self.task.target_dictionary)} words are eligible"
            + (
                " (joined dictionary: those of the target side)"
                if on_target_side is not None
                else ""
            )
        )
        return self.teacher_class(
            candidates=options.candidates,
            top_k=options.top_k,
            similarity=options.similarity,
            sigma=options.sigma,
            sigma_scale=options.sigma_scale,
            max_mass=options.max_mass,
            eligible=torch.from_numpy(eligible).to(device),
        )

    def _check_top_k(self, num_eligible: int) -> None:
        if self.options.top_k >= num_eligible:
            raise ValueError(
                f"--self-kd-top-k is {self.options.top_k}; allowed: 1 to {num_eligible - 1}, since "
                f"{num_eligible} words of the target dictionary can be neighbors (special symbols "
                "and words that never occur in the target language cannot)"
            )

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


def eligible_words(dictionary: Any) -> np.ndarray:
    """Return the ids of a fairseq dictionary that may get probability, ascending, int64.

    All but padding, beginning and end of sentence, unknown, and the ``madeupword`` symbols that
    fairseq-preprocess adds to round the size up.
    """
    special = {dictionary.pad(), dictionary.bos(), dictionary.eos(), dictionary.unk()}
    return np.array(
        [
            i
            for i, symbol in enumerate(dictionary.symbols)
            if i not in special and not symbol.startswith("madeupword")
        ],
        dtype=np.int64,
    )


def _linear_loss_is_safe(weight: Tensor) -> bool:
    """Whether gradients may be computed before the loss scale is known, and in W's own dtype."""
    return weight.dtype != torch.float16 and not torch.is_autocast_enabled()
