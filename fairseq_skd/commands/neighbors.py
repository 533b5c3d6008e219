"""``fairseq-skd neighbors``: what a word's nearest words are, and what it would give them."""

from pathlib import Path
from typing import Any, Dict, Optional, Tuple

import torch
import typer
from torch import Tensor
from typing_extensions import Annotated

from fairseq_skd.commands import CommandError, output, pictures
from fairseq_skd.commands.output import AsCSV, AsJSON, Plot, Rows, Titled
from fairseq_skd.commands.plausibility import plausibility
from fairseq_skd.commands.teaching import Checkpoint, Settings, settings_of, teacher_for
from fairseq_skd.commands.trained import Trained, load, readable, word_ids
from fairseq_skd.neighbors import embedding_space

__all__ = ["neighbors", "soft_targets"]


def neighbors(
    checkpoint: Checkpoint,
    words: Annotated[
        Optional[str], typer.Option(help="Words, with commas between: house,run")
    ] = None,
    random: Annotated[int, typer.Option(help="So many words drawn at random.")] = 0,
    most_confused: Annotated[
        int,
        typer.Option(help="The words for which the model most often predicts another (in --text)."),
    ] = 0,
    plausible: Annotated[
        bool,
        typer.Option(
            "--plausible",
            help="Instead: how much of what the model gives to wrong words (in --text) is on the "
            "nearest words, on words at random and on the most frequent ones?",
        ),
    ] = False,
    text: Annotated[str, typer.Option(help="valid, test, ... of the data.")] = "valid",
    data: Settings.data = None,
    top_k: Settings.top_k = None,
    similarity: Settings.similarity = None,
    sigma: Settings.sigma = None,
    sigma_scale: Settings.sigma_scale = None,
    max_mass: Settings.max_mass = None,
    user_dir: Settings.user_dir = None,
    plot: Plot = None,
    as_json: AsJSON = False,
    as_csv: AsCSV = False,
) -> None:
    """Show the nearest words of words, and their soft target.

    For any checkpoint of a translation or language model with one output projection, trained with
    self-KD or not. Settings are those of its training, else the defaults.

    Examples:

      fairseq-skd neighbors checkpoint_best.pt --words house,run

      fairseq-skd neighbors checkpoint_best.pt --most-confused 20 --plot confused.png
    """
    pictures.check_plot(plot)
    if plausible + bool(words) + (random > 0) + (most_confused > 0) != 1:
        raise CommandError("give one of --words, --random, --most-confused and --plausible")
    trained = load(checkpoint, data, user_dir)
    settings = settings_of(
        trained,
        candidates="neighbors",
        top_k=top_k,
        similarity=similarity,
        sigma=sigma,
        sigma_scale=sigma_scale,
        max_mass=max_mass,
    )
    if plausible:
        if plot is not None:
            raise CommandError("--plot draws words; --plausible has none")
        rows = plausibility(trained, text, settings.top_k)
        table = Titled(f"What the model gives to other words, on {text}", rows)
        output.show({"plausibility": table}, _SHARES, as_json, as_csv)
        return
    if words:
        ids = word_ids(trained.projection.dictionary, words.split(","))
    elif random:
        eligible, _ = trained.eligible()
        generator = torch.Generator().manual_seed(1)
        ids = eligible[torch.randperm(len(eligible), generator=generator)[:random]]
    else:
        ids = _most_confused(trained, text, most_confused)
    rows, title = soft_targets(trained, ids, settings)
    table = Titled(title, rows)
    formats = {"distance": ".3f", "probability": ".3f", "keeps": ".3f"}
    output.show({"neighbors": table}, formats, as_json, as_csv)
    if plot is not None:
        draw(rows, title, plot)


_SHARES = {
    "of_the_probability_of_other_words": ".1%",
    "of_the_wrong_first_choices": ".1%",
    "median_length": ".2f",
}


def soft_targets(trained: Trained, ids: Tensor, settings: Any) -> Tuple[Rows, str]:
    """Return a row for each neighbour of each word, nearest first, and what they are.

    Parameters
    ----------
    trained : Trained
        The model.
    ids : Tensor
        int64: the words.
    settings : SelfKDOptions
        Those of the soft target.
    """
    projection = trained.projection
    show = readable(projection.dictionary)
    teacher, title = teacher_for(trained, settings, ids)
    ids = ids.to(projection.weight.device)
    soft = teacher.soft_target(ids)
    here, there = (
        embedding_space(projection.weight[i], settings.similarity)
        for i in (soft.ids[:, :1], soft.ids[:, 1:])
    )
    distances = (here - there).square().sum(2).sqrt()
    rows: Rows = []
    for word, near, weights, far in zip(
        ids.tolist(), soft.ids.tolist(), soft.weights.tolist(), distances.tolist()
    ):
        for j, q, distance in zip(near[1:], weights[1:], far):
            row: Dict[str, Any] = {"word": show(word), "keeps": weights[0], "neighbor": show(j)}
            rows.append({**row, "distance": distance, "probability": q})
    return rows, title


def _most_confused(trained: Trained, text: str, count: int) -> Tensor:
    """Return the words in whose place the model most often predicts another one."""
    wrong = torch.zeros(len(trained.projection.dictionary), dtype=torch.int64)
    for lprobs, target in trained.predictions(text):
        missed = target[lprobs.argmax(1) != target].cpu()
        wrong += torch.bincount(missed, minlength=len(wrong))
    eligible, _ = trained.eligible()
    order = wrong[eligible].argsort(descending=True, stable=True)[:count]
    return eligible[order][wrong[eligible][order] > 0]


def draw(rows: Rows, title: str, path: Path) -> None:
    """Draw the neighbourhood of every word: distances as places, probabilities beside them."""
    by_word: Dict[str, Rows] = {}
    for row in rows:
        by_word.setdefault(row["word"], []).append(row)
    pyplot = pictures.pyplot()
    columns = min(3, len(by_word))
    lines = -(-len(by_word) // columns)
    k = max(map(len, by_word.values()))
    figure, axes = pyplot.subplots(
        *(lines, columns),
        figsize=(3.4 * columns, lines * (0.8 + 0.2 * k) + 0.4),
        squeeze=False,
    )
    farthest = max(row["distance"] for row in rows)
    for axis, (word, near) in zip(axes.flat, by_word.items()):
        places = range(len(near))
        distances = [row["distance"] for row in near]
        axis.hlines(places, 0, distances, color="0.8", linewidth=1)
        axis.scatter(distances, places, s=12, color="black", zorder=3)
        for place, row in zip(places, near):
            axis.annotate(
                f"{row['probability']:.3f}",
                (farthest * 1.06, place),
                va="center",
                fontsize=7,
                annotation_clip=False,
            )
        axis.set_yticks(places, [row["neighbor"] for row in near])
        axis.invert_yaxis()
        axis.set_xlim(0, farthest * 1.04)
        axis.set_title(f"{word}  keeps {near[0]['keeps']:.2f}", fontsize=9, loc="left")
    for axis in list(axes.flat)[len(by_word) :]:
        axis.set_visible(False)
    axes[0][0].set_xlabel("distance; at the right, probability", fontsize=7)
    pictures.save_plot(figure, path, title)
