"""Controls: criteria that differ from ``self_kd`` in the one thing whose effect is in question.

A user-dir of fairseq's, for experiments and not for users: an arm of ``experiments.yaml`` names
it with ``--user-dir`` and one of these criteria with ``--criterion``. Options are those of
``self_kd``.

- ``self_kd_random``: the masses of the nearest neighbours go to words drawn at random.
- ``self_kd_uniform``: the same mass goes to all words alike.
- ``self_kd_other_table``: the neighbours are those of another model's table, and stay the same.
- ``self_kd_whole_eos``: the end of the sentence gives nothing away.
- ``self_kd_rank``: the mass of a neighbour falls with its rank, whatever its distance.

All but ``self_kd_uniform`` are for ``--self-kd-candidates neighbors``.
"""

from dataclasses import dataclass, field
from typing import Any, Dict, Optional, Tuple

import torch
from fairseq import checkpoint_utils
from fairseq.criterions import register_criterion
from torch import Tensor

from fairseq_skd.criterion import SelfKDCriterion, SelfKDCriterionConfig
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget

# Fixed, so that a word keeps its random neighbours at every refresh and after a resume.
SEED = 1


class RandomTeacher(SelfTeacher):
    """Words drawn at random, with replacement, get the masses of the nearest ones."""

    def refresh(self, embedding: Tensor) -> None:
        """Measure the neighbours, then put random eligible words in their places."""
        super().refresh(embedding)
        assert self._table is not None
        ids, weights = self._table
        words = torch.arange(len(embedding)) if self.eligible is None else self.eligible.cpu()
        generator = torch.Generator().manual_seed(SEED)
        # Never the word itself: where it is drawn, the next one is taken.
        drawn = torch.randint(len(words), ids[:, 1:].shape, generator=generator)
        own = words[drawn] == ids[:, :1].cpu()
        drawn = words[(drawn + own.long()) % len(words)]
        self._table = SoftTarget(torch.cat([ids[:, :1], drawn.to(ids.device)], 1), weights)


class RankTeacher(SelfTeacher):
    """Masses proportional to 1 / rank: each half, a third, ... of the nearest one's."""

    def refresh(self, embedding: Tensor) -> None:
        """Measure the neighbours, then share each word's mass by rank."""
        super().refresh(embedding)
        assert self._table is not None
        ids, weights = self._table
        shares = 1 / torch.arange(1, ids.size(1), device=ids.device)
        masses = weights[:, 1:].sum(1, keepdim=True) * (shares / shares.sum())
        self._table = SoftTarget(ids, torch.cat([weights[:, :1], masses], 1))


class WholeWordTeacher(SelfTeacher):
    """One word, which the criterion sets as `whole`, gives nothing away."""

    whole: int

    def refresh(self, embedding: Tensor) -> None:
        """Measure the neighbours, then give that word its whole probability back."""
        super().refresh(embedding)
        assert self._table is not None
        self._table.weights[self.whole] = 0
        self._table.weights[self.whole, 0] = 1


class OtherTableTeacher(SelfTeacher):
    """The neighbours in a table that the criterion sets as `other`."""

    other: Tensor

    def refresh(self, embedding: Tensor) -> None:
        """Measure the neighbours in the other table."""
        super().refresh(self.other.to(embedding.device))


@register_criterion("self_kd_random", dataclass=SelfKDCriterionConfig)
class RandomCriterion(SelfKDCriterion):
    """The masses of the nearest neighbours go to words drawn at random."""

    teacher_class = RandomTeacher


@register_criterion("self_kd_rank", dataclass=SelfKDCriterionConfig)
class RankCriterion(SelfKDCriterion):
    """The mass of a neighbour falls with its rank, whatever its distance."""

    teacher_class = RankTeacher


@register_criterion("self_kd_whole_eos", dataclass=SelfKDCriterionConfig)
class WholeEosCriterion(SelfKDCriterion):
    """The end of the sentence gives nothing away."""

    teacher_class = WholeWordTeacher

    def _new_teacher(self, device: torch.device) -> SelfTeacher:
        teacher = super()._new_teacher(device)
        teacher.whole = self.task.target_dictionary.eos()
        return teacher


@dataclass
class OtherTableConfig(SelfKDCriterionConfig):
    """Options of ``self_kd`` and one more."""

    self_kd_table_of: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of a model with the same target dictionary"}
    )


@register_criterion("self_kd_other_table", dataclass=OtherTableConfig)
class OtherTableCriterion(SelfKDCriterion):
    """The neighbours are those of another model's table, from the first to the last update."""

    teacher_class = OtherTableTeacher

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(cfg, task)
        if not cfg.self_kd_table_of:
            raise ValueError("--self-kd-table-of is missing: the checkpoint with the other table")
        state = checkpoint_utils.load_checkpoint_to_cpu(cfg.self_kd_table_of)["model"]
        self._other = state["decoder.output_projection.weight"]
        if len(self._other) != len(task.target_dictionary):
            raise ValueError(
                f"--self-kd-table-of is {cfg.self_kd_table_of}, which has {len(self._other)} "
                f"words; the target dictionary has {len(task.target_dictionary)}"
            )

    def _new_teacher(self, device: torch.device) -> SelfTeacher:
        teacher = super()._new_teacher(device)
        teacher.other = self._other
        return teacher


@register_criterion("self_kd_uniform", dataclass=SelfKDCriterionConfig)
class UniformCriterion(SelfKDCriterion):
    """The same mass goes to all words alike.

    A soft target that gives ``max_mass`` to all other words alike is label smoothing with an
    epsilon of ``max_mass``, and a mixture of two label smoothings is one with the mixed epsilon. So
    this is label smoothing whose epsilon grows with the schedule of alpha. The mass of ``self_kd``
    is its cap wherever the affinities add up to more, as they do with the automatic sigma.
    """

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(cfg, task)
        self._smoothing = self.eps

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Compute the loss with the epsilon of this update."""
        alpha = SelfKDCriterion._weight(self, model) if self.training and model.training else 0.0
        self.eps = (1 - alpha) * self._smoothing + alpha * self.options.max_mass
        return super().forward(model, sample, reduce)

    def _weight(self, model: Any) -> float:
        return 0.0
