"""Are near words plausible words?

A trained model predicts every target word of a text from the true words before it, and gives some
probability to other words. How much of that is on words that a kind of candidates names without a
look at the sentence, and how often is the model's wrong first choice among them? What explains the
answer stands beside it: how often a candidate occurs in the training text, and how long its vector
is, in parts of the target's.

The kinds are the k nearest words in the model's own table, by Euclidean distance and by cosine, and
to compare with them k words at random and the k most frequent ones.
"""

from typing import Any, Dict, List

import torch
from torch import Tensor

from fairseq_skd.commands.output import Rows, waiting
from fairseq_skd.commands.trained import Trained
from fairseq_skd.compatibility import ordinary_words
from fairseq_skd.neighbors import SIMILARITIES, nearest_neighbors

__all__ = ["plausibility"]

_SEED = 1  # of the random words


def plausibility(trained: Trained, subset: str, k: int) -> Rows:
    """Return a row for each kind of candidates.

    Parameters
    ----------
    trained : Trained
        A model whose data has the text and the training text.
    subset : str
        Name of the text.
    k : int
        Candidates a word.
    """
    weight = trained.projection.weight.detach()
    counts = _counts(trained.task, trained.dataset("train"))
    pad = trained.task.target_dictionary.pad()
    texts = trained.dataset(subset)
    words = torch.cat([texts[i]["target"] for i in range(len(texts))]).unique()
    words = words[words != pad].to(weight.device)
    with waiting("measuring the nearest words"):
        candidates = _candidates(trained, k, counts, words)
    lengths = weight.norm(dim=1)
    elsewhere = wrong = 0.0
    on = dict.fromkeys(candidates, 0.0)
    among = dict.fromkeys(candidates, 0.0)
    occurrences: Dict[str, List[Tensor]] = {kind: [] for kind in candidates}
    relative: Dict[str, List[Tensor]] = {kind: [] for kind in candidates}
    for lprobs, target in trained.predictions(subset):
        probabilities = lprobs.exp()
        own = target.unsqueeze(1)
        first = probabilities.argmax(1, keepdim=True)
        elsewhere += (1 - probabilities.gather(1, own)).sum().item()
        wrong += first.ne(own).sum().item()
        places = torch.searchsorted(words, target)
        for kind, ids in candidates.items():
            named = ids[places]
            other = named.ne(own)  # a frequent word may be the target
            on[kind] += (probabilities.gather(1, named) * other).sum().item()
            among[kind] += (named.eq(first) & other).any(1).sum().item()
            occurrences[kind].append(counts[named.cpu()].flatten())
            relative[kind].append((lengths[named] / lengths[own]).flatten())
    return [
        {
            "candidates": kind,
            "of_the_probability_of_other_words": on[kind] / elsewhere if elsewhere else None,
            "of_the_wrong_first_choices": among[kind] / wrong if wrong else None,
            "median_count": int(torch.cat(occurrences[kind]).median()),
            "median_length": torch.cat(relative[kind]).median().item(),
        }
        for kind in candidates
    ]


def _counts(task: Any, dataset: Any) -> Tensor:
    """Return how often every word is a target in the training text; int64, V."""
    counts = torch.zeros(len(task.target_dictionary), dtype=torch.int64)
    for i in range(len(dataset)):
        counts += torch.bincount(dataset[i]["target"], minlength=len(counts))
    return counts


def _candidates(trained: Trained, k: int, counts: Tensor, words: Tensor) -> Dict[str, Tensor]:
    """Return the ids of each kind's candidates for some words, M x k."""
    projection = trained.projection
    eligible = torch.from_numpy(ordinary_words(projection.dictionary))
    eligible = eligible[counts[eligible] > 0]
    weight = projection.weight
    found = {
        f"{k} nearest, {similarity}": nearest_neighbors(
            weight, k, eligible, similarity, words=words
        ).ids
        for similarity in SIMILARITIES
    }
    shape = len(words), k
    drawn = torch.randint(*(len(eligible), shape), generator=torch.Generator().manual_seed(_SEED))
    found[f"{k} at random"] = eligible[drawn].to(weight.device)
    frequent = eligible[counts[eligible].topk(k).indices]
    found[f"{k} most frequent"] = frequent.expand(shape).to(weight.device)
    return found
