"""What is to be run: the declaration of experiments, read and checked."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any, List, Sequence

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]


class PlanError(Exception):
    """The declaration asks for something that is not there; the message says what is."""


@dataclass(frozen=True)
class Run:
    """One arm of one task with one seed.

    Attributes
    ----------
    recipe : Path
        The folder of the recipe's scripts.
    out : Path
        The folder of its data, in which the run gets one of its own.
    options : sequence of str
        For fairseq-train.
    """

    task: str
    arm: str
    seed: int
    recipe: Path
    out: Path
    criterion: str
    options: Sequence[str]

    @property
    def folder(self) -> Path:
        """Where the recipe keeps what it trains."""
        return self.out / f"{self.arm}-seed{self.seed}"

    @property
    def train(self) -> List[str]:
        """The command that trains."""
        return [str(self.recipe / "train.sh"), *self._which(), *self.options]

    @property
    def evaluate(self) -> List[str]:
        """The command that scores."""
        return [str(self.recipe / "evaluate.sh"), *self._which()]

    def _which(self) -> List[str]:
        name = ["--out", str(self.out), "--name", self.folder.name, "--seed", str(self.seed)]
        return [self.criterion, *name]


def read(path: Path, out: Path) -> List[Run]:
    """Read a declaration.

    Parameters
    ----------
    path : Path
        A YAML file with ``tasks``, ``arms`` and ``experiments``; ``experiments.yaml`` is one.
    out : Path
        Holds one folder of prepared data for each recipe, with the recipe's name.

    Returns
    -------
    list of Run
        Experiment by experiment and seed by seed, so that every arm has a first seed early.

    Raises
    ------
    PlanError
        If a task or an arm is not declared, or a recipe's data is not prepared.
    """
    declared: Any = OmegaConf.to_container(OmegaConf.load(path))
    tasks, arms = declared["tasks"], declared["arms"]
    runs = []
    for experiment in declared["experiments"]:
        name = experiment["task"]
        _check(path, "task", [name], tasks)
        _check(path, "arm", experiment["arms"], arms)
        recipe = ROOT / "examples" / tasks[name]["recipe"]
        folder = out / recipe.name
        if not (folder / "data").is_dir():
            raise PlanError(f"{folder} holds no data; first:  {recipe}/prepare.sh --out {folder}")
        for seed in experiment["seeds"]:
            for arm in experiment["arms"]:
                options = [*tasks[name].get("options", []), *arms[arm].get("options", [])]
                texts = [str(option) for option in options]
                criterion = arms[arm]["criterion"]
                runs.append(Run(name, arm, seed, recipe, folder, criterion, texts))
    return runs


def _check(path: Path, kind: str, names: Sequence[str], declared: Any) -> None:
    for name in names:
        if name not in declared:
            raise PlanError(f"{path}: the {kind} is {name}; allowed: {', '.join(declared)}")
