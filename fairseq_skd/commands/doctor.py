"""``fairseq-skd doctor``: what is installed, which loss would be used, and is it right here?"""

import importlib.metadata
import importlib.util
import os
import platform
from pathlib import Path
from typing import Callable, Dict, Optional

import torch
import typer
from typing_extensions import Annotated

from fairseq_skd.checkpoints import faults_of_the_loader
from fairseq_skd.commands import CommandError, output
from fairseq_skd.commands.output import AsCSV, AsJSON, Rows, Titled, waiting
from fairseq_skd.self_check import LossCheckError, check_linear_loss, check_loss
from fairseq_skd.soft_targets import SelfTeacher
from fairseq_skd.stored import StoredTargets
from fairseq_skd.word_file import WordFile, WordFileError

__all__ = ["doctor"]

PACKAGES = [
    *("fairseq_skd", "fairseq", "ve-fairseq", "torch", "triton", "hydra-core", "omegaconf"),
    *("numpy", "sacrebleu", "sentencepiece", "typer", "matplotlib"),
]
_RIGHT = "as the reference"
# Not a multiple of anything that the loss works in.
_WORDS, _DIM, _POSITIONS = 1_003, 24, 70


def doctor(
    file: Annotated[
        Optional[Path],
        typer.Argument(help="A file of a teacher or of the past: what does it hold, is it whole?"),
    ] = None,
    as_json: AsJSON = False,
    as_csv: AsCSV = False,
) -> None:
    """Say what is installed, which loss is used, and whether it is right on this machine.

    To be pasted into a bug report. The loss and its gradients are compared with the readable
    reference on a small random problem, on every device and in every type; a training checks its
    own first batch in the same way.

    Of a file of words (--self-kd-teacher, --self-kd-past-file) it says what that holds instead.
    """
    if file is not None:
        _look_into(file, as_json, as_csv)
        return
    rows: Rows = [
        {"what": "python", "found": f"{platform.python_version()}, {platform.platform()}"}
    ]
    for name in PACKAGES:
        try:
            # torch's own has its build, +cpu or +cu126, where its package may not.
            own = torch.__version__ if name == "torch" else importlib.metadata.version(name)
            rows.append({"what": name, "found": str(own)})
        except importlib.metadata.PackageNotFoundError:
            continue
    rows.append({"what": "CPU", "found": f"{torch.get_num_threads()} threads"})
    devices = [torch.device("cpu")]
    for i in range(torch.cuda.device_count()):
        memory = torch.cuda.get_device_properties(i).total_memory / 2**30
        rows.append(
            {"what": f"cuda:{i}", "found": f"{torch.cuda.get_device_name(i)}, {memory:.0f} GiB"}
        )
    if torch.cuda.is_available():
        devices.append(torch.device("cuda"))
    rows.append({"what": "checkpoints", "found": _loader()})
    checks: Rows = []
    for device in devices:
        for dtype in (torch.float32, torch.bfloat16, torch.float16):
            checks += _check(device, dtype)
    tables = {"versions": Titled("fairseq_skd", rows), "loss": Titled("Loss", checks)}
    output.show(tables, {}, as_json, as_csv)
    wrong = [row for row in checks if row["check"] != _RIGHT]
    if wrong:
        raise CommandError(f"{len(wrong)} checks of the loss have failed: do not train here")


def _look_into(path: Path, as_json: bool, as_csv: bool) -> None:
    """Say what a file of words holds, and fail if it is not whole."""
    try:
        held = WordFile(path)
    except WordFileError as error:
        raise CommandError(str(error)) from error
    head = held.head
    missing = int((held.marks == 0).sum())
    rows: Rows = [{"what": name, "found": str(head[name])} for name in ("kind", "top_k")]
    rows += [{"what": name, "found": f"{head[name]:,}"} for name in ("sentences", "positions")]
    flaw = None
    if head["kind"] == "past":
        rows.append({"what": "sentences not seen yet", "found": f"{missing:,}"})
        rows.append({"what": "last update", "found": str(held.marks.max(initial=0))})
    else:
        for name, told in (head.get("teacher") or {}).items():
            for one in told if isinstance(told, list) else [told]:
                found = ", ".join(map(str, one.values())) if isinstance(one, dict) else str(one)
                rows.append({"what": name, "found": found})
        if missing:
            flaw = f"{path} is not finished: {missing} of {len(held.marks)} sentences are missing"
        else:
            stored = StoredTargets(path)
            rows.append({"what": "fingerprint", "found": stored.fingerprint})
            with waiting("reading all of it"):
                damaged = stored.file.damaged()
            if damaged:
                # `write_stored_targets` knows no text.
                mends = "Write it anew"
                if head["text"] is not None:
                    mends = "The same fairseq-skd teach command mends it"
                flaw = (
                    f"{path} is damaged: {len(damaged)} sentences are not what was written, the "
                    f"first one is {damaged[0]}. {mends}"
                )
            empty = f"{len(stored.file.empty()):,}"
            rows.append({"what": "sentences without words", "found": empty})
        rows.append({"what": "whole", "found": "no" if flaw else "yes"})
    output.show({"file": Titled(str(path), rows)}, {}, as_json, as_csv)
    if flaw:
        raise CommandError(flaw)


def _loader() -> str:
    wrong = faults_of_the_loader()
    # As torch reads it; the commands here ask for the safe loader whatever it says.
    switched_off = os.environ.get("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "0").lower()
    if switched_off in ("1", "y", "yes", "true"):
        wrong.append("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD is set, for fairseq's commands")
    return f"UNSAFE: {'; '.join(wrong)}" if wrong else "safe loader"


def _check(device: torch.device, dtype: torch.dtype) -> Rows:
    generator = torch.Generator().manual_seed(1)

    def random(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator).to(device, dtype)

    features, embedding = random(_POSITIONS, _DIM), random(_WORDS, _DIM)
    target = torch.randint(_WORDS, (_POSITIONS,), generator=generator).to(device)
    teacher = SelfTeacher()
    teacher.refresh(embedding)
    settings = 0.1, 0.5, -100
    checks: Dict[str, Callable[[], None]] = {
        f"projection and loss together{_how(device)}": lambda: check_linear_loss(
            features, embedding, target, teacher, *settings
        ),
        "from logits": lambda: check_loss(
            features @ embedding.t(), target, teacher.soft_target(target), *settings
        ),
    }
    rows: Rows = []
    for name, check in checks.items():
        row = {"device": str(device), "type": str(dtype).replace("torch.", ""), "loss": name}
        try:
            check()
            rows.append({**row, "check": _RIGHT})
        except LossCheckError as error:
            rows.append({**row, "check": str(error)})
    return rows


def _how(device: torch.device) -> str:
    if device.type == "cpu":
        return ""
    if importlib.util.find_spec("triton") is None:
        return ", by PyTorch's operations (no Triton)"
    from fairseq_skd import kernels

    if kernels.usable(device):
        return ", by Triton's kernels"
    return ", by PyTorch's operations (Triton does not work here)"
