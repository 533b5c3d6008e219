"""Controls and variants: criteria that differ from ``self_kd`` in the one thing in question.

A user-dir of fairseq's, for experiments and not for users: an arm of ``plan.yaml`` names
it with ``--user-dir`` and one of these criteria with ``--criterion``. Options are those of
``self_kd``.

- ``self_kd_random``: the masses of the nearest neighbours go to words drawn at random.
- ``self_kd_unigram``: the same masses go to words drawn anew for every position, as often as they
  stand in the training text: on average a unigram prior.
- ``self_kd_bigram``: the same, drawn as often as they follow the word before in the training text.
- ``self_kd_uniform``: the same mass goes to all words alike.
- ``self_kd_masked``: ``max_mass`` goes alike to the words that may be neighbours, which with a
  joined dictionary are those of the target side; alone (``--label-smoothing 0 --self-kd-weight 1
  --self-kd-start-update 0 --self-kd-ramp-updates 0``) it is masked label smoothing.
- ``self_kd_other_table``: the neighbours are those of another model's table, and stay the same.
- ``self_kd_frozen``: the neighbours are those before any training.
- ``self_kd_whole_eos``: the end of the sentence gives nothing away.
- ``self_kd_rank``: the mass of a neighbour falls with its rank, whatever its distance.
- ``self_kd_kept``: (1 - alpha m) LS + alpha (sum of q_j (-log p_j)): the target keeps all that is
  not given away, label smoothing included.
- ``self_kd_past_believed``: of ``--self-kd-candidates past``, the past counts everywhere alike, and
  not as far as it gave probability to the true word.
- ``self_kd_past_averaged``: the past is an average over the epochs, in which the last one counts
  0.4, after Laine and Aila, "Temporal Ensembling for Semi-Supervised Learning" (ICLR 2017).
- ``self_kd_past_kept``: what is beyond the k words of the past goes to the label-smoothed target
  instead of all words alike.
- ``self_kd_belief``: the model's own belief in this sentence chooses among the neighbours.
- ``self_kd_doubt``: the mass that a target gives away is in proportion to the model's doubt in it.

``self_kd_masked`` and the last two begin with all logits, so that the loss is not computed in
blocks with the projection. All but ``self_kd_uniform`` and those of the past are for
``--self-kd-candidates neighbors``.
"""

import functools
from dataclasses import dataclass, field
from typing import Any, Callable, ClassVar, Dict, Mapping, Optional, Tuple, Type, Union

import numpy as np
import torch
from fairseq import checkpoint_utils
from fairseq.criterions import register_criterion
from fairseq.data import LanguagePairDataset
from torch import Tensor

from fairseq_skd.criterion import SelfKDCriterion, SelfKDCriterionConfig
from fairseq_skd.loss import TopWords
from fairseq_skd.output_projection import OutputProjection
from fairseq_skd.past import PastPredictions
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget
from fairseq_skd.sources import SOURCES, Batch, NeighborsSource, PastSource, Source


def taught_by(
    teacher: Type[SelfTeacher], ready: Callable[[Any, Batch], None] = lambda teacher, batch: None
) -> Mapping[str, Type[Source]]:
    """Return the sources of a criterion whose neighbours are another teacher's.

    ``ready`` is called with every new one and the batch for which it is made.
    """

    class ControlSource(NeighborsSource):
        teacher_class = teacher

        def new_teacher(self, batch: Batch) -> SelfTeacher:
            made = super().new_teacher(batch)
            self.ready(made, batch)
            return made

    ControlSource.ready = staticmethod(ready)  # type: ignore[attr-defined]
    return {**SOURCES, "neighbors": ControlSource}


class RandomTeacher(SelfTeacher):
    """Words drawn at random, with replacement, get the masses of the nearest ones.

    The criterion sets `seed`: a word keeps its neighbours at every refresh and after a resume.
    """

    seed: int

    def refresh(self, embedding: Tensor) -> None:
        """Measure the neighbours, then put random eligible words in their places."""
        super().refresh(embedding)
        assert self._table is not None
        ids, weights, _ = self._table
        words = torch.arange(len(embedding)) if self.eligible is None else self.eligible.cpu()
        generator = torch.Generator().manual_seed(self.seed)
        # Never the word itself: where it is drawn, the next one is taken.
        drawn = torch.randint(len(words), ids[:, 1:].shape, generator=generator)
        own = words[drawn] == ids[:, :1].cpu()
        drawn = words[(drawn + own.long()) % len(words)]
        self._table = SoftTarget(torch.cat([ids[:, :1], drawn.to(ids.device)], 1), weights)


