"""Soft targets of self-knowledge distillation: the model's own word vectors are the teacher.

Words that are near the target in the output projection get part of its probability. That is the
idea of Hahn and Choi, "Self-Knowledge Distillation in Natural Language Processing" (RANLP 2019); an
affinity that falls with the squared distance, and the cap of 0.5, are those of an unofficial
reimplementation, which has ``q = min(0.5, exp(-sigma distance^2))`` for the predicted word alone.
Several candidates, the k nearest words and the automatic sigma are this project's own.
"""

from typing import NamedTuple, Optional, Union

import torch
from torch import Tensor

from fairseq_skd.neighbors import Neighbors, embedding_space, nearest_neighbors

__all__ = [
    "CANDIDATES",
    "LARGEST_SUM",
    "SelfTeacher",
    "SoftTarget",
    "automatic_sigma",
    "soft_target",
]

CANDIDATES = ("neighbors", "prediction", "both")

#: What the weights of a soft target may add up to: half precision has 8 to 11 bits.
LARGEST_SUM = 1.01


class SoftTarget(NamedTuple):
    """A distribution over words for every position, of which only some words are kept.

    Attributes
    ----------
    ids : Tensor
        int64, N x C, 0 to V - 1. A word may stand in several columns, which add up. A place
        without a word holds any id, -1 and -100 too, with weight 0.
    weights : Tensor
        Floating point, N x C: probabilities, not negative, without gradient. Rows sum to at most 1;
        what is left is shared by all V words alike.
    share : Tensor, optional
        N, 0 to 1: a factor on ``weight`` (alpha) at every position, 0 where there is nothing to
        learn from. Default: 1 everywhere.
    """

    ids: Tensor
    weights: Tensor
    share: Optional[Tensor] = None

    def at(self, rows: Union[slice, Tensor]) -> "SoftTarget":
        """Return that of some positions."""
        share = None if self.share is None else self.share[rows]
        return SoftTarget(self.ids[rows], self.weights[rows], share)

    def trusted(self, target: Tensor) -> "SoftTarget":
        """Return it with each position's share multiplied by what it gives to the target.

        A teacher that held the true word for unlikely has nothing to teach there, and one that was
        sure of it nothing to give away: what a target gives away is at most a quarter of the
        weight. This is the project's own.

        Parameters
        ----------
        target : Tensor
            int64, N.
        """
        given = self.given_to(target)
        return self._replace(share=given if self.share is None else given * self.share)

    def given_to(self, target: Tensor) -> Tensor:
        """Return the weight of a word at every position, 0 where it is none of the C; N."""
        return self.weights.masked_fill(self.ids != target.unsqueeze(1), 0).sum(1)

    @property
    def rest(self) -> Tensor:
        """What is left for all words alike; float32 or float64, N.

        Less than 1e-5 is rounding, and counts as 0: then words that the model holds for impossible
        do not make the loss infinite.
        """
        wide = torch.promote_types(self.weights.dtype, torch.float32)
        rest = 1 - self.weights.sum(1, dtype=wide)
        return rest.masked_fill(rest.abs() < 1e-5, 0)


def automatic_sigma(
    neighbors: Neighbors, eligible: Optional[Tensor] = None, scale: float = 1.0
) -> Tensor:
    """Return sigma = ``scale`` x the mean distance of eligible words to their k nearest ones.

    Parameters
    ----------
    neighbors : Neighbors
        Of all V words.
    eligible : Tensor, optional
        int64 ids of the words whose distances count. Default: all.
    scale : float
        Factor, > 0.

    Returns
    -------
    Tensor
        float32 scalar on the device of the table, at least 1e-12 so that words which all
        coincide do not divide by zero.
    """
    distances = neighbors.distances
    if eligible is not None:
        distances = distances[eligible.to(distances.device, non_blocking=True)]
    return (scale * distances.mean()).clamp(min=1e-12)


