"""Controls: criteria that differ from ``self_kd`` in the one thing in question.

A user-dir of fairseq's, for experiments and not for users: an arm of ``plan.yaml`` names it with
``--user-dir`` and one of these criteria with ``--criterion``. Options are those of ``self_kd``.

Of ``--self-kd-candidates neighbors``, other words get the masses of the nearest ones:

- ``self_kd_random``: words drawn at random, the same ones for a word in the whole training.
- ``self_kd_unigram``: words drawn anew for every position, as often as they stand in the training
  text: on average a unigram prior.
- ``self_kd_bigram``: the same, drawn as often as they follow the word before in the training text.

Of ``--self-kd-candidates stored``:

- ``self_kd_scaled``: what the k words leave goes to themselves, and not to all words alike.
- ``self_kd_trusted``: the teacher is believed as far as it gives to the target, as `past` is.
"""

from typing import Any, ClassVar, Dict, Mapping, Optional, Tuple, Type

import torch
from fairseq.criterions import register_criterion
from fairseq.data import LanguagePairDataset
from torch import Tensor

from fairseq_skd.criterion import SelfKDCriterion, SelfKDCriterionConfig
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget
from fairseq_skd.sources import SOURCES, Batch, NeighborsSource, Source, StoredSource, Text

_SEED = 1  # of the random words


class DrawnSource(NeighborsSource):
    """Other words share the mass of the neighbours."""

    def targets(self, batch: Batch) -> Optional[SoftTarget]:  # type: ignore[override]
        """Return the target with what it keeps, and k words that share what it gives away."""
        teacher = super().targets(batch)
        if teacher is None:
            return None
        soft = teacher.soft_target(batch.target)
        shape = len(soft.ids), soft.ids.size(1) - 1
        return self.shared(soft, self.drawn(batch, teacher, shape))

    def shared(self, soft: SoftTarget, words: Tensor) -> SoftTarget:
        """Give the words, N x k, the same share each of what the neighbours have together."""
        own, others = soft.weights[:, :1], soft.weights[:, 1:]
        shares = others.mean(1, keepdim=True).expand_as(others)
        return SoftTarget(torch.cat([soft.ids[:, :1], words], 1), torch.cat([own, shares], 1))

    def drawn(self, batch: Batch, teacher: SelfTeacher, shape: Tuple[int, int]) -> Tensor:
        """Return ids, int64, of the shape."""
        raise NotImplementedError


class RandomSource(DrawnSource):
    """A word has the same random words in the whole training, and the masses of its nearest."""

    def shared(self, soft: SoftTarget, words: Tensor) -> SoftTarget:
        """Give each word the mass of a neighbour."""
        return SoftTarget(torch.cat([soft.ids[:, :1], words], 1), soft.weights)

    def drawn(self, batch: Batch, teacher: SelfTeacher, shape: Tuple[int, int]) -> Tensor:
        """Return eligible words; where a word itself is drawn, the next one is taken."""
        assert teacher.eligible is not None
        words = teacher.eligible.cpu()
        generator = torch.Generator().manual_seed(_SEED)
        size = len(batch.weight_matrix), shape[1]
        drawn = torch.randint(len(words), size, generator=generator)
        own = words[drawn] == torch.arange(size[0]).unsqueeze(1)
        table = words[(drawn + own.long()) % len(words)]
        return table.to(batch.target.device)[batch.target]


class UnigramSource(DrawnSource):
    """Words as often as they stand in the training text."""

    def drawn(self, batch: Batch, teacher: SelfTeacher, shape: Tuple[int, int]) -> Tensor:
        """Draw eligible words by their counts, with replacement."""
        counts = torch.tensor(batch.dictionary.count, dtype=torch.float, device=batch.target.device)
        eligible = torch.zeros_like(counts)
        eligible[teacher.eligible] = counts[teacher.eligible]
        return torch.multinomial(eligible, shape[0] * shape[1], replacement=True).view(shape)


