"""Real devices on a real server: killed, stopped, started again, and every round counted once."""

import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from device_runtime.engines import ENGINES, EngineError, require_engine
from device_runtime.state import read_journal, snapshot
from tests.e2e.test_operator import SPAFL, Serving

ROUNDS, DEVICES = 4, 3


@pytest.fixture
def serving(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Serving]:
    monkeypatch.setenv("SPAFL_RETRY_AFTER", "0.5")
    serving = Serving(tmp_path)
    yield serving
    serving.end()


class Device:
    """A device process on a folder; started again it is the same device."""

    def __init__(self, folder: Path, number: int, serving: Serving, *options: str) -> None:
        self.state, self.log = folder / f"device{number}", folder / f"device{number}.log"
        generator = np.random.default_rng(number)
        y = generator.integers(0, 3, 50)
        x = generator.integers(0, 128, (50, 8, 8), np.uint8)
        x[np.arange(50), 2 * y] += 100
        np.savez(folder / f"data{number}.npz", x=x, y=y)
        self.command = [
            *SPAFL,
            *("device", "run", "--run", "r", "--server", serving.url, "--state", str(self.state)),
            *("--data", str(folder / f"data{number}.npz"), "--checkpoint-steps", "1", "--json", *options),
        ]
        self.environment = {**os.environ, "SPAFL_ENROLMENT_KEY": serving.key}
        self.start()

    def start(self) -> None:
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, stdout=log, stderr=log, env=self.environment)

    def end(self, number: signal.Signals) -> int:
        self.process.send_signal(number)
        return self.process.wait(60)

    def events(self) -> list[dict[str, Any]]:
        lines = self.log.read_text().splitlines()
        return [json.loads(line) for line in lines if line.startswith("{") and line.endswith("}")]


def wait_for(what: Any, seconds: float = 60.0) -> None:
    end = time.monotonic() + seconds
    while not what():
        assert time.monotonic() < end, "it did not happen in time"
        time.sleep(0.05)


def test_devices_killed_and_stopped_at_random_finish_the_run(
    serving: Serving, small_bundle_file: Path, tmp_path: Path
) -> None:
    serving.ok(
        *(
            "create",
            "r",
            "--bundle",
            str(small_bundle_file),
            "--rounds",
            str(ROUNDS),
            "--target",
            str(DEVICES),
        ),
        *("--epochs", "2", "--batch-size", "4", "--start"),
    )
    devices = [Device(tmp_path, number, serving) for number in range(DEVICES)]
    moments = random.Random(7)
    for turn in range(8):
        victim = devices[turn % 2]  # the third is left in peace
        time.sleep(moments.uniform(0.2, 2.0))
        if victim.process.poll() is not None:
            continue
        if turn % 3 == 2:
            assert victim.end(signal.SIGTERM) in (
                0,
                -signal.SIGTERM,
            )  # the latter: it came before the agent was up
        else:
            assert victim.end(signal.SIGKILL) in (0, -signal.SIGKILL)  # the former: it had just finished
        victim.start()
    assert [device.process.wait(120) for device in devices] == [0, 0, 0]

    rounds = [json.loads(line) for line in serving.run("rounds", "r", "--json").stdout.splitlines()]
    counted = [each["reported"] for each in rounds if each["state"] == "aggregated"]
    assert counted == [DEVICES] * ROUNDS
    for device in devices:
        journal = read_journal(device.state)
        assert journal is not None
        assert (journal.phase, journal.trained, journal.updates, journal.late) == ("idle", ROUNDS, ROUNDS, 0)
        trained = {event["round"] for event in device.events() if event["event"] == "round.trained"}
        # one killed after its state was written and before the line was has trained without saying so
        assert trained <= set(range(1, ROUNDS + 1))
        assert device is not devices[2] or len(trained) == ROUNDS
        snapshot(device.state)