def soft_target(
    target: Tensor,
    candidates: Tensor,
    distances: Tensor,
    sigma: Union[float, Tensor],
    max_mass: float = 0.5,
) -> SoftTarget:
    """Share the probability of each target with its candidates by their distances.

    With affinities ``a_j = exp(-distance_j^2 / sigma^2)`` the target gives away
    ``m = min(max_mass, sum a)`` and candidate j gets ``q_j = m * a_j / sum a``. One candidate
    alone gets ``min(max_mass, a)``.

    Parameters
    ----------
    target : Tensor
        int64, N.
    candidates : Tensor
        int64, N x C: words other than the target.
    distances : Tensor
        N x C, from the target; infinite where a place holds no candidate.
    sigma : float or Tensor
        > 0.
    max_mass : float
        Cap on m, in [0, 1].

    Returns
    -------
    SoftTarget
        N x (1 + C), without gradient, rows sum to 1. Column 0 is the target, with weight 1 - m.

    Examples
    --------
    Two candidates at distances 1 and 2, sigma = 1: affinities 0.368 and 0.018, together under
    the cap of 0.5, so they are the masses.

    >>> t, c = torch.tensor([7]), torch.tensor([[3, 4]])
    >>> soft_target(t, c, torch.tensor([[1.0, 2.0]]), sigma=1.0).weights
    tensor([[0.6138, 0.3679, 0.0183]])
    """
    affinities = torch.exp(-(distances.detach().float() / sigma).square())
    total = affinities.sum(1, keepdim=True)
    mass = total.clamp(max=max_mass)
    # Where every affinity underflows, total is 0 and so is the mass: 0 / tiny, not 0 / 0.
    shares = affinities * (mass / total.clamp(min=torch.finfo(torch.float32).tiny))
    ids = torch.cat([target.unsqueeze(1), candidates], 1)
    return SoftTarget(ids, torch.cat([1 - mass, shares], 1))


