"""Self-knowledge distillation for sequence models: a fairseq criterion, and its parts in PyTorch.

With fairseq, importing this package (``--user-dir``) registers the criterion ``self_kd``. Without
it, the functions below are all there is, and all that another trainer needs.
"""

import importlib.util

from fairseq_skd.likeliest import likeliest_words
from fairseq_skd.linear_loss import LinearLosses, self_kd_linear_cross_entropy
from fairseq_skd.loss import Losses, TopWords, reference_loss, self_kd_cross_entropy
from fairseq_skd.neighbors import Neighbors, nearest_neighbors
from fairseq_skd.past import PastPredictions
from fairseq_skd.schedule import self_kd_weight
from fairseq_skd.soft_targets import SelfTeacher, SoftTarget, automatic_sigma, soft_target
from fairseq_skd.stored import StoredTargets, write_stored_targets
from fairseq_skd.version import __version__
from fairseq_skd.word_file import TextLayout

if importlib.util.find_spec("fairseq") is not None:
    import fairseq_skd.criterion  # noqa: F401  (registers the criterion)

__all__ = [
    "LinearLosses",
    "Losses",
    "Neighbors",
    "PastPredictions",
    "SelfTeacher",
    "SoftTarget",
    "StoredTargets",
    "TextLayout",
    "TopWords",
    "__version__",
    "automatic_sigma",
    "likeliest_words",
    "nearest_neighbors",
    "reference_loss",
    "self_kd_cross_entropy",
    "self_kd_linear_cross_entropy",
    "self_kd_weight",
    "soft_target",
    "write_stored_targets",
]