def test_sigterm_while_training_saves_and_exits_0(
    serving: Serving, small_bundle_file: Path, tmp_path: Path
) -> None:
    serving.ok(
        *("create", "r", "--bundle", str(small_bundle_file), "--rounds", "1", "--target", "1"),
        *("--epochs", "1000", "--batch-size", "2", "--start"),
    )
    device = Device(tmp_path, 0, serving)
    wait_for(lambda: device.log.exists() and '"checkpoint"' in device.log.read_text())
    assert device.end(signal.SIGTERM) == 0
    stopped = device.events()[-1]
    assert (stopped["event"], stopped["phase"]) == ("stopped", "training")
    journal = read_journal(device.state)
    assert journal is not None
    assert journal.progress is not None
    assert journal.progress.steps == max(e["steps"] for e in device.events() if e["event"] == "checkpoint")


@pytest.mark.timeout(400)
@pytest.mark.parametrize("other", [name for name in ENGINES if name != "onnx"])
def test_a_device_killed_in_a_round_goes_on_with_another_engine(
    other: str, serving: Serving, tmp_path: Path
) -> None:
    try:
        require_engine(other)
    except EngineError as error:
        pytest.skip(str(error))
    bundle = tmp_path / "small.zip"
    subprocess.run([sys.executable, "-m", "tests.device_runtime.small_model", bundle, other], check=True)
    serving.ok(
        *("create", "r", "--bundle", str(bundle), "--rounds", "1", "--target", "1"),
        *("--epochs", "40", "--batch-size", "4", "--start"),
    )
    device, steps = Device(tmp_path, 0, serving, "--engine", other), []
    for engine in ("onnx", other):
        wait_for(lambda: progressed(device) > max(steps, default=0) + 2)
        assert device.end(signal.SIGKILL) == -signal.SIGKILL
        steps.append(progressed(device))
        device.command[-1] = engine
        device.start()
    assert device.process.wait(120) == 0
    done = [event["steps"] for event in device.events() if event["event"] == "checkpoint"]
    # each one once, none twice: what was trained with one engine the next did not train again
    assert done == sorted(set(done))
    assert 0 < steps[0] < steps[1] < done[-1]
    journal = read_journal(device.state)
    assert journal is not None
    assert (journal.trained, journal.updates) == (1, 1)


def progressed(device: Device) -> int:
    """The steps of the round that the device has on disk."""
    journal = read_journal(device.state) if device.state.exists() else None
    return journal.progress.steps if journal is not None and journal.progress is not None else 0


def test_a_device_waits_out_a_server_that_is_gone(
    serving: Serving, small_bundle_file: Path, tmp_path: Path
) -> None:
    serving.ok(
        *("create", "r", "--bundle", str(small_bundle_file), "--rounds", "2", "--target", "1"),
        *("--epochs", "1", "--batch-size", "4", "--start"),
    )
    device = Device(tmp_path, 0, serving)
    wait_for(lambda: device.log.exists() and '"update.accepted"' in device.log.read_text())
    serving.end(signal.SIGKILL)
    time.sleep(1)
    serving.start()
    assert device.process.wait(120) == 0
    journal = read_journal(device.state)
    assert journal is not None
    assert (journal.trained, journal.updates) == (2, 2)


def test_the_token_is_in_no_output_and_in_one_private_file(
    serving: Serving, small_bundle_file: Path, tmp_path: Path
) -> None:
    serving.ok(
        *("create", "r", "--bundle", str(small_bundle_file), "--rounds", "1", "--target", "1", "--start")
    )
    device = Device(tmp_path, 0, serving)
    assert device.process.wait(120) == 0
    token = json.loads((device.state / "identity.json").read_text())["token"]
    holders = [
        file.relative_to(tmp_path).as_posix()
        for file in tmp_path.rglob("*")
        if file.is_file() and token.encode() in file.read_bytes()
    ]
    assert holders == ["device0/identity.json"]
    assert serving.key.encode() not in device.log.read_bytes()