class SelfTeacher:
    """Soft targets from a model's own output projection, for any trainer.

    Call `refresh` with the output projection before the first batch and again every few hundred
    updates; call `soft_target` for every batch. Defaults are those of `SelfKDOptions`, but for the
    candidates: the past is no teacher of this kind (`PastPredictions`).

    Parameters
    ----------
    candidates : {"neighbors", "prediction", "both"}
        ``neighbors``: the k words nearest to the target. ``prediction``: the word that the model
        predicts, where that is not the target (the two-word approximation). ``both``: the union.
    top_k : int
        k, for the neighbours and for the automatic sigma.
    similarity : {"euclidean", "cosine"}
        See `embedding_space`.
    sigma : float, optional
        Width of the affinity, > 0. Default: automatic, measured at every `refresh`.
    sigma_scale : float
        Factor on the automatic sigma.
    max_mass : float
        Cap on the probability that a target gives away, in [0, 1].
    eligible : Tensor, optional
        int64, ascending ids of the words that may get probability. Default: all. Leave out
        padding, unknown and control symbols.

    Examples
    --------
    >>> embedding = torch.tensor([[0.0, 0], [1, 0], [0, 2], [5, 5]])
    >>> teacher = SelfTeacher(top_k=2, similarity="euclidean", sigma=1.0)
    >>> teacher.refresh(embedding)
    >>> teacher.soft_target(torch.tensor([0]))
    SoftTarget(ids=tensor([[0, 1, 2]]), weights=tensor([[0.6138, 0.3679, 0.0183]]), share=None)
    """

    def __init__(
        self,
        candidates: str = "neighbors",
        top_k: int = 10,
        similarity: str = "cosine",
        sigma: Optional[float] = None,
        sigma_scale: float = 0.5,
        max_mass: float = 0.5,
        eligible: Optional[Tensor] = None,
    ) -> None:
        if candidates not in CANDIDATES:
            raise ValueError(f"candidates is {candidates!r}; allowed: {', '.join(CANDIDATES)}")
        self.candidates = candidates
        self.top_k = top_k
        self.similarity = similarity
        self.sigma = sigma
        self.sigma_scale = sigma_scale
        self.max_mass = max_mass
        self.eligible = eligible
        self._is_fresh = False
        self._is_eligible: Optional[Tensor] = None
        self._neighbors: Optional[Neighbors] = None
        self._sigma: Union[float, Tensor, None] = sigma
        self._table: Optional[SoftTarget] = None

    @property
    def needs_prediction(self) -> bool:
        """Whether `soft_target` needs the model's predicted words."""
        return self.candidates != "neighbors"

    def refresh(self, embedding: Tensor, words: Optional[Tensor] = None) -> None:
        """Measure the neighbours of all words, and sigma if it is automatic.

        Parameters
        ----------
        embedding : Tensor
            The output projection W, V x d, any floating dtype.
        words : Tensor, optional
            int64, M: measure the neighbours of these alone, to look at some words of a large table.
            Targets may then be no others, and sigma has to be a number.

        Raises
        ------
        ValueError, RuntimeError
            See `nearest_neighbors`; and if sigma is automatic and ``words`` are given.
        """
        if words is not None and self.sigma is None:
            raise ValueError("with the neighbours of some words alone sigma must be a number")
        self._is_fresh = True
        if self.needs_prediction:
            self._is_eligible = self._eligible_mask(embedding)
            if self.candidates == "prediction" and self.sigma is not None:
                return
        self._table = self._neighbors = None  # the old ones make room for the new ones
        neighbors = nearest_neighbors(
            embedding, self.top_k, self.eligible, self.similarity, words=words
        )
        if words is not None:
            shape = len(embedding), self.top_k
            ids = words.new_zeros(shape).index_copy_(0, words, neighbors.ids)
            far = neighbors.distances.new_full(shape, float("inf"))
            neighbors = Neighbors(ids, far.index_copy_(0, words, neighbors.distances))
        if self.sigma is None:
            self._sigma = automatic_sigma(neighbors, self.eligible, self.sigma_scale)
        if self.candidates == "neighbors":
            # A target's neighbours do not depend on the position, so neither do its weights: they
            # are computed once for every word, and a batch only looks them up.
            everyone = torch.arange(len(embedding), device=embedding.device)
            self._table = self._share(everyone, *neighbors)
        else:
            self._neighbors = neighbors

    def soft_target(
        self,
        target: Tensor,
        prediction: Optional[Tensor] = None,
        embedding: Optional[Tensor] = None,
    ) -> SoftTarget:
        """Return the soft target of every position.

        Parameters
        ----------
        target : Tensor
            int64, N. Negative ids, with which PyTorch marks padding, are read as word 0: the loss
            ignores these positions.
        prediction : Tensor, optional
            int64, N: the word with the largest logit, needed unless the candidates are
            ``neighbors``. A predicted word that is the target, or not eligible, gets nothing.
        embedding : Tensor, optional
            W as it is now, needed with ``prediction``: no table holds the distance to any word
            that might be predicted, so this one is measured for every batch.

        Returns
        -------
        SoftTarget
            N x (1 + k), N x 2 or N x (2 + k) for the three kinds of candidates.

        Raises
        ------
        RuntimeError
            Before the first `refresh`.
        ValueError
            If ``prediction`` or ``embedding`` is needed and missing.
        """
        if not self._is_fresh:
            raise RuntimeError("call refresh(embedding) before soft_target")
        target = target.clamp(min=0)
        if self._table is not None:
            return SoftTarget(self._table.ids[target], self._table.weights[target])
        if prediction is None or embedding is None:
            raise ValueError(f"candidates {self.candidates!r} need prediction and embedding")
        assert self._is_eligible is not None
        absent = (prediction == target) | ~self._is_eligible[prediction]
        ids = prediction.unsqueeze(1)
        if self.candidates == "prediction":
            far = self._distances(embedding, target, prediction, absent)
            return self._share(target, ids, far)
        assert self._neighbors is not None
        near = self._neighbors.ids[target]
        absent = absent | (near == ids).any(1)
        far = self._distances(embedding, target, prediction, absent)
        return self._share(
            target,
            torch.cat([near, ids], 1),
            torch.cat([self._neighbors.distances[target], far], 1),
        )

    def _share(self, target: Tensor, candidates: Tensor, distances: Tensor) -> SoftTarget:
        assert self._sigma is not None
        return soft_target(target, candidates, distances, self._sigma, self.max_mass)

    def _distances(
        self, embedding: Tensor, target: Tensor, prediction: Tensor, absent: Tensor
    ) -> Tensor:
        here = embedding_space(embedding[target], self.similarity)
        there = embedding_space(embedding[prediction], self.similarity)
        distances = (here - there).square().sum(1).sqrt()
        return distances.masked_fill(absent, float("inf")).unsqueeze(1)

    def _eligible_mask(self, embedding: Tensor) -> Tensor:
        mask = torch.ones(len(embedding), dtype=torch.bool, device=embedding.device)
        if self.eligible is not None:
            eligible = self.eligible.to(embedding.device, non_blocking=True)
            mask.zero_().index_fill_(0, eligible, True)
        return mask
