"""Begin a run with what another one has learnt so far: ``python -m experiments.runner.branch``.

Until distillation begins, self-KD trains what its baseline trains. So runs that begin it at the
same update may share all updates before it: the folder of each gets the baseline's checkpoint of
that update as its last one, and `train.sh` goes on from there, with the state of the optimizer, of
the schedule and of the data. (fairseq puts the batches of an epoch that it resumes in an order of
their own, the same one for all of these runs.)
"""

import argparse
import sys
from pathlib import Path
from typing import Any, Optional

import torch
from fairseq import utils
from fairseq.criterions import CRITERION_REGISTRY

import fairseq_skd  # noqa: F401  (lets fairseq's checkpoints be loaded)


def trunk_checkpoint(trunk: Path, updates: int) -> Optional[Path]:
    """Return the checkpoint of a run after so many updates, None if it is not there (yet)."""
    return next(trunk.glob(f"checkpoint_*_{updates}.pt"), None)


def branch(checkpoint: Path, folder: Path, criterion: str) -> None:
    """Write the checkpoint with which a run begins.

    Parameters
    ----------
    checkpoint : Path
        Of fairseq's, with the state of its optimizer.
    folder : Path
        Of the new run.
    criterion : str
        Its registered name. fairseq refuses the optimizer of a run with another criterion.
    """
    state: Any = torch.load(checkpoint, map_location="cpu", weights_only=True)
    name = CRITERION_REGISTRY[criterion].__name__
    state["optimizer_history"][-1]["criterion_name"] = name
    # Of its own validation losses the best one counts: another criterion's have another scale.
    state["extra_state"].pop("best", None)
    folder.mkdir(parents=True, exist_ok=True)
    partial = folder / "branch.partial"
    torch.save(state, partial)
    partial.replace(folder / "checkpoint_last.pt")


def main() -> None:
    """Begin a run, unless it has begun."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trunk", type=Path, help="folder of the run that has learnt")
    parser.add_argument("updates", type=int, help="how long: it must have kept that checkpoint")
    parser.add_argument("folder", type=Path, help="folder of the run that begins")
    parser.add_argument("--criterion", required=True, help="its criterion")
    parser.add_argument("--user-dir", help="where that is")
    args = parser.parse_args()
    checkpoint = trunk_checkpoint(args.trunk, args.updates)
    if checkpoint is None:
        sys.exit(f"{args.trunk} has no checkpoint of update {args.updates}")
    utils.import_user_module(args)
    if args.criterion not in CRITERION_REGISTRY:
        sys.exit(f"--criterion is {args.criterion}, which neither fairseq nor --user-dir has")
    if (args.folder / "checkpoint_last.pt").exists():
        print(f"{args.folder} has begun already")
        return
    branch(checkpoint, args.folder, args.criterion)
    print(f"{args.folder} begins with {checkpoint}")


if __name__ == "__main__":
    main()
