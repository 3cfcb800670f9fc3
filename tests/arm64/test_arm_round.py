"""One round of a real server on this machine with two devices, one of them ARM64: both updates count."""

import signal
from collections.abc import Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from device_runtime.client import Client
from device_runtime.state import read_identity, read_journal, snapshot
from spafl.secret import Secret
from tests.arm64.closeness import assert_close
from tests.arm64.machine import SECONDS, SPAFL, Machine
from tests.e2e.test_operator import Serving

RUN = "mixed"


@pytest.fixture
def serving(tmp_path: Path) -> Iterator[Serving]:
    serving = Serving(tmp_path)
    yield serving
    serving.end(signal.SIGTERM)


def test_a_round_of_both_architectures(
    serving: Serving, phone: Machine, desktop: Machine, bundle: Path, data: Path, tmp_path: Path
) -> None:
    serving.ok(
        *("create", RUN, "--bundle", str(bundle), "--rounds", "1", "--target", "2"),
        *("--epochs", "1", "--batch-size", "8", "--lr", "0.02", "--coeff", "0.01", "--start"),
    )
    states = {"arm64": tmp_path / "arm64", "x86-64": tmp_path / "x86-64"}
    devices = [
        machine.start(
            *(*SPAFL, "device", "run", "--run", RUN, "--server", serving.url, "--state", states[name]),
            *("--data", data, "--rounds", "1", "--name", name, "--json"),
            SPAFL_ENROLMENT_KEY=serving.key,
        )
        for name, machine in (("arm64", phone), ("x86-64", desktop))
    ]
    for device in devices:
        out, errors = device.communicate(timeout=SECONDS)
        assert device.returncode == 0, out + errors
        assert '"event": "update.accepted"' in out

    status = serving.ok("status", RUN)
    assert (status["state"], status["version"]) == ("finished", 1)
    (closed,) = [serving.ok("rounds", RUN)]
    assert (closed["state"], closed["reported"]) == ("aggregated", 2)
    headers = {"Authorization": f"Bearer {serving.admin}"}
    listed = httpx2.get(f"{serving.url}/v1/devices", headers=headers).json()
    platforms = {device["name"]: device["capabilities"]["platform"] for device in listed}
    assert platforms == {"arm64": "linux aarch64", "x86-64": "linux x86_64"}

    trained = {}
    for name, state in states.items():
        journal, opened, trained[name] = snapshot(state)
        assert (journal.updates, journal.late) == (1, 0)
        assert read_journal(state) == journal
    # the same examples in the same order: the fleet's two updates are one and the same but for rounding
    assert_close(trained["arm64"], trained["x86-64"])
    layout = opened.manifest.layout
    mean = np.mean([layout.join(tensors) for tensors in trained.values()], axis=0, dtype=np.float64)
    identity = read_identity(states["arm64"])
    assert identity is not None
    with Client(serving.url, Secret(identity.token.reveal())) as client:
        version = client.thresholds(RUN, 1, layout)
    assert_close({"tau": version.values}, {"tau": np.asarray(mean, np.float32)})
    assert not np.array_equal(version.values, opened.initial_thresholds())