class UnigramTeacher(SelfTeacher):
    """Words drawn anew for every position, by their `counts` (V), share the mass of neighbours.

    On average the target is mixed with the unigram distribution of the training text, as much as
    `SelfTeacher` gives to the neighbours.
    """

    counts: Tensor

    def soft_target(
        self,
        target: Tensor,
        prediction: Optional[Tensor] = None,
        embedding: Optional[Tensor] = None,
    ) -> SoftTarget:
        """Return the target, and k words that are drawn with replacement; each gets m / k."""
        soft = super().soft_target(target, prediction, embedding)
        size = len(target), soft.ids.size(1) - 1
        drawn = torch.multinomial(self.counts, size[0] * size[1], replacement=True)
        return shared_by(drawn.view(size), soft)


def shared_by(words: Tensor, soft: SoftTarget) -> SoftTarget:
    """Let k other words a position, N x k, share the mass of the neighbours alike."""
    own, others = soft.weights[:, :1], soft.weights[:, 1:]
    shares = others.mean(1, keepdim=True).expand_as(others)
    return SoftTarget(torch.cat([soft.ids[:, :1], words], 1), torch.cat([own, shares], 1))


class MaskedTeacher(SelfTeacher):
    """All eligible words share ``max_mass`` alike, whatever the target."""

    def soft_target(
        self,
        target: Tensor,
        prediction: Optional[Tensor] = None,
        embedding: Optional[Tensor] = None,
    ) -> SoftTarget:
        """Return the target and all M eligible words, N x (1 + M): 12 bytes a word and position."""
        words = self.eligible
        assert words is not None
        ids = torch.cat([target.unsqueeze(1), words.expand(len(target), -1)], 1)
        weights = torch.full(ids.shape, self.max_mass / len(words), device=ids.device)
        weights[:, 0] = 1 - self.max_mass
        return SoftTarget(ids, weights)


class RankTeacher(SelfTeacher):
    """Masses proportional to 1 / rank: each half, a third, ... of the nearest one's."""

    def refresh(self, embedding: Tensor) -> None:
        """Measure the neighbours, then share each word's mass by rank."""
        super().refresh(embedding)
        assert self._table is not None
        ids, weights, _ = self._table
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


class KeptTeacher(SelfTeacher):
    """Gives the candidates alone; the positions' shares of alpha are the masses."""

    def soft_target(
        self,
        target: Tensor,
        prediction: Optional[Tensor] = None,
        embedding: Optional[Tensor] = None,
    ) -> SoftTarget:
        """Return the candidates, with weights that sum to 1."""
        ids, weights, _ = super().soft_target(target, prediction, embedding)
        return kept(SoftTarget(ids[:, 1:], weights[:, 1:]))


def kept(soft: SoftTarget) -> SoftTarget:
    """Let what a soft target leaves go to the label-smoothed target."""
    mass = soft.weights.sum(1)
    share = mass if soft.share is None else mass * soft.share
    return SoftTarget(soft.ids, soft.weights / mass.clamp(min=1e-12).unsqueeze(1), share)


class AveragedPast(PastPredictions):
    """What is recorded is an average over the epochs: a new prediction enters with `NEWEST`.

    An update that is computed again after an overflow (fp16) begins its sentences' average anew.
    """

    NEWEST = 0.4

    def write(self, sentences: np.ndarray, width: int, top: TopWords, num_updates: int) -> None:
        """Record the average of what was recorded and of what the model gives now."""
        past = self.read(sentences, width, num_updates, top.ids.device)
        super().write(sentences, width, averaged(past, top, self.NEWEST), num_updates)


def averaged(past: SoftTarget, now: TopWords, newest: float) -> TopWords:
    """Average what was recorded of every position with what the model gives now; N x k.

    Of the up to 2k words the k likeliest are kept. A word that is not among the k of one of the two
    counts as 0 there. What was not recorded yet (``share`` 0) does not count.
    """
    assert past.share is not None
    weight = torch.where(past.share > 0, newest, 1.0).unsqueeze(1)
    before = (1 - weight) * past.weights
    same = now.ids.unsqueeze(2) == past.ids.unsqueeze(1)
    both = weight * now.lprobs.exp() + (same * before.unsqueeze(1)).sum(2)
    alone = before.masked_fill(same.any(1), 0)
    values, places = torch.cat([both, alone], 1).topk(now.ids.size(1), 1)
    return TopWords(torch.cat([now.ids, past.ids], 1).gather(1, places), values.log())


