"""The figures in the log of a training, with ``--log-format json`` or ``simple``."""

import json
import re
import statistics
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Tuple

__all__ = ["Log", "parse_line", "read_log"]

Fields = Dict[str, float]

_SIMPLE = re.compile(r"(\w+)[ =](-?[\d.]+(?:e[+-]?\d+)?|nan|inf)(?= \||,|$)")
_PREFIX = re.compile(r"^(?:train|valid)_(?!wall)")


class Log(NamedTuple):
    """What a training has logged; names are fairseq's, without ``valid_`` and ``train_``.

    Attributes
    ----------
    train : list of dict
        After every ``--log-interval`` updates; of those that an interruption made twice, the
        second.
    valid : list of dict
        After every validation.
    """

    train: List[Fields]
    valid: List[Fields]

    def seconds(self, began_at: float = 0) -> List[Tuple[Fields, float]]:
        """Return lines of the training with what an update took before each, where that is known.

        Without validation and saving.

        Parameters
        ----------
        began_at : float
            Updates that another log holds.
        """
        done = [began_at, *(fields["num_updates"] for fields in self.train)]
        # train_wall: seconds since the line before.
        return [
            (fields, fields["train_wall"] / (now - before))
            for fields, before, now in zip(self.train, done, done[1:])
            if "train_wall" in fields and now > before
        ]

    def seconds_an_update(self, began_at: float = 0) -> Optional[float]:
        """Return the median of `seconds`; None if there are none."""
        found = [seconds for _, seconds in self.seconds(began_at)]
        return statistics.median(found) if found else None


def read_log(path: Path) -> Log:
    """Read a log; lines of other kinds are passed over."""
    train: Dict[float, Fields] = {}
    valid: List[Fields] = []
    for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
        kind, fields = parse_line(line)
        if kind == "train_inner":
            train[fields["num_updates"]] = fields
        elif kind == "valid":
            valid.append(fields)
    return Log([train[updates] for updates in sorted(train)], valid)


def parse_line(line: str) -> Tuple[str, Fields]:
    """Return the kind of a line (``train_inner``, ``valid``) and its figures; "" for any other."""
    parts = line.rstrip().split(" | ", 3)
    kind = parts[2].strip() if len(parts) == 4 else ""
    if kind not in ("train_inner", "valid"):
        return "", {}
    if parts[3].startswith("{"):
        try:
            found = json.loads(parts[3])
        except ValueError:  # cut off
            return "", {}
    else:
        found = dict(_SIMPLE.findall(parts[3]))
    fields = {}
    for name, value in found.items():
        try:
            fields[_PREFIX.sub("", name)] = float(value)
        except (TypeError, ValueError):
            continue
    return (kind, fields) if "num_updates" in fields else ("", {})
