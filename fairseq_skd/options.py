"""The settings of self-distillation: defaults, what is allowed, and the run's signature."""

import math
from dataclasses import dataclass
from typing import Any, Callable, Optional, TypeVar, Union

from fairseq_skd.neighbors import SIMILARITIES
from fairseq_skd.soft_targets import CANDIDATES
from fairseq_skd.version import __version__

__all__ = ["TEACHERS", "SelfKDOptions", "parse_number"]

Number = TypeVar("Number", int, float)

#: Where soft targets can come from: the candidates of a `SelfTeacher`, `past` or `stored`.
TEACHERS = (*CANDIDATES, "past", "stored")


@dataclass(frozen=True)
class SelfKDOptions:
    """Settings of the criterion; every field is the option ``--self-kd-<field>``.

    Raises
    ------
    ValueError
        On creation, for a value that is not allowed: it names the option, the value and what is.
    """

    weight: float = 0.5
    # None: derived from the length of the training, `sources.Source.schedule`
    start_update: Optional[int] = None
    ramp_updates: Optional[int] = None
    candidates: str = "neighbors"
    top_k: int = 10
    # Similarity and scale are what validation text has chosen: docs/results/tried.md
    similarity: str = "cosine"
    sigma: Optional[float] = None
    sigma_scale: float = 0.5
    max_mass: float = 0.5
    # Measuring the neighbours then takes less than 1 % of a usual training: docs/refresh.md
    refresh_interval: int = 2000
    past_file: Optional[str] = None
    teacher: Optional[str] = None

    def __post_init__(self) -> None:
        self._check("weight", 0 <= self.weight <= 1, "a number from 0 to 1")
        self._check("max_mass", 0 <= self.max_mass <= 1, "a number from 0 to 1")
        for name in ("start_update", "ramp_updates"):
            value = getattr(self, name)
            self._check(name, value is None or value >= 0, "'auto', or 0 or more updates")
        self._check("refresh_interval", self.refresh_interval >= 1, "1 or more updates")
        self._check("top_k", self.top_k >= 1, "1 or more words")
        self._check("candidates", self.candidates in TEACHERS, ", ".join(TEACHERS))
        self._check("similarity", self.similarity in SIMILARITIES, ", ".join(SIMILARITIES))
        self._check("sigma_scale", 0 < self.sigma_scale < math.inf, "a positive number")
        if self.sigma is not None:
            self._check("sigma", 0 < self.sigma < math.inf, "'auto', or a positive number")
        if self.candidates == "stored" and not self.teacher:
            raise ValueError(
                "--self-kd-candidates is stored and --self-kd-teacher is missing: the file that "
                "fairseq-skd teach has written"
            )
        if self.teacher and self.candidates != "stored":
            raise ValueError(
                f"--self-kd-teacher is {self.teacher} and --self-kd-candidates is "
                f"{self.candidates}; a teacher's file is read with --self-kd-candidates stored"
            )

    def _check(self, field: str, allowed: bool, what: str) -> None:
        if not allowed:  # also for NaN, which fails every comparison
            option = f"--self-kd-{field.replace('_', '-')}"
            raise ValueError(f"{option} is {getattr(self, field)}; allowed: {what}")

    def check_top_k(self, num_words: int) -> None:
        """Refuse a k that is not smaller than the number of words that can be neighbours."""
        if self.top_k >= num_words:
            raise ValueError(
                f"--self-kd-top-k is {self.top_k}; allowed: 1 to {num_words - 1}, since "
                f"{num_words} words of the target dictionary can be neighbors (special symbols "
                "and words that never occur in the target language cannot)"
            )

    def signature(self, teacher: str = "") -> str:
        """Return one line that says what was computed, to be quoted beside a result.

        Parameters
        ----------
        teacher : str
            What is to be said of the teacher of `stored`: `sources.Source.described`.
        """
        start, ramp = (
            "auto" if value is None else value for value in (self.start_update, self.ramp_updates)
        )
        schedule = f"weight:{self.weight}|start:{start}|ramp:{ramp}"
        if self.candidates == "past":  # which knows no distances
            return f"self_kd|cand:past|k:{self.top_k}|{schedule}|version:{__version__}"
        if self.candidates == "stored":  # the file says how many words
            return f"self_kd|cand:stored|teacher:{teacher}|{schedule}|version:{__version__}"
        sigma = f"auto*{self.sigma_scale}" if self.sigma is None else f"{self.sigma}"
        return (
            f"self_kd|cand:{self.candidates}|k:{self.top_k}|sim:{self.similarity}|sigma:{sigma}"
            f"|mass:{self.max_mass}|{schedule}|refresh:{self.refresh_interval}"
            f"|version:{__version__}"
        )


def parse_number(
    option: str, value: Union[str, float, None], kind: Callable[[Any], Number], allowed: str
) -> Optional[Number]:
    """Return a number, or None for automatic (``"auto"`` or None).

    Parameters
    ----------
    option : str
        As a user writes it.
    value : str, float or None
        What was given.
    kind : type
        float or int.
    allowed : str
        Numbers that are allowed, for the message; `SelfKDOptions` looks at the number itself.

    Raises
    ------
    ValueError
        If the text is neither a number nor ``auto``.
    """
    if value is None or value == "auto":
        return None
    try:
        return kind(value)
    except ValueError:
        raise ValueError(f"{option} is {value!r}; allowed: 'auto', or {allowed}") from None
