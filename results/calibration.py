"""How far a model's probabilities can be believed: ``python -m results.calibration``.

Every target word of a text is predicted from the true words before it. A model is calibrated if, of
the choices that it makes with a probability of 0.7, 70 % are right. (A language model reads blocks
of the length that it was trained with, each without the words before it.)
"""

import argparse
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import List

import torch
from torch import Tensor

from results.plan import Run
from results.trained import Trained, load, predictions

BINS = 15


@dataclass(frozen=True)
class Calibration:
    """What the probabilities of a model and its choices have in common.

    Attributes
    ----------
    words : int
        Number of predicted words.
    accuracy : float
        Part of the words at which the model's first choice is right.
    confidence : float
        Mean probability of the first choice.
    ece : float
        Expected calibration error (Guo et al., "On Calibration of Modern Neural Networks", ICML
        2017): |accuracy - confidence| in 15 bins of equal width, weighted by their numbers.
    nll : float
        Mean negative log-likelihood of the true words, in nats.
    own_nll : float
        The same of the model's first choices.
    """

    words: int
    accuracy: float
    confidence: float
    ece: float
    nll: float
    own_nll: float

    def __str__(self) -> str:
        """Return the figures as `results.collect` reads them."""
        return (
            f"words {self.words}, accuracy {self.accuracy:.4f}, confidence {self.confidence:.4f}, "
            f"ECE {self.ece:.4f}, nll {self.nll:.4f}, nll of its own choices {self.own_nll:.4f}"
        )


def calibration(confidence: Tensor, right: Tensor, nll: Tensor) -> Calibration:
    """Compute the figures from one value a word.

    Parameters
    ----------
    confidence : Tensor
        Float, N: probability of the first choice, in (0, 1].
    right : Tensor
        Bool, N: whether the first choice is the true word.
    nll : Tensor
        Float, N: -log p of the true word.
    """
    confidence, right = confidence.double(), right.double()
    bins = (confidence * BINS).long().clamp(max=BINS - 1)
    gaps = torch.zeros(BINS, dtype=torch.float64).index_add_(0, bins, right - confidence)
    return Calibration(
        words=len(right),
        accuracy=right.mean().item(),
        confidence=confidence.mean().item(),
        ece=gaps.abs().sum().item() / len(right),
        nll=nll.double().mean().item(),
        own_nll=-confidence.log().mean().item(),
    )


def predict(trained: Trained, subset: str) -> Calibration:
    """Let a model predict every word of a text; see `results.trained`."""
    parts: List[List[Tensor]] = [[], [], []]
    for lprobs, target in predictions(trained, subset):
        best = lprobs.max(1)
        nll = -lprobs.gather(1, target.unsqueeze(1)).squeeze(1)
        for part, values in zip(parts, (best.values.exp(), best.indices.eq(target), nll)):
            part.append(values.cpu())
    return calibration(*(torch.cat(part) for part in parts))


def command(run: Run) -> List[str]:
    """Return the command that predicts all of a run's texts, after its evaluation."""
    average = run.folder / "average.pt"
    averaged = average.exists() and "--best" not in run.evaluation_options
    checkpoint = average if averaged else run.folder / "checkpoint_best.pt"
    data = run.out / "data"
    texts = sorted({path.name.split(".")[0] for path in data.glob(f"{run.text}*.bin")})
    program = [sys.executable, "-m", "results.calibration", str(data)]
    return [*program, "--path", str(checkpoint), "--gen-subset", ",".join(texts)]


def main() -> None:
    """Print the figures, one line a text."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", help="folder made by fairseq-preprocess")
    parser.add_argument("--path", type=Path, required=True, help="a checkpoint")
    parser.add_argument("--gen-subset", default="valid", help="with commas (default: valid)")
    args = parser.parse_args()
    trained = load(args.path, args.data)
    for subset in args.gen_subset.split(","):
        print(f"calibration on {subset}: {predict(trained, subset)}", flush=True)


if __name__ == "__main__":
    main()
