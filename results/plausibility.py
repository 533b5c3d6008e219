"""Are near words plausible words? As Markdown: ``python -m results.plausibility``.

A trained model predicts every target word of a text from the true words before it, and gives some
probability to other words. How much of that is on words that a kind of candidates names without a
look at the sentence, and how often is the model's wrong first choice among them? What explains the
answer is printed beside it: how often a candidate occurs in the training text, and how long its
vector is, in parts of the target's.

The kinds are the k nearest words in the model's own table, by Euclidean distance and by cosine, and
to compare with them k words at random and the k most frequent ones.
"""

import argparse
from pathlib import Path
from typing import Any, Dict, List

import torch
from torch import Tensor

from fairseq_skd.compatibility import ordinary_words
from fairseq_skd.neighbors import SIMILARITIES, nearest_neighbors
from fairseq_skd.output_projection import find_output_projection
from results.report import table
from results.trained import Trained, load, predictions

SEED = 1  # of the random words


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--gen-subset", default="valid", help="default: valid")
    parser.add_argument("--top-k", type=int, default=10, help="k (default: 10)")
    args = parser.parse_args()
    print(table(plausibility(load(args.path, args.data), args.gen_subset, args.top_k)))


def plausibility(trained: Trained, subset: str, k: int) -> List[List[str]]:
    """Return the lines of the table, the head first."""
    counts = _counts(trained.task)
    candidates = _candidates(trained, k, counts)
    weight = find_output_projection(trained.model, trained.task.target_dictionary).weight
    lengths = weight.detach().norm(dim=1)
    elsewhere = wrong = 0.0
    on = dict.fromkeys(candidates, 0.0)
    among = dict.fromkeys(candidates, 0.0)
    occurrences: Dict[str, List[Tensor]] = {kind: [] for kind in candidates}
    relative: Dict[str, List[Tensor]] = {kind: [] for kind in candidates}
    for lprobs, target in predictions(trained, subset):
        probabilities = lprobs.exp()
        own = target.unsqueeze(1)
        first = probabilities.argmax(1, keepdim=True)
        elsewhere += (1 - probabilities.gather(1, own)).sum().item()
        wrong += first.ne(own).sum().item()
        for kind, ids in candidates.items():
            named = ids[target]
            other = named.ne(own)  # a frequent word may be the target
            on[kind] += (probabilities.gather(1, named) * other).sum().item()
            among[kind] += (named.eq(first) & other).any(1).sum().item()
            occurrences[kind].append(counts[named.cpu()].flatten())
            relative[kind].append((lengths[named] / lengths[own]).flatten())
    head = ["candidates", "of the probability of other words", "of the wrong first choices"]
    lines = [[*head, "median count", "median length"]]
    for kind in candidates:
        parts = f"{on[kind] / elsewhere:.1%}", f"{among[kind] / wrong:.1%}"
        count = torch.cat(occurrences[kind]).median().item()
        length = torch.cat(relative[kind]).median().item()
        lines.append([kind, *parts, str(count), f"{length:.2f}"])
    return lines


def _counts(task: Any) -> Tensor:
    """Return how often every word is a target in the training text; int64, V."""
    task.load_dataset("train")
    counts = torch.zeros(len(task.target_dictionary), dtype=torch.int64)
    for example in task.dataset("train"):
        counts += torch.bincount(example["target"], minlength=len(counts))
    return counts


def _candidates(trained: Trained, k: int, counts: Tensor) -> Dict[str, Tensor]:
    """Return the ids of each kind's candidates for every word, V x k."""
    model, task, _ = trained
    dictionary = task.target_dictionary
    eligible = torch.from_numpy(ordinary_words(dictionary))
    eligible = eligible[counts[eligible] > 0]
    weight = find_output_projection(model, dictionary).weight
    found = {
        f"{k} nearest, {similarity}": nearest_neighbors(weight, k, eligible, similarity).ids
        for similarity in SIMILARITIES
    }
    drawn = torch.randint(
        *(len(eligible), (len(dictionary), k)), generator=torch.Generator().manual_seed(SEED)
    )
    found[f"{k} at random"] = eligible[drawn].to(weight.device)
    frequent = eligible[counts[eligible].topk(k).indices]
    found[f"{k} most frequent"] = frequent.expand(len(dictionary), k).to(weight.device)
    return found


if __name__ == "__main__":
    main()
