"""What is to be run: the declaration of experiments, read and checked."""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Mapping, Sequence, Tuple

from omegaconf import OmegaConf

ROOT = Path(__file__).resolve().parents[1]


class PlanError(Exception):
    """The declaration asks for something that is not there; the message says what is."""


@dataclass(frozen=True)
class Made:
    """What finished runs have to make before another is trained: a teacher's file, or a text.

    Attributes
    ----------
    runs : sequence of Run
        Whose best checkpoints make it.
    path : Path
        What comes of it: the same path is made once.
    command : list of str
        Makes it, and does nothing where it is there already.
    """

    runs: Sequence["Run"]
    path: Path
    command: List[str]


@dataclass(frozen=True)
class Run:
    """One arm of one task with one seed.

    Attributes
    ----------
    experiment, task, arm : str
        Their names in the declaration.
    recipe, out : Path
        The folder of the recipe's scripts, and that of its data, in which the run gets its own.
    criterion : str
        Of ``train.sh``.
    options, evaluate_options, prepare_options : sequence of str
        For ``train.sh``, ``evaluate.sh`` and ``prepare.sh``.
    made : sequence of Made
        What has to be there before, in this order.
    """

    experiment: str
    task: str
    arm: str
    seed: int
    recipe: Path
    out: Path
    criterion: str
    options: Sequence[str]
    evaluate_options: Sequence[str]
    prepare_options: Sequence[str]
    made: Sequence[Made] = ()

    @property
    def generation(self) -> int:
        """How many trainings have to come before, one after the other."""
        before = [run.generation for made in self.made for run in made.runs]
        return 1 + max(before) if before else 0

    @property
    def folder(self) -> Path:
        """Where the recipe keeps what it trains; experiments share it."""
        return self.out / f"{self.task}-{self.arm}-seed{self.seed}"

    @property
    def data(self) -> Path:
        """The binarised text."""
        return self.out / "data"

    @property
    def evaluation(self) -> Path:
        """What evaluate.sh has printed."""
        return self.folder / "evaluation.txt"

    @property
    def machine(self) -> Path:
        """What it was begun on."""
        return self.folder / "machine"

    @property
    def prepared(self) -> "Run":
        """Whose data ``prepare.sh`` makes: itself, or a run that has translated its text."""
        for made in self.made:
            if made.path == self.data:
                return made.runs[0].prepared
        return self

    @property
    def prepare(self) -> List[str]:
        """Return the command that prepares its data."""
        script = str(self.recipe / "prepare.sh")
        return [script, "--out", str(self.out), *self.prepare_options]

    @property
    def train(self) -> List[str]:
        """Return the command that trains."""
        return [str(self.recipe / "train.sh"), *self._which(), *self.options]

    @property
    def evaluate(self) -> List[str]:
        """Return the command that scores."""
        return [str(self.recipe / "evaluate.sh"), *self._which(), *self.evaluate_options]

    def _which(self) -> List[str]:
        name = ["--out", str(self.out), "--name", self.folder.name, "--seed", str(self.seed)]
        return [self.criterion, *name]


def read(path: Path, out: Path) -> List[Run]:
    """Return all runs of a declaration, experiment by experiment and seed by seed.

    Parameters
    ----------
    path : Path
        ``plan.yaml`` is one, and says what it means.
    out : Path
        Holds a folder of prepared data for each task.

    Raises
    ------
    PlanError
        If a name is not declared, or two tasks of an experiment share one of an arm.
    """
    declared: Any = OmegaConf.to_container(OmegaConf.load(path))
    runs = []
    tasks: Dict[Tuple[str, str], str] = {}
    for experiment in declared["experiments"]:
        for seed in experiment["seeds"]:
            for arm in experiment["arms"]:
                run = _run(path, declared, out, experiment["task"], arm, seed, experiment["name"])
                other = tasks.setdefault((run.experiment, arm), run.task)
                if other != run.task:  # its figures would be the mean of both
                    raise PlanError(
                        f"{path}: the experiment {run.experiment} has an arm {arm} of {other} and "
                        f"one of {run.task}; give them names of their own"
                    )
                runs.append(run)
    return runs


def _run(
    path: Path, declared: Any, out: Path, task_name: str, arm_name: str, seed: int, experiment: str
) -> Run:
    task = _named(path, "task", task_name, declared["tasks"])
    arm = _named(path, "arm", arm_name, declared["arms"])
    folder = out / task["data"]
    options = _flat([task.get("options", []), arm.get("options", [])])
    places = {"root": str(ROOT), "seed": str(seed)}
    recipe = ROOT / "examples" / task["recipe"]
    made = []
    if "translated_by" in task:
        runs = _runs(path, declared, out, task["translated_by"], seed, experiment)
        script = str(recipe.parent / "distil" / "translate.sh")
        names = ":".join(run.folder.name for run in runs)
        command = [script, recipe.name, names, "--out", str(runs[0].out), "--into", str(folder)]
        made.append(Made(runs, folder / "data", command))
    if "teachers" in arm:
        runs = _runs(path, declared, out, arm["teachers"], seed, experiment)
        checkpoints = ":".join(str(run.folder / "checkpoint_best.pt") for run in runs)
        first, seeds = runs[0], "+".join(str(run.seed) for run in runs)
        how = _flat(arm["teachers"].get("teach", []))
        named = "".join(how).replace("--", "-")  # another file than without the options
        file = folder / f"{first.task}-{first.arm}-seeds{seeds}{named}.skd"
        program = [str(Path(sys.executable).parent / "fairseq-skd"), "teach", str(folder / "data")]
        command = [*program, "--path", checkpoints, "--output", str(file), *how]
        made.append(Made(runs, file, command))
        options += ["--self-kd-teacher", str(file)]
    run = Run(
        experiment=experiment,
        task=task_name,
        arm=arm_name,
        seed=seed,
        recipe=recipe,
        out=folder,
        criterion=arm["criterion"],
        options=[_placed(option, places) for option in options],
        evaluate_options=_flat(task.get("evaluate", [])),
        prepare_options=_flat(task.get("prepare", [])),
        made=made,
    )
    for one in made:
        if one.runs[0].prepared.out != run.prepared.out:
            raise PlanError(f"{path}: the teachers of {arm_name} have other data than {task_name}")
    return run


def _runs(
    path: Path, declared: Any, out: Path, which: Mapping[str, Any], own: int, experiment: str
) -> List[Run]:
    """Return the finished runs that ``teachers`` or ``translated_by`` names; ``own`` is a seed."""
    seeds = (own if seed == "own" else seed for seed in which["seeds"])
    return [
        _run(path, declared, out, which["task"], which["arm"], seed, experiment) for seed in seeds
    ]


def _named(path: Path, kind: str, name: str, declared: Mapping[str, Any]) -> Dict[str, Any]:
    if name not in declared:
        raise PlanError(f"{path}: the {kind} is {name}; allowed: {', '.join(declared)}")
    found: Dict[str, Any] = declared[name]
    return found


def _flat(options: Sequence[Any]) -> List[str]:
    """Return options in one list; a declaration may hold them in lists of lists."""
    lists = (_flat(option) if isinstance(option, list) else [str(option)] for option in options)
    return [option for part in lists for option in part]


def _placed(option: str, places: Mapping[str, str]) -> str:
    for name, value in places.items():
        option = option.replace(f"{{{name}}}", value)
    return option
