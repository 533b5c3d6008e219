"""``fairseq-skd explain``: the soft target of every position of a real sentence."""

from pathlib import Path
from typing import Any, Dict, List, Optional, Tuple

import typer
from torch import Tensor
from typing_extensions import Annotated

from fairseq_skd.commands import CommandError, output, pictures
from fairseq_skd.commands.output import AsCSV, AsJSON, Plot, Rows, Titled
from fairseq_skd.commands.teaching import Checkpoint, Settings, settings_of, teacher_for
from fairseq_skd.commands.trained import Trained, load, readable
from fairseq_skd.compatibility import text_layout
from fairseq_skd.loss import training_target
from fairseq_skd.options import SelfKDOptions
from fairseq_skd.self_check import soft_target_of
from fairseq_skd.soft_targets import SoftTarget
from fairseq_skd.sources import described
from fairseq_skd.stored import StoredTargets
from fairseq_skd.word_file import WordFileError

__all__ = ["explain"]


def explain(
    checkpoint: Checkpoint,
    data: Annotated[Path, typer.Argument(help="Folder made by fairseq-preprocess.")],
    sentence: Annotated[
        int, typer.Option(help="Its number in the text, from 0 (a block of a language model).")
    ] = 0,
    text: Annotated[
        Optional[str],
        typer.Option(
            help="train, valid, test, ... of the data.",
            show_default="valid, with stored train",
        ),
    ] = None,
    shown: Annotated[int, typer.Option(help="Words shown of a distribution.")] = 3,
    candidates: Annotated[
        Optional[str], typer.Option(help="neighbors, prediction, both, past or stored.")
    ] = None,
    teacher: Annotated[
        Optional[str], typer.Option(help="The file of stored; --text is the text that it is of.")
    ] = None,
    weight: Annotated[
        Optional[float], typer.Option(help="alpha; default: its final value in the training.")
    ] = None,
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
    """Show what a model is taught at every position of a sentence.

    The target, the model's first choices, the soft target, and the target that it is trained on,
    which mixes the label-smoothed target with the soft one. With `past` the soft target is what
    the model gives now, which is what it would record for the next epoch.

    Example:

      fairseq-skd explain checkpoint_best.pt data-bin --sentence 3 --plot sentence.png
    """
    pictures.check_plot(plot)
    trained = load(checkpoint, data, user_dir)
    settings = settings_of(
        trained,
        candidates=candidates,
        teacher=teacher,
        weight=weight,
        top_k=top_k,
        similarity=similarity,
        sigma=sigma,
        sigma_scale=sigma_scale,
        max_mass=max_mass,
    )
    if text is None:
        text = "train" if settings.candidates == "stored" else "valid"
    rows, about = positions(trained, settings, text, sentence, shown)
    weight = settings.weight
    title = (
        f"Sentence {sentence} of {text}; {about}\n"
        f"trained on: {1 - weight:g} x label smoothing {trained.label_smoothing:g} + "
        f"{weight:g} x soft target"
    )
    if settings.candidates == "past":
        title += ", of which each position takes as much as the past gave to the target"
    formats = {"probability": ".3f", "trained_on": ".3f", "on_all_words": ".3f"}
    table = [{name: value for name, value in row.items() if name != "mixed"} for row in rows]
    output.show({"positions": Titled(title, table)}, formats, as_json, as_csv)
    if plot is not None:
        draw(rows, title, plot)


def positions(
    trained: Trained, settings: SelfKDOptions, text: str, sentence: int, shown: int = 3
) -> Tuple[Rows, str]:
    """Return a row for each position of a sentence, and how its soft targets were made.

    Beside what is printed a row has ``mixed``, the words of the final target with their weights.

    Raises
    ------
    CommandError
        If there is no such sentence.
    """
    dataset = trained.dataset(text, training=settings.candidates == "stored")
    if not 0 <= sentence < len(dataset):
        raise CommandError(f"--sentence is {sentence}; allowed: 0 to {len(dataset) - 1} in {text}")
    batch = dataset.collater([dataset[sentence]])
    lprobs, target = trained.predict(batch)
    if settings.candidates == "stored":
        soft, about = _stored(trained, settings, text, sentence, target)
    else:
        soft, about = _soft_target(trained, settings, lprobs, target)
    return _rows(trained, settings, lprobs, target, soft, shown), about


def _soft_target(
    trained: Trained, settings: SelfKDOptions, lprobs: Tensor, target: Tensor
) -> Tuple[SoftTarget, str]:
    if settings.candidates == "past":
        values, ids = lprobs.topk(min(settings.top_k, lprobs.size(1)), 1)
        about = f"{trained.path.name}: its own {settings.top_k} most probable words (past)"
        return SoftTarget(ids, values.exp()).trusted(target), about
    teacher, about = teacher_for(trained, settings, target)
    return soft_target_of(teacher, lprobs, target, trained.projection.weight), about


def _stored(
    trained: Trained, settings: SelfKDOptions, text: str, sentence: int, target: Tensor
) -> Tuple[SoftTarget, str]:
    trained.task.self_kd_train_subset = text
    try:
        layout = text_layout(trained.task)
    except ValueError as error:
        raise CommandError(f"{text} cannot have a teacher's file, since {error}") from error
    for name in str(settings.teacher).split(":"):
        try:
            teacher = StoredTargets(name)
        except WordFileError as error:
            raise CommandError(str(error)) from error
        if teacher.belongs_to(layout):
            soft = teacher.read([sentence], len(target), target.device)
            return soft, f"{name}: {described(teacher)}"
    raise CommandError(
        f"--teacher is {settings.teacher}, which does not hold the words of {text!r}; --text takes "
        "the text that it was made for"
    )


def _rows(
    trained: Trained,
    settings: SelfKDOptions,
    lprobs: Tensor,
    target: Tensor,
    soft: SoftTarget,
    shown: int,
) -> Rows:
    num_words = lprobs.size(1)
    show = readable(trained.task.target_dictionary)
    mixed = training_target(target, soft, trained.label_smoothing, settings.weight, num_words)
    best = lprobs.exp().topk(min(shown, num_words), 1)
    rows: Rows = []
    for i, t in enumerate(target.tolist()):
        total: Dict[int, float] = {}
        for j, value in zip(mixed.ids[i].tolist(), mixed.weights[i].tolist()):
            total[j] = total.get(j, 0.0) + value
        uniform = 0.0 if mixed.uniform is None else mixed.uniform[i].item()
        ordered = sorted(total.items(), key=lambda item: (item[0] != t, -item[1]))
        rows.append(
            {
                "position": i,
                "target": show(t),
                "probability": lprobs[i, t].exp().item(),
                "first_choices": _list(show, best.indices[i].tolist(), best.values[i].tolist()),
                "soft_target": _list(
                    show, *_largest(soft.ids[i].tolist(), soft.weights[i].tolist(), shown)
                ),
                "trained_on": total[t] + uniform,
                "on_all_words": uniform * num_words,
                "mixed": [(show(j), value + uniform) for j, value in ordered],
            }
        )
    return rows


def _largest(ids: List[int], weights: List[float], count: int) -> Tuple[List[int], List[float]]:
    pairs = sorted(zip(weights, ids), reverse=True)[:count]
    return [j for _, j in pairs], [q for q, _ in pairs]


def _list(show: Any, ids: List[int], values: List[float]) -> str:
    return ", ".join(f"{show(j)} {value:.2f}" for j, value in zip(ids, values) if value >= 0.005)


def draw(rows: Rows, title: str, path: Path) -> None:
    """Draw a line a position: the target at the left, then the words that share with it."""
    pyplot = pictures.pyplot()
    width = min(7, max(len(row["mixed"]) for row in rows))
    figure, axis = pyplot.subplots(figsize=(1.6 + 1.4 * width, 1.1 + 0.24 * len(rows)))
    heat_map(axis, rows, width)
    axis.set_ylabel("position")
    pictures.save_plot(figure, path, title)


def heat_map(axis: Any, rows: Rows, width: int) -> None:
    """Draw the targets of some positions into axes of matplotlib's."""
    from matplotlib.colors import PowerNorm

    grid = [[0.0] * width for _ in rows]
    for i, row in enumerate(rows):
        for column, (word, value) in enumerate(row["mixed"][:width]):
            grid[i][column] = value
            if value < 0.005:  # 0.00
                continue
            axis.text(
                *(column, i, f"{word} {value:.2f}"),
                ha="center",
                va="center",
                fontsize=7,
                color="white" if value > 0.25 else "black",
                parse_math=False,
            )
    norm = PowerNorm(0.4, 0, 1)  # else 0.05 and nothing look alike
    image = axis.imshow(grid, cmap="Greys", norm=norm, aspect="auto")
    axis.set_xticks(range(width), ["target", *(f"other {i}" for i in range(1, width))])
    axis.xaxis.tick_top()
    axis.set_yticks(range(len(rows)), [row["position"] for row in rows])
    for spine in axis.spines.values():
        spine.set_visible(False)
    label = "weight in the target of the training"
    axis.figure.colorbar(image, ax=axis, label=label, shrink=0.8)
