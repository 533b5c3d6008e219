"""``fairseq-skd calibration``: how far a model's probabilities can be believed.

Every target word of a text is predicted from the true words before it. A model is calibrated if, of
the choices that it makes with a probability of 0.7, 70 % are right.
"""

import dataclasses
import math
from pathlib import Path
from typing import Dict, List

import torch
import typer
from torch import Tensor
from typing_extensions import Annotated

from fairseq_skd.commands import CommandError, output, pictures
from fairseq_skd.commands.output import AsCSV, AsJSON, Plot, Rows, Titled
from fairseq_skd.commands.teaching import Settings
from fairseq_skd.commands.trained import Trained, load

__all__ = ["Calibration", "calibration", "measure", "predict"]

BINS = 15


@dataclasses.dataclass(frozen=True)
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
    bins : list of (int, float, float)
        For each bin the number of words, their accuracy and their mean confidence.
    """

    words: int
    accuracy: float
    confidence: float
    ece: float
    nll: float
    own_nll: float
    bins: List[tuple]


def measure(confidence: Tensor, right: Tensor, nll: Tensor) -> Calibration:
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
    place = (confidence * BINS).long().clamp(max=BINS - 1)
    counts, rights, sums = (
        torch.zeros(BINS, dtype=torch.float64).index_add_(0, place, values)
        for values in (torch.ones_like(right), right, confidence)
    )
    some = counts.clamp(min=1)
    return Calibration(
        words=len(right),
        accuracy=right.mean().item(),
        confidence=confidence.mean().item(),
        ece=(rights - sums).abs().sum().item() / len(right),
        nll=nll.double().mean().item(),
        own_nll=-confidence.log().mean().item(),
        bins=list(zip(counts.long().tolist(), (rights / some).tolist(), (sums / some).tolist())),
    )


def predict(trained: Trained, subset: str, temperature: float = 1.0) -> Calibration:
    """Let a model predict every word of a text; see `Trained.predictions`.

    Its logits are divided by ``temperature`` first, as ``fairseq-generate --temperature`` does.
    """
    parts: List[List[Tensor]] = [[], [], []]
    for lprobs, target in trained.predictions(subset):
        if temperature != 1:
            lprobs = lprobs.div_(temperature).log_softmax(1)
        best = lprobs.max(1)
        nll = -lprobs.gather(1, target.unsqueeze(1)).squeeze(1)
        for part, values in zip(parts, (best.values.exp(), best.indices.eq(target), nll)):
            part.append(values.cpu())
    if not parts[0]:
        raise CommandError(f"{subset} holds no words to predict")
    return measure(*(torch.cat(part) for part in parts))


def calibration(
    checkpoints: Annotated[List[Path], typer.Argument(help="fairseq checkpoints.")],
    data: Annotated[Path, typer.Argument(help="Folder made by fairseq-preprocess.")],
    text: Annotated[
        str, typer.Option(help="valid, test, ... of the data; several with commas between.")
    ] = "valid",
    temperature: Annotated[
        float,
        typer.Option(
            help="By which logits are divided: with the one that suits validation text best (the "
            "lowest nll) models can be compared apart from their calibration."
        ),
    ] = 1.0,
    user_dir: Settings.user_dir = None,
    plot: Plot = None,
    as_json: AsJSON = False,
    as_csv: AsCSV = False,
) -> None:
    """Show how far the probabilities of models can be believed.

    Example:

      fairseq-skd calibration one/checkpoint_best.pt two/checkpoint_best.pt data-bin --plot c.png
    """
    pictures.check_plot(plot)
    if not 0 < temperature < math.inf:
        raise CommandError(f"--temperature is {temperature}; allowed: a positive number")
    changed = "" if temperature == 1 else f", temperature {temperature:g}"
    found: Dict[str, Calibration] = {}
    rows: Rows = []
    for name, checkpoint in zip(output.labels(checkpoints), checkpoints):
        trained = load(checkpoint, data, user_dir)
        for subset in text.split(","):
            figures = predict(trained, subset, temperature)
            found[f"{name}, {subset}{changed}"] = figures
            row = dataclasses.asdict(figures)
            del row["bins"]
            rows.append({"checkpoint": name, "text": subset, "temperature": temperature, **row})
    formats = dict.fromkeys(("accuracy", "confidence", "ece", "nll", "own_nll"), ".4f")
    table = Titled("Probability of the first choice against how often it is right", rows)
    output.show({"calibration": table}, formats, as_json, as_csv)
    if plot is not None:
        draw(found, plot)


def draw(found: Dict[str, Calibration], path: Path) -> None:
    """Draw the reliability diagram: accuracy against confidence, and how many words there are."""
    pyplot = pictures.pyplot()
    figure, (upper, lower) = pyplot.subplots(
        *(2, 1), figsize=(4.6, 5.6), sharex=True, gridspec_kw={"height_ratios": [3, 1]}
    )
    upper.plot([0, 1], [0, 1], color="0.6", linewidth=1, label="calibrated")
    edges = [i / BINS for i in range(BINS + 1)]
    for number, (name, figures) in enumerate(found.items()):
        style = {"color": f"C{number % 10}", "linestyle": ("-", "--", ":", "-.")[number % 4]}
        filled = [place for place in figures.bins if place[0]]
        points = [(place[2], place[1]) for place in filled]
        label = f"{name}: ECE {figures.ece:.3f}"
        upper.plot(*zip(*points), **style, marker="os^D"[number % 4], markersize=3, label=label)
        shares = [place[0] / figures.words for place in figures.bins]
        lower.stairs(shares, edges, **style)
    upper.set_ylabel("part that is right")
    upper.legend(fontsize=7, loc="lower left", bbox_to_anchor=(0, 1))  # the curves go everywhere
    lower.set_ylabel("part of words")
    lower.set_xlabel("probability of the first choice")
    upper.set_xlim(0, 1)
    upper.set_ylim(0, 1)
    pictures.save_plot(figure, path)
