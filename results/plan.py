"""What is to be run: the declaration of experiments, read and checked."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]
TEXTS = ("valid", "test")


class PlanError(Exception):
    """The declaration asks for something that is not there; the message says what is."""


@dataclass(frozen=True)
class Trunk:
    """The run with which another one shares its first updates: its folder, and how many."""

    folder: Path
    updates: int


@dataclass(frozen=True)
class Run:
    """One arm of one task with one seed.

    Attributes
    ----------
    experiment, task, arm : str
        Their names in the declaration.
    text : {"valid", "test"}
        What the trained model is scored on.
    recipe : Path
        The folder of the recipe's scripts.
    out : Path
        The folder of its data, in which the run gets one of its own.
    criterion : str
        Of ``train.sh``.
    options : sequence of str
        For fairseq-train.
    evaluation_options : sequence of str
        For ``evaluate.sh``.
    length_penalties : sequence of float
        Of which the one with the best BLEU on validation text is taken; none: the recipe's.
    trunk : Trunk, optional
        What it begins with; see `results.branch`.
    prepare : str
        The command that prepares its data.
    """

    experiment: str
    task: str
    arm: str
    seed: int
    text: str
    recipe: Path
    out: Path
    criterion: str
    options: Sequence[str]
    evaluation_options: Sequence[str] = ()
    length_penalties: Sequence[float] = ()
    trunk: Optional[Trunk] = None
    prepare: str = ""

    @property
    def folder(self) -> Path:
        """Where the recipe keeps what it trains; experiments share it."""
        return self.out / f"{self.task}-{self.arm}-seed{self.seed}"

    @property
    def evaluation(self) -> Path:
        """What evaluation has printed."""
        return self.folder / f"evaluation-{self.text}.txt"

    @property
    def train(self) -> List[str]:
        """The command that trains."""
        return [str(self.recipe / "train.sh"), *self._which(), *self.options]

    @property
    def branch(self) -> List[str]:
        """The command before it, if the run has a trunk: it begins with that."""
        if self.trunk is None:
            return []
        program = [sys.executable, "-m", "results.branch"]
        folders = [str(self.trunk.folder), str(self.trunk.updates), str(self.folder)]
        user_dir = self._option("--user-dir", str(ROOT / "fairseq_skd"))
        criterion = self._option("--criterion", self.criterion)
        return [*program, *folders, "--criterion", criterion, "--user-dir", user_dir]

    def evaluate(self, text: str, length_penalty: Optional[float] = None) -> List[str]:
        """Return the command that scores one of the texts."""
        only_valid = ["--valid"] if text == "valid" else []
        generation = [] if length_penalty is None else ["--lenpen", str(length_penalty)]
        options = [*only_valid, *self.evaluation_options, *generation]
        return [str(self.recipe / "evaluate.sh"), *self._which(), *options]

    def _option(self, name: str, default: str) -> str:
        found = [value for key, value in zip(self.options, self.options[1:]) if key == name]
        return found[-1] if found else default

    def _which(self) -> List[str]:
        name = ["--out", str(self.out), "--name", self.folder.name, "--seed", str(self.seed)]
        return [self.criterion, *name]


def read(path: Path, out: Path) -> List[Run]:
    """Read a declaration.

    Parameters
    ----------
    path : Path
        A YAML file with ``tasks``, ``arms`` and ``experiments``; ``experiments.yaml`` is one, and
        says what they mean.
    out : Path
        Holds one folder of prepared data for each task, with the name of its recipe or of ``data``.

    Returns
    -------
    list of Run
        Experiment by experiment and seed by seed, so that every arm has a first seed early.

    Raises
    ------
    PlanError
        If a name is not declared, a run begins with one that is not declared before it, or two runs
        of a name are not the same.
    """
    declared: Any = OmegaConf.to_container(OmegaConf.load(path))
    tasks, arms = declared["tasks"], declared["arms"]
    runs: List[Run] = []
    trained: Dict[Path, List[str]] = {}
    for experiment in declared["experiments"]:
        name = experiment["task"]
        _check(path, "task", [name], tasks)
        task = tasks[name]
        _check(path, "arm", experiment["arms"], arms)
        _check(path, "text", [experiment["text"]], TEXTS)
        recipe = ROOT / "examples" / task["recipe"]
        folder = out / task.get("data", recipe.name)
        prepare = [f"{recipe}/prepare.sh", "--out", str(folder), *map(str, task.get("prepare", []))]
        for seed in experiment["seeds"]:
            for arm in experiment["arms"]:
                criterion = arms[arm]["criterion"]
                distils = criterion == "self_kd"
                given = [
                    *task.get("options", []),
                    *(task.get("self_kd", []) if distils else []),
                    *arms[arm].get("options", []),
                ]
                trunk = None
                shared = task.get("trunk", {})
                begins_with = arms[arm].get("trunk", distils and shared.get("arm"))
                if shared and begins_with:
                    began = folder / f"{name}-{begins_with}-seed{seed}"
                    trunk = Trunk(began, shared["updates"])
                    if began not in trained:
                        raise PlanError(
                            f"{path}: {arm} of {name} begins with {began.name}, which is not "
                            "declared before it"
                        )
                places = {"root": ROOT, "out": folder, "task": name, "seed": seed}
                run = Run(
                    experiment=experiment["name"],
                    task=name,
                    arm=arm,
                    seed=seed,
                    text=experiment["text"],
                    recipe=recipe,
                    out=folder,
                    criterion=criterion,
                    options=[_placed(str(option), places) for option in _flat(given)],
                    evaluation_options=[str(option) for option in _flat(task.get("evaluate", []))],
                    length_penalties=experiment.get("length_penalties", []),
                    trunk=trunk,
                    prepare=" ".join(prepare),
                )
                if trained.setdefault(run.folder, run.train) != run.train:
                    raise PlanError(
                        f"{path}: two experiments train {run.folder.name} with other options"
                    )
                runs.append(run)
    return runs


def check_prepared(runs: Sequence[Run]) -> None:
    """Refuse runs whose data is not there.

    Raises
    ------
    PlanError
        With the command that prepares it.
    """
    for run in runs:
        if not (run.out / "data").is_dir():
            raise PlanError(f"{run.out} holds no data; first:  {run.prepare}")


def _flat(options: Sequence[Any]) -> List[Any]:
    """Return options in one list; a declaration may hold them in several."""
    lists = (option if isinstance(option, list) else [option] for option in options)
    return [option for part in lists for option in part]


def _placed(option: str, places: Mapping[str, Any]) -> str:
    for name, value in places.items():
        option = option.replace(f"{{{name}}}", str(value))
    return option


def _check(path: Path, kind: str, names: Sequence[str], declared: Any) -> None:
    for name in names:
        if name not in declared:
            raise PlanError(f"{path}: the {kind} is {name}; allowed: {', '.join(declared)}")
