"""kill -9 in the middle of a training, then the same command again."""

import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from tests.conftest import PLUGIN, TINY
from tests.test_command_line import assert_equal_weights

TRAINING = [
    *("--user-dir", PLUGIN, "--cpu", "--arch", "transformer", *TINY, "--optimizer", "adam"),
    *("--lr", 0.01, "--log-format", "json", "--log-interval", 1, "--seed", 3, "--max-tokens", 50),
    *("--criterion", "self_kd", "--label-smoothing", 0.1, "--self-kd-top-k", 5),
    *("--self-kd-start-update", 4, "--self-kd-ramp-updates", 6, "--max-update", 18),
    # Checkpoints where tables are due: then a resumed run equals the uninterrupted one.
    *("--save-interval-updates", 3, "--self-kd-refresh-interval", 3),
    *("--validate-interval-updates", 3),
]


def start(data, folder, options):
    program = str(Path(sys.executable).parent / "fairseq-train")
    arguments = [program, data, *TRAINING, *options, "--save-dir", folder]
    return subprocess.Popen(
        [str(argument) for argument in arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


def finish(data, folder, options):
    output, _ = start(data, folder, options).communicate()
    assert "done training" in output, output[-3000:]
    return output


def kill(data, folder, options, moment):
    """Train until a line of the log tells that the moment has come."""
    process = start(data, folder, options)
    for line in process.stdout:
        if re.search(moment, line):
            break
    process.send_signal(signal.SIGKILL)
    process.communicate()
    assert process.returncode == -signal.SIGKILL


MOMENTS = {
    "an update": r'train_inner.*"num_updates": "8"',
    "a validation": r"begin validation",
    "the first table": r"distillation has begun",
    "a checkpoint": r"Preparing to save checkpoint.*@ 12 updates",
}


@pytest.fixture(scope="module")
def whole(corpus, tmp_path_factory):
    """Uninterrupted runs, made when they are asked for."""
    made = {}

    def run(candidates):
        if candidates not in made:
            made[candidates] = tmp_path_factory.mktemp(candidates)
            finish(corpus / "pair", made[candidates], ["--self-kd-candidates", candidates])
        return made[candidates] / "checkpoint_last.pt"

    return run


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_killed_run_goes_on_as_if_nothing_had_been(corpus, tmp_path, whole, moment):
    """Bit by bit, within the first epoch: fairseq resumes later ones with other batches."""
    options = ["--self-kd-candidates", "neighbors"]
    kill(corpus / "pair", tmp_path, options, MOMENTS[moment])
    finish(corpus / "pair", tmp_path, options)
    assert_equal_weights(whole("neighbors"), tmp_path / "checkpoint_last.pt")


def test_a_killed_run_with_the_past_drops_what_it_lost_and_ends(corpus, tmp_path, whole):
    """In the first epoch nothing is read from the past, so the models are equal, too."""
    options = ["--self-kd-candidates", "past"]
    kill(corpus / "pair", tmp_path, options, MOMENTS["an update"])
    output = finish(corpus / "pair", tmp_path, options)
    assert re.search(r"going on with .*self_kd_past\.bin", output)
    assert re.search(r"\d+ of 160 sentences in it were seen after update \d", output)
    assert_equal_weights(whole("past"), tmp_path / "checkpoint_last.pt")