class LogitsTeacher(SelfTeacher):
    """A teacher that is shown the logits of the batch, as `scores`, N x V."""

    scores: Tensor


class BeliefTeacher(LogitsTeacher):
    """The mass of a neighbour is multiplied by its probability, and the total kept."""

    def soft_target(
        self,
        target: Tensor,
        prediction: Optional[Tensor] = None,
        embedding: Optional[Tensor] = None,
    ) -> SoftTarget:
        """Return m softmax(log q_j + z_j) over the candidates j: q_j p_j, made to sum to m."""
        ids, weights, _ = super().soft_target(target, prediction, embedding)
        mass = weights[:, 1:].sum(1, keepdim=True)
        belief = self.scores.gather(1, ids[:, 1:]).float()
        shares = torch.softmax(weights[:, 1:].log() + belief, 1)
        return SoftTarget(ids, torch.cat([1 - mass, mass * shares], 1))


class DoubtTeacher(LogitsTeacher):
    """The mass of every neighbour is multiplied by 1 - p of the target."""

    def soft_target(
        self,
        target: Tensor,
        prediction: Optional[Tensor] = None,
        embedding: Optional[Tensor] = None,
    ) -> SoftTarget:
        """Return (1 - p_t) q_j for the candidates j, and the rest for the target."""
        ids, weights, _ = super().soft_target(target, prediction, embedding)
        probability = torch.softmax(self.scores.float(), 1).gather(1, ids[:, :1])
        shares = weights[:, 1:] * (1 - probability)
        return SoftTarget(ids, torch.cat([1 - shares.sum(1, keepdim=True), shares], 1))


class LogitsCriterion(SelfKDCriterion):
    """Computes the loss from logits, and shows them to the teacher first."""

    def _projection(self, model: Any) -> OutputProjection:
        return super()._projection(model)._replace(features_suffice=False)

    def _loss(
        self,
        model: Any,
        net_output: Any,
        target: Tensor,
        weight: float,
        projection: OutputProjection,
        source: Union[SoftTarget, SelfTeacher, None],
    ) -> Tuple[Dict[str, Tensor], Optional[TopWords]]:
        if isinstance(source, LogitsTeacher):
            logits = net_output[0][:, self.ignore_prefix_size :].detach()
            source.scores = logits.reshape(-1, logits.size(-1))
        return super()._loss(model, net_output, target, weight, projection, source)


@register_criterion("self_kd_belief", dataclass=SelfKDCriterionConfig)
class BeliefCriterion(LogitsCriterion):
    """The model's own belief in this sentence chooses among the neighbours."""

    sources = taught_by(BeliefTeacher)


@register_criterion("self_kd_doubt", dataclass=SelfKDCriterionConfig)
class DoubtCriterion(LogitsCriterion):
    """The mass that a target gives away is in proportion to the model's doubt in it."""

    sources = taught_by(DoubtTeacher)


@register_criterion("self_kd_kept", dataclass=SelfKDCriterionConfig)
class KeptCriterion(SelfKDCriterion):
    """The target keeps all that is not given away, label smoothing included."""

    sources = taught_by(KeptTeacher)


@register_criterion("self_kd_past_kept", dataclass=SelfKDCriterionConfig)
class PastKeptCriterion(SelfKDCriterion):
    """What the words of the past leave goes to the label-smoothed target."""

    class _Kept(PastSource):
        def trust(self, soft: SoftTarget, target: Tensor) -> SoftTarget:
            return kept(super().trust(soft, target))

    sources: ClassVar[Mapping[str, Type[Source]]] = {**SOURCES, "past": _Kept}


@register_criterion("self_kd_past_averaged", dataclass=SelfKDCriterionConfig)
class PastAveragedCriterion(SelfKDCriterion):
    """The past is an average over the epochs."""

    class _Averaged(PastSource):
        past_class = AveragedPast

    sources: ClassVar[Mapping[str, Type[Source]]] = {**SOURCES, "past": _Averaged}