class BigramSource(DrawnSource):
    """Words as often as they follow the word before in the training text."""

    _followers: Optional[Tuple[Tensor, Tensor, Tensor]] = None

    def open(self, num_updates: int) -> None:
        """Read the text once: all words in the order of those before them; where each begins."""
        if self._followers is not None:
            return
        text = self.host.data()
        before, after = [], []
        for index in range(len(text)):
            example = text[index]
            after.append(example["target"])
            # The words that the decoder is given: of a pair the end comes first.
            pairs = isinstance(text, LanguagePairDataset)
            before.append(example["target"].roll(1) if pairs else example["source"])
        words = torch.cat(before)
        counts = torch.bincount(words, minlength=int(words.max()) + 1)
        self._followers = torch.cat(after)[words.argsort()], counts.cumsum(0) - counts, counts

    def drawn(self, batch: Batch, teacher: SelfTeacher, shape: Tuple[int, int]) -> Tensor:
        """Draw what follows the word before each target, which is one of these."""
        assert self._followers is not None
        followers, first, counts = (x.to(batch.target.device) for x in self._followers)
        before = self.before.clamp(max=len(counts) - 1)
        place = (torch.rand(shape, device=before.device) * counts[before, None]).long()
        # Padding is before no word; what it gets here is left out of the loss.
        return followers[(first[before, None] + place).clamp(max=len(followers) - 1)]

    before: Tensor  # what the decoder is given at every position of the batch, N


class ScaledSource(StoredSource):
    """The teacher's words share all of the probability."""

    def read(self, batch: Batch, text: Text) -> SoftTarget:
        """Return the words with probabilities that add up to 1."""
        soft = super().read(batch, text)
        total = soft.weights.sum(1, keepdim=True).clamp(min=1e-9)
        return soft._replace(weights=soft.weights / total)


class TrustedSource(StoredSource):
    """A word that the teacher held for unlikely is learned without it."""

    def read(self, batch: Batch, text: Text) -> SoftTarget:
        """Return the words; shares are what they give to the targets."""
        soft = super().read(batch, text)
        return soft.trusted(batch.target[: len(soft.ids)])


def _with(name: str, source: Type[Source]) -> Mapping[str, Type[Source]]:
    return {**SOURCES, name: source}


@register_criterion("self_kd_random", dataclass=SelfKDCriterionConfig)
class RandomCriterion(SelfKDCriterion):
    """The masses of the nearest neighbours go to words drawn at random."""

    sources: ClassVar[Mapping[str, Type[Source]]] = _with("neighbors", RandomSource)


@register_criterion("self_kd_unigram", dataclass=SelfKDCriterionConfig)
class UnigramCriterion(SelfKDCriterion):
    """The masses go to words as often as they stand in the training text."""

    sources: ClassVar[Mapping[str, Type[Source]]] = _with("neighbors", UnigramSource)


@register_criterion("self_kd_bigram", dataclass=SelfKDCriterionConfig)
class BigramCriterion(SelfKDCriterion):
    """The masses go to words as often as they follow the word before in the training text."""

    sources: ClassVar[Mapping[str, Type[Source]]] = _with("neighbors", BigramSource)

    def forward(
        self, model: Any, sample: Dict[str, Any], reduce: bool = True
    ) -> Tuple[Tensor, Any, Dict[str, Any]]:
        """Look at what the decoder is given, and compute the loss."""
        given = sample["net_input"]
        before = given["prev_output_tokens" if "prev_output_tokens" in given else "src_tokens"]
        before = before[:, self.ignore_prefix_size :].reshape(-1)
        self.source.before = before  # type: ignore[attr-defined]
        return super().forward(model, sample, reduce)


@register_criterion("self_kd_scaled", dataclass=SelfKDCriterionConfig)
class ScaledCriterion(SelfKDCriterion):
    """What the teacher's words leave goes to themselves."""

    sources: ClassVar[Mapping[str, Type[Source]]] = _with("stored", ScaledSource)


@register_criterion("self_kd_trusted", dataclass=SelfKDCriterionConfig)
class TrustedCriterion(SelfKDCriterion):
    """The teacher is believed as far as it gives to the target."""

    sources: ClassVar[Mapping[str, Type[Source]]] = _with("stored", TrustedSource)
