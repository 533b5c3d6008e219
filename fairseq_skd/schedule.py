"""How much of the loss is self-knowledge distillation, from the update number alone."""

from typing import NamedTuple, Optional

__all__ = ["UNKNOWN", "TrainingLength", "self_kd_weight"]

# Start and ramp, in updates, of a training whose length nobody knows.
UNKNOWN = 1000, 1000


class TrainingLength(NamedTuple):
    """What is known of a training before it begins.

    Attributes
    ----------
    updates : int, optional
        In all; None if it has no end of its own.
    warmup_updates : int
        At its beginning.
    source : str
        Where that is from, to be logged.
    language_model : bool
        Whether the model has no source text: a decoder alone.
    """

    updates: Optional[int]
    warmup_updates: int
    source: str
    language_model: bool = False


def self_kd_weight(
    num_updates: int, weight: float, start_update: int = 0, ramp_updates: int = 0
) -> float:
    """Return alpha, the share of the distillation term in the loss of one update.

    alpha is 0 up to ``start_update``, then grows linearly by
    ``eta = weight / ramp_updates`` an update until it stays at ``weight``. The shape (a start
    after K updates, a weight that grows by eta up to its final value) is that of the unofficial
    reimplementation of Hahn and Choi (2019); the paper's own schedule could not be consulted.

    There is no state: a resumed run, gradient accumulation and ignored batches cannot shift it.

    Parameters
    ----------
    num_updates : int
        Parameter updates done before the one that is being computed; 0 for the first.
    weight : float
        Final value of alpha, in [0, 1].
    start_update : int
        K, in updates. At ``num_updates == start_update`` alpha is still 0 if there is a ramp.
    ramp_updates : int
        Updates from alpha = 0 to alpha = ``weight``; 0 means at once, at ``start_update``.

    Returns
    -------
    float
        alpha in [0, ``weight``].

    Examples
    --------
    >>> [self_kd_weight(u, 0.5, start_update=100, ramp_updates=10) for u in (0, 100, 105, 999)]
    [0.0, 0.0, 0.25, 0.5]
    """
    since_start = num_updates - start_update
    if since_start < 0:
        return 0.0
    if since_start >= ramp_updates:
        return float(weight)
    return weight * since_start / ramp_updates