@register_criterion("self_kd_past_believed", dataclass=SelfKDCriterionConfig)
class PastBelievedCriterion(SelfKDCriterion):
    """The past counts everywhere alike, however wrong it was."""

    class _Believed(PastSource):
        def trust(self, soft: SoftTarget, target: Tensor) -> SoftTarget:
            return soft

    sources: ClassVar[Mapping[str, Type[Source]]] = {**SOURCES, "past": _Believed}


@dataclass
class RandomConfig(SelfKDCriterionConfig):
    """Options of ``self_kd`` and one more."""

    self_kd_random_seed: int = field(default=1, metadata={"help": "of the random neighbours"})


@register_criterion("self_kd_random", dataclass=RandomConfig)
class RandomCriterion(SelfKDCriterion):
    """The masses of the nearest neighbours go to words drawn at random."""

    def __init__(self, cfg: Any, task: Any) -> None:
        def seed(teacher: Any, batch: Batch) -> None:
            teacher.seed = cfg.self_kd_random_seed

        self.sources = taught_by(RandomTeacher, seed)  # type: ignore[misc]
        super().__init__(cfg, task)


@register_criterion("self_kd_unigram", dataclass=SelfKDCriterionConfig)
class UnigramCriterion(SelfKDCriterion):
    """The masses go to words as often as they stand in the training text."""

    @staticmethod
    def _count(teacher: Any, batch: Batch) -> None:
        device = batch.target.device
        counts = torch.tensor(batch.dictionary.count, dtype=torch.float, device=device)
        # Those that may be a neighbour: no padding, no word that fairseq has added.
        teacher.counts = torch.zeros_like(counts)
        teacher.counts[teacher.eligible] = counts[teacher.eligible]

    sources = taught_by(UnigramTeacher, _count.__func__)  # type: ignore[attr-defined]


@register_criterion("self_kd_bigram", dataclass=SelfKDCriterionConfig)
class BigramCriterion(SelfKDCriterion):
    """The masses go to words as often as they follow the word before in the training text."""

    _before: Tensor

    @functools.cached_property
    def _followers(self) -> Tuple[Tensor, Tensor, Tensor]:
        """All words in the order of those before them; of each word, where its own begin; how many.

        The words before are those that the decoder is given.
        """
        text = self.task.dataset("train")
        dictionary = self.task.target_dictionary
        before, after = [], []
        for index in range(len(text)):
            example = text[index]
            after.append(example["target"])
            if isinstance(text, LanguagePairDataset):  # its decoder is given the end first
                before.append(example["target"].roll(1))
            else:
                before.append(example["source"])
        words = torch.cat(before)
        counts = torch.bincount(words, minlength=len(dictionary))
        return torch.cat(after)[words.argsort()], counts.cumsum(0) - counts, counts

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Look at what the decoder is given, and compute the loss."""
        given = sample["net_input"]
        before = given["prev_output_tokens" if "prev_output_tokens" in given else "src_tokens"]
        self._before = before[:, self.ignore_prefix_size :].reshape(-1)
        return super().forward(model, sample, reduce)

    def _linear_loss(
        self,
        net_output: Any,
        target: Tensor,
        weight: float,
        projection: OutputProjection,
        source: Union[SoftTarget, SelfTeacher, None],
    ) -> Tuple[Dict[str, Tensor], Optional[TopWords]]:
        source = self._drawn(source, target)
        return super()._linear_loss(net_output, target, weight, projection, source)

    def _loss(
        self,
        model: Any,
        net_output: Any,
        target: Tensor,
        weight: float,
        projection: OutputProjection,
        source: Union[SoftTarget, SelfTeacher, None],
    ) -> Tuple[Dict[str, Tensor], Optional[TopWords]]:
        source = self._drawn(source, target)
        return super()._loss(model, net_output, target, weight, projection, source)

    def _drawn(
        self, source: Union[SoftTarget, SelfTeacher, None], target: Tensor
    ) -> Union[SoftTarget, SelfTeacher, None]:
        if not isinstance(source, SelfTeacher):
            return source
        soft = source.soft_target(target)
        followers, first, counts = (x.to(target.device) for x in self._followers)
        size = len(target), soft.ids.size(1) - 1
        place = (torch.rand(size, device=target.device) * counts[self._before, None]).long()
        # Padding is before no word; what it gets here is left out of the loss.
        place = (first[self._before, None] + place).clamp(max=len(followers) - 1)
        return shared_by(followers[place], soft)


@register_criterion("self_kd_masked", dataclass=SelfKDCriterionConfig)
class MaskedCriterion(LogitsCriterion):
    """The words of the target side share the mass alike."""

    sources = taught_by(MaskedTeacher)


@register_criterion("self_kd_rank", dataclass=SelfKDCriterionConfig)
class RankCriterion(SelfKDCriterion):
    """The mass of a neighbour falls with its rank, whatever its distance."""

    sources = taught_by(RankTeacher)


@register_criterion("self_kd_whole_eos", dataclass=SelfKDCriterionConfig)
class WholeEosCriterion(SelfKDCriterion):
    """The end of the sentence gives nothing away."""

    @staticmethod
    def _whole(teacher: Any, batch: Batch) -> None:
        teacher.whole = batch.dictionary.eos()

    sources = taught_by(WholeWordTeacher, _whole.__func__)  # type: ignore[attr-defined]


@dataclass
class OtherTableConfig(SelfKDCriterionConfig):
    """Options of ``self_kd`` and one more."""

    self_kd_table_of: Optional[str] = field(
        default=None, metadata={"help": "checkpoint of a model with the same target dictionary"}
    )


@register_criterion("self_kd_other_table", dataclass=OtherTableConfig)
class OtherTableCriterion(SelfKDCriterion):
    """The neighbours are those of another model's table, from the first to the last update."""

    def __init__(self, cfg: Any, task: Any) -> None:
        if not cfg.self_kd_table_of:
            raise ValueError("--self-kd-table-of is missing: the checkpoint with the other table")
        state = checkpoint_utils.load_checkpoint_to_cpu(cfg.self_kd_table_of)["model"]
        other = state["decoder.output_projection.weight"]
        if len(other) != len(task.target_dictionary):
            raise ValueError(
                f"--self-kd-table-of is {cfg.self_kd_table_of}, which has {len(other)} "
                f"words; the target dictionary has {len(task.target_dictionary)}"
            )

        def read(teacher: Any, batch: Batch) -> None:
            teacher.other = other

        self.sources = taught_by(OtherTableTeacher, read)  # type: ignore[misc]
        super().__init__(cfg, task)


