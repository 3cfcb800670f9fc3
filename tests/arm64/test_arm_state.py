"""A device's state directory carried from one architecture to the other: rounds, compact models and predictions."""

import json
import shutil
import signal
from pathlib import Path

import numpy as np
import pytest

from device_runtime import compaction
from device_runtime.data import load_data
from device_runtime.state import read_journal, snapshot
from spafl.bundle import Bundle
from spafl.proof import PROOF, RELATIVE_TOLERANCE
from tests.arm64.closeness import assert_close
from tests.arm64.machine import SPAFL, Machine

ROUND = ("--epochs", "2", "--batch-size", "8", "--lr", "0.02", "--coeff", "0.01")


@pytest.fixture(scope="module")
def states(
    phone: Machine, desktop: Machine, bundle: Path, data: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """Two states of the same two rounds. Both trained the first here; the second one began the second on the phone, was
    killed there, and went on here."""
    folder = tmp_path_factory.mktemp("states")
    stayed, moved = folder / "stayed", folder / "moved"
    options = ("train", "--bundle", bundle, "--data", data, *ROUND)
    desktop.device(*options, "--rounds", "1", "--state", stayed)
    shutil.copytree(stayed, moved)
    desktop.device(*options, "--rounds", "2", "--state", stayed)
    second = (*options, "--rounds", "2", "--state", moved, "--checkpoint-steps", "1", "--json")
    with phone.start(*SPAFL, "device", *second) as process:
        assert process.stdout is not None
        assert any('"checkpoint"' in line for line in process.stdout), process.stderr
        process.kill()
    assert process.returncode == -signal.SIGKILL
    journal = read_journal(moved)
    assert journal is not None
    assert (journal.phase, journal.trained) == ("training", 1)
    events = desktop.device(*options, "--rounds", "2", "--state", moved)
    assert events[0]["event"] == "round.resumed"
    assert 0 < events[0]["steps"] < 10
    return stayed, moved


def test_a_round_begun_on_arm64_ends_here_as_if_it_had_never_moved(states: tuple[Path, Path]) -> None:
    (before, _, expected), (after, opened, got) = map(snapshot, states)
    assert before.trained == after.trained == 2
    initial = opened.initial_state()
    assert not any(np.array_equal(value, initial[name]) for name, value in got.items())
    assert_close(got, expected)


def test_compaction_on_arm64_is_proven_and_cuts_what_it_cuts_here(
    phone: Machine, desktop: Machine, states: tuple[Path, Path], bundle: Path, data: Path, tmp_path: Path
) -> None:
    _, state = states
    there, here = tmp_path / "there", tmp_path / "here"
    proofs = []
    for machine, out in ((phone, there), (desktop, here)):
        (told,) = machine.device("compact", "--state", state, "--data", data, "--out", out)
        proofs.append(json.loads((out / PROOF).read_text()))
        assert told["equal"] is True
    got, expected = proofs
    assert got["argmax_agreement"] == 1.0
    assert got["relative_difference"] <= RELATIVE_TOLERANCE
    assert [layer["kept"] < layer["total"] for layer in got["layers"]] == [True, True, True, False]
    for same in ("bundle", "density", "layers", "examples"):
        assert got[same] == expected[same]
    for model in ("masked", "compact"):
        for same in ("weights", "flops", "bytes"):
            assert got[model][same] == expected[model][same], (model, same)

    examples = load_data(str(data), Bundle.open(bundle).manifest, validation=0.0).train
    x = examples.inputs(Bundle.open(bundle).manifest.input)
    # the file made there is a model for any machine
    made_there, made_here = (compaction.predict(out / compaction.MODEL, x) for out in (there, here))
    assert_close({"logits": made_there}, {"logits": made_here})
    predicted = [
        machine.device("predict", data, "--state", state, "--model", there / compaction.MODEL)
        for machine in (phone, desktop)
    ]
    assert predicted[0] == predicted[1]
    assert predicted[0][0]["examples"] == len(x)
