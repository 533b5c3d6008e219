"""What is to be run: the declaration of experiments, read and checked."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Optional, Sequence

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[2]
TEXTS = ("valid", "test")


class PlanError(Exception):
    """The declaration asks for something that is not there; the message says what is."""


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
        What it begins with; see `experiments.runner.branch`.
    after : Path, optional
        The folder of a run that has to be trained before this one begins.
    prepare : sequence of str
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
    trunk: Optional["Trunk"] = None
    after: Optional[Path] = None
    prepare: Sequence[str] = ()

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
        program = [sys.executable, "-m", "experiments.runner.branch"]
        folders = [str(self.trunk.run.folder), str(self.trunk.updates), str(self.folder)]
        user_dir = self.option("--user-dir") or str(ROOT / "fairseq_skd")
        criterion = self.option("--criterion") or self.criterion
        return [*program, *folders, "--criterion", criterion, "--user-dir", user_dir]

    def evaluate(self, text: str, length_penalty: Optional[float] = None) -> List[str]:
        """Return the command that scores one of the texts."""
        only_valid = ["--valid"] if text == "valid" else []
        generation = [] if length_penalty is None else ["--lenpen", str(length_penalty)]
        options = [*only_valid, *self.evaluation_options, *generation]
        return [str(self.recipe / "evaluate.sh"), *self._which(), *options]

    @property
    def calibrate(self) -> List[str]:
        """The command that predicts all of its texts, after evaluation."""
        average = self.folder / "average.pt"
        averaged = average.exists() and "--best" not in self.evaluation_options
        checkpoint = average if averaged else self.folder / "checkpoint_best.pt"
        data = self.out / "data"
        texts = sorted({path.name.split(".")[0] for path in data.glob(f"{self.text}*.bin")})
        program = [str(Path(sys.executable).parent / "fairseq-skd"), "calibration"]
        return [*program, str(checkpoint), str(data), "--text", ",".join(texts), "--json"]

    def option(self, name: str) -> Optional[str]:
        """Return the value of an option for fairseq-train, None if it is not given."""
        found = [value for key, value in zip(self.options, self.options[1:]) if key == name]
        return found[-1] if found else None

    def _which(self) -> List[str]:
        name = ["--out", str(self.out), "--name", self.folder.name, "--seed", str(self.seed)]
        return [self.criterion, *name]


@dataclass(frozen=True)
class Trunk:
    """The run with which another one shares its first updates, and how many."""

    run: Run
    updates: int


def read(path: Path, out: Path) -> List[Run]:
    """Read a declaration.

    Parameters
    ----------
    path : Path
        A YAML file with ``tasks``, ``arms`` and ``experiments``; ``plan.yaml`` is one, and
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
        If a name is not declared, a run needs one that is not declared before it, or begins with
        more of it than both train alike, or two runs of a name are not the same.
    """
    declared: Any = OmegaConf.to_container(OmegaConf.load(path))
    tasks, arms = declared["tasks"], declared["arms"]
    runs: List[Run] = []
    declared_before: Dict[Path, Run] = {}
    for experiment in declared["experiments"]:
        name = experiment["task"]
        _check(path, "task", [name], tasks)
        task = tasks[name]
        _check(path, "arm", experiment["arms"], arms)
        _check(path, "text", [experiment["text"]], TEXTS)
        recipe = ROOT / "examples" / task["recipe"]
        folder = out / task.get("data", recipe.name)
        prepare = [
            str(recipe / "prepare.sh"),
            "--out",
            str(folder),
            *map(str, task.get("prepare", [])),
        ]
        for seed in experiment["seeds"]:
            for arm in experiment["arms"]:
                criterion = arms[arm]["criterion"]
                distils = criterion == "self_kd"
                given = [
                    *task.get("options", []),
                    *(task.get("self_kd", []) if distils else []),
                    *arms[arm].get("options", []),
                ]
                shared = task.get("trunk", {})
                begins_with = shared and arms[arm].get("trunk", distils and shared["arm"])
                needed: Dict[str, Run] = {}
                for other in filter(None, (begins_with, arms[arm].get("after"))):
                    before = declared_before.get(folder / f"{name}-{other}-seed{seed}")
                    if before is None:
                        raise PlanError(
                            f"{path}: {arm} of {name} needs {other} with seed {seed}, which is not "
                            "declared before it"
                        )
                    needed[other] = before
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
                    trunk=Trunk(needed[begins_with], shared["updates"]) if begins_with else None,
                    after=needed[arms[arm]["after"]].folder if "after" in arms[arm] else None,
                    prepare=prepare,
                )
                start = run.option("--self-kd-start-update")
                if run.trunk and start is not None and int(start) < run.trunk.updates:
                    raise PlanError(
                        f"{path}: {arm} of {name} distils from update {start}, so it cannot begin "
                        f"with {run.trunk.updates} updates of {begins_with}; say  trunk: false"
                    )
                if declared_before.setdefault(run.folder, run).train != run.train:
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
            raise PlanError(f"{run.out} holds no data; first:  {' '.join(run.prepare)}")


def _flat(options: Sequence[Any]) -> List[Any]:
    """Return options in one list; a declaration may hold them in lists of lists."""
    lists = (_flat(option) if isinstance(option, list) else [option] for option in options)
    return [option for part in lists for option in part]


def _placed(option: str, places: Mapping[str, Any]) -> str:
    for name, value in places.items():
        option = option.replace(f"{{{name}}}", str(value))
    return option


def _check(path: Path, kind: str, names: Sequence[str], declared: Any) -> None:
    for name in names:
        if name not in declared:
            raise PlanError(f"{path}: the {kind} is {name}; allowed: {', '.join(declared)}")