@register_criterion("self_kd_frozen", dataclass=SelfKDCriterionConfig)
class FrozenCriterion(SelfKDCriterion):
    """The neighbours are those of the first weights, before any training, and stay the same."""

    _table_before: Optional[Tensor] = None

    def __init__(self, cfg: Any, task: Any) -> None:
        def read(teacher: Any, batch: Batch) -> None:
            teacher.other = self._first_weights()

        self.sources = taught_by(OtherTableTeacher, read)  # type: ignore[misc]
        super().__init__(cfg, task)

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Keep the first weights, and compute the loss."""
        if self.training and model.training:
            if self._updates_done() == 0 and self._table_before is None:
                self._table_before = self._projection(model).weight.detach().clone()
            self._first_weights()  # is there, long before distillation begins
        return super().forward(model, sample, reduce)

    def _first_weights(self) -> Tensor:
        if self._table_before is None:
            raise RuntimeError(
                "self_kd_frozen knows the first weights only in the process that began the "
                "training: to train, remove its folder and begin again"
            )
        return self._table_before


@register_criterion("self_kd_uniform", dataclass=SelfKDCriterionConfig)
class UniformCriterion(SelfKDCriterion):
    """The same mass goes to all words alike.

    A soft target that gives ``max_mass`` to all other words alike is label smoothing with an
    epsilon of ``max_mass``, and a mixture of two label smoothings is one with the mixed epsilon. So
    this is label smoothing whose epsilon grows with the schedule of alpha. The mass of ``self_kd``
    is ``max_mass`` wherever the affinities add up to more, as they do with the automatic sigma and
    a scale of 1; a control of another setting needs a ``max_mass`` of what that gives on average.
    """

    def __init__(self, cfg: Any, task: Any) -> None:
        super().__init__(cfg, task)
        self._smoothing = self.eps

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Compute the loss with the epsilon of this update."""
        alpha = SelfKDCriterion._weight(self) if self.training and model.training else 0.0
        self.eps = (1 - alpha) * self._smoothing + alpha * self.options.max_mass
        return super().forward(model, sample, reduce)

    def _weight(self) -> float:
        return 0.0
