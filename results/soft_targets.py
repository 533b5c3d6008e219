"""Soft targets of real words, as Markdown: ``python -m results.soft_targets``.

One row a word and one column a checkpoint of a run with ``self_kd``, for example an early and a
late one: the nearest words and the probability that the word gives each.
"""

import argparse
import sys
from pathlib import Path
from typing import List

import torch

from fairseq_skd.criterion import SelfKDCriterion
from fairseq_skd.output_projection import find_output_projection
from results import self_kd_controls  # noqa: F401  (their checkpoints, too)
from results.report import table
from results.trained import load


def main() -> None:
    """Print the table."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", type=Path, nargs="+", required=True, help="checkpoints")
    parser.add_argument("--words", nargs="+", required=True, help="of the target dictionary")
    parser.add_argument("--shown", type=int, default=5, help="of the nearest words (default: 5)")
    args = parser.parse_args()
    columns = [soft_targets(path, args.data, args.words, args.shown) for path in args.path]
    rows = [list(row) for row in zip(args.words, *columns)]
    print(table([["word", *(path.name for path in args.path)], *rows]))


def soft_targets(checkpoint: Path, data: str, words: List[str], shown: int) -> List[str]:
    """Return for each word its nearest words and their probabilities in one checkpoint."""
    model, task, config = load(checkpoint, data)
    task.load_dataset("train")  # tells which words of a joined dictionary are the target's
    criterion = task.build_criterion(config.criterion)
    if not isinstance(criterion, SelfKDCriterion):
        sys.exit(f"{checkpoint} was trained with {config.criterion._name}; self_kd is needed")
    dictionary = task.target_dictionary
    unknown = [word for word in words if word not in dictionary]
    if unknown:
        sys.exit(f"--words: not in the target dictionary are {', '.join(unknown)}")
    projection = find_output_projection(model, dictionary)
    embedding = projection.weight
    try:
        teacher = criterion._new_teacher(projection)
    except RuntimeError as error:  # a control whose table no checkpoint has
        sys.exit(f"{checkpoint}: {error}")
    teacher.refresh(embedding)
    # As if every word were predicted right: then the neighbours are all there is.
    target = torch.tensor([dictionary.index(word) for word in words], device=embedding.device)
    soft = teacher.soft_target(target, prediction=target, embedding=embedding)
    return [
        ", ".join(f"{dictionary[i]} {p:.3f}" for i, p in list(zip(ids, masses))[1 : shown + 1])
        for ids, masses in zip(soft.ids.tolist(), soft.weights.tolist())
    ]


if __name__ == "__main__":
    main()
