"""The settings of soft targets on a command line, and a teacher for some words of a model."""

import dataclasses
from pathlib import Path
from typing import Any, Optional, Tuple

import torch
import typer
from torch import Tensor
from typing_extensions import Annotated

from fairseq_skd.commands import CommandError
from fairseq_skd.commands.output import progress
from fairseq_skd.commands.trained import Trained
from fairseq_skd.neighbors import Neighbors, nearest_neighbors
from fairseq_skd.options import SelfKDOptions, parse_number
from fairseq_skd.soft_targets import SelfTeacher, automatic_sigma

__all__ = ["Checkpoint", "Settings", "settings_of", "teacher_for"]

# The automatic sigma is a mean over all words. Of so many, drawn at random, it is known to about
# 1 % (distances to the nearest words scatter by about a third), in seconds where all take an hour.
_SAMPLE = 2_000

Checkpoint = Annotated[Path, typer.Argument(help="A fairseq checkpoint.")]


class Settings:
    """Options that several subcommands have."""

    data = Annotated[
        Optional[Path],
        typer.Option(help="Folder made by fairseq-preprocess. Default: that of the training."),
    ]
    top_k = Annotated[Optional[int], typer.Option(help="k, as --self-kd-top-k.")]
    similarity = Annotated[Optional[str], typer.Option(help="cosine or euclidean.")]
    sigma = Annotated[Optional[str], typer.Option(help="A number, or auto.")]
    sigma_scale = Annotated[Optional[float], typer.Option(help="Factor on the automatic sigma.")]
    max_mass = Annotated[Optional[float], typer.Option(help="Largest mass given away.")]
    user_dir = Annotated[
        Optional[Path], typer.Option(help="Another plugin of fairseq's that the model needs.")
    ]


def settings_of(trained: Trained, **given: Any) -> SelfKDOptions:
    """Return the settings of a model's training, or the defaults, and what was given instead.

    Raises
    ------
    CommandError
        For a value that is not allowed.
    """
    changes = {name: value for name, value in given.items() if value is not None}
    if changes.get("candidates", "stored") != "stored":
        changes["teacher"] = None  # of the training, if it had one
    try:
        if "sigma" in changes:
            allowed = "a positive number"
            changes["sigma"] = parse_number("--sigma", changes["sigma"], float, allowed)
        return dataclasses.replace(trained.options or SelfKDOptions(), **changes)
    except ValueError as error:
        raise CommandError(str(error).replace("--self-kd-", "--")) from error


def teacher_for(
    trained: Trained, settings: SelfKDOptions, words: Tensor
) -> Tuple[SelfTeacher, str]:
    """Return a teacher that knows the neighbours of some words, and one line about it.

    Raises
    ------
    CommandError
        If there are not more than k words that may be neighbours.
    """
    projection = trained.projection
    weight = projection.weight.detach()
    eligible, which = trained.eligible()
    eligible = eligible.to(weight.device)
    if settings.top_k >= len(eligible):
        raise CommandError(
            f"--top-k is {settings.top_k}; allowed: 1 to {len(eligible) - 1}, since "
            f"{len(eligible)} words may be neighbours"
        )
    like = settings.top_k, eligible, settings.similarity
    sigma, how = settings.sigma, ""
    if sigma is None:
        sample = eligible
        if len(eligible) > _SAMPLE:
            generator = torch.Generator().manual_seed(1)
            chosen = torch.randperm(len(eligible), generator=generator)[:_SAMPLE]
            sample = eligible[chosen.to(weight.device)]
            how = f" of {_SAMPLE} words"
        parts = [
            nearest_neighbors(weight, *like, words=part)
            for part in progress(sample.split(100), "measuring sigma")
        ]
        measured = Neighbors(*(torch.cat(tensors) for tensors in zip(*parts)))
        sigma = automatic_sigma(measured, scale=settings.sigma_scale).item()
        how = f" ({settings.sigma_scale:g} x the mean distance{how} to their nearest)"
    teacher = SelfTeacher(
        candidates=settings.candidates,
        top_k=settings.top_k,
        similarity=settings.similarity,
        sigma=sigma,
        max_mass=settings.max_mass,
        eligible=eligible,
    )
    teacher.refresh(weight, words.to(weight.device).unique())
    title = (
        f"{trained.path.name}: {settings.similarity} distance, k = {settings.top_k}, "
        f"sigma = {sigma:.3f}{how}, largest mass {settings.max_mass:g}; neighbours: {which}"
    )
    return teacher, title
