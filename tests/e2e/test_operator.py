"""`spafl run` against a real `spafl serve`: the operator's whole day, with devices reporting in between."""

import json
import os
import pty
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from typer.testing import CliRunner

from device_runtime.client import Client
from server_api.operator import app
from spafl.bundle import Bundle
from spafl.protocol import EnrolmentRequest, Event, LeaseRequest, Metrics
from spafl.secret import Secret
from spafl.wire import Thresholds, encode_thresholds
from tests.server_api.local_server import small_bundle

SPAFL = [sys.executable, "-c", "from spafl.cli import main; main()"]


class Serving:
    """A server process on a directory; killed and started again it keeps its port."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.port = folder, 0
        self.admin = self.key = ""
        self.start()

    def start(self) -> None:
        command = [*SPAFL, "serve", "--data", str(self.folder / "server"), "--port", str(self.port), "--json"]
        with (self.folder / "server.log").open("a") as log:
            self.process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=log, text=True)
        assert self.process.stdout is not None
        up = json.loads(self.process.stdout.readline())
        self.url = up["url"]
        self.port = int(self.url.rpartition(":")[2])
        self.admin, self.key = up.get("admin_token", self.admin), up.get("enrolment_key", self.key)

    def end(self, number: signal.Signals = signal.SIGTERM) -> None:
        self.process.send_signal(number)
        self.process.wait(20)
        assert self.process.stdout is not None
        self.process.stdout.close()

    def environment(self, token: str | None = None) -> dict[str, str]:
        return {**os.environ, "SPAFL_SERVER": self.url, "SPAFL_ADMIN_TOKEN": token or self.admin}

    def run(self, *arguments: str, token: str | None = None) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [*SPAFL, "run", *arguments],
            capture_output=True,
            text=True,
            timeout=60,
            env=self.environment(token),
        )

    def ok(self, *arguments: str) -> Any:
        """What `spafl run ... --json` printed; in this process, which saves half a second each time."""
        done = CliRunner().invoke(app, [*arguments, "--json"], env=self.environment(), catch_exceptions=False)
        assert done.exit_code == 0, done.output
        return json.loads(done.stdout)

    def watching(self, run: str) -> "subprocess.Popen[str]":
        return subprocess.Popen(
            [*SPAFL, "run", "watch", run],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            env=self.environment(),
        )


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("operator"))
    yield serving
    serving.end(signal.SIGKILL)


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small.zip")


@pytest.fixture
def run(request: pytest.FixtureRequest) -> str:
    """A run of the test's own: the server is shared."""
    return request.function.__name__.removeprefix("test_")[:64]


class Device:
    """A device that trains by writing its number into every threshold."""

    def __init__(self, serving: Serving, bundle: Bundle) -> None:
        self.layout = bundle.manifest.layout
        with Client(serving.url) as client:
            self.identity = client.enrol(Secret(serving.key), EnrolmentRequest())
        self.client = Client(serving.url, self.identity.token)

    def take_part(self, run: str, value: float) -> None:
        lease = self.client.lease(run, LeaseRequest())
        values = np.full(self.layout.size, value, np.float32)
        body = encode_thresholds(self.layout, Thresholds(values, lease.version), lease.precision)
        metrics = Metrics(examples=10, loss=0.5, accuracy=0.75)
        self.client.report(run, lease.round, self.identity.device, body, metrics.to_text())

    def close(self) -> None:
        self.client.close()


@pytest.fixture
def devices(serving: Serving, bundle: Bundle) -> Iterator[list[Device]]:
    devices = [Device(serving, bundle) for _ in range(2)]
    yield devices
    for device in devices:
        device.close()


def finished(watcher: "subprocess.Popen[str]") -> list[Event]:
    """The events a watcher printed, once it ended."""
    assert watcher.stdout is not None
    assert watcher.stderr is not None
    # not communicate(): it reads past what an earlier readline() has buffered
    with watcher:
        out, error = watcher.stdout.read(), watcher.stderr.read()
    assert error == ""
    return [Event.from_text(line) for line in out.splitlines()]


def test_a_run_from_its_bundle_to_its_end(
    serving: Serving, run: str, bundle: Bundle, devices: list[Device]
) -> None:
    created = serving.ok(
        "create", run, "--bundle", str(bundle.path), "--rounds", "2", "--target", "2", "--start"
    )
    assert (created["state"], created["settings"]["bundle"]) == ("running", bundle.id)
    watcher = serving.watching(run)
    for round in (1, 2):
        for value, device in enumerate(devices):
            device.take_part(run, round + value)
    events = finished(watcher)
    assert watcher.returncode == 0
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert events[0].kind == "run.created"
    assert events[-1].kind == "run.finished"
    assert [event.kind for event in events].count("update.accepted") == 4

    assert serving.ok("status", run)["version"] == 2
    rounds = [json.loads(line) for line in serving.run("rounds", run, "--json").stdout.splitlines()]
    assert [(row["round"], row["state"], row["reported"], row["loss"]) for row in rounds] == [
        (1, "aggregated", 2, 0.5),
        (2, "aggregated", 2, 0.5),
    ]
    table = serving.run("list").stdout
    assert run in table
    assert "finished" in table
    assert "2/2" in table


def test_the_same_again_changes_nothing_and_another_is_refused(
    serving: Serving, run: str, bundle: Bundle
) -> None:
    first = serving.run("bundle", str(bundle.path))
    assert first.stdout == f"{bundle.id}\n"
    assert serving.run("bundle", str(bundle.path)).stdout == first.stdout
    assert serving.ok("create", run, "--bundle", bundle.id) == serving.ok(
        "create", run, "--bundle", bundle.id
    )
    other = serving.run("create", run, "--bundle", bundle.id, "--rounds", "9")
    assert other.returncode == 2
    assert "name-taken" in other.stderr


def test_steering(serving: Serving, run: str, bundle: Bundle, devices: list[Device]) -> None:
    serving.ok("create", run, "--bundle", str(bundle.path), "--target", "2")
    assert serving.run("resume", run).stderr.startswith("spafl: ")
    for action, state in (("start", "running"), ("pause", "paused"), ("resume", "running")):
        assert serving.ok(action, run)["state"] == state
        assert serving.ok(action, run)["state"] == state  # asked again, it is there already
    devices[0].take_part(run, 1.0)
    closed = serving.ok("close", run)
    assert (closed["state"], closed["reported"], closed["round"]) == ("aggregated", 1, 1)
    assert serving.ok("close", run, "1") == closed
    assert serving.ok("close", run, "2")["state"] == "failed"
    watcher = serving.watching(run)
    assert serving.ok("stop", run)["state"] == "stopped"
    assert finished(watcher)[-1].kind == "run.stopped"
    assert watcher.returncode == 1
    late = serving.run("start", run)
    assert late.returncode == 2
    assert "wrong-state" in late.stderr
    assert "Traceback" not in late.stderr


def test_a_watcher_outlives_the_server(
    serving: Serving, run: str, bundle: Bundle, devices: list[Device]
) -> None:
    """kill -9 in the middle of a round: no event is lost, none comes twice."""
    serving.ok("create", run, "--bundle", str(bundle.path), "--rounds", "1", "--target", "2", "--start")
    watcher = serving.watching(run)
    assert watcher.stdout is not None
    seen = [Event.from_text(watcher.stdout.readline())]
    devices[0].take_part(run, 1.0)
    serving.end(signal.SIGKILL)
    serving.start()
    devices[1].take_part(run, 3.0)
    seen += finished(watcher)
    assert watcher.returncode == 0
    assert [event.id for event in seen] == list(range(1, len(seen) + 1))
    assert seen[-1].kind == "run.finished"


def test_a_terminal_shows_bars_instead_of_json(
    serving: Serving, run: str, bundle: Bundle, devices: list[Device]
) -> None:
    serving.ok("create", run, "--bundle", str(bundle.path), "--rounds", "1", "--target", "1", "--start")
    devices[0].take_part(run, 1.0)
    master, terminal = pty.openpty()
    environment = {**serving.environment(), "TERM": "xterm", "COLUMNS": "100"}
    watcher = subprocess.Popen(
        [*SPAFL, "run", "watch", run], stdout=terminal, stderr=terminal, env=environment
    )
    os.close(terminal)
    shown = b""
    while True:
        try:
            shown += os.read(master, 4096)
        except OSError:  # how Linux says that the other side is closed
            break
    os.close(master)
    assert watcher.wait(20) == 0
    assert "━" in shown.decode()
    assert "1/1 rounds" in shown.decode()
    assert "run.finished" not in shown.decode()


@pytest.mark.parametrize(
    ("token", "text"), [("wrong-token-of-nobody", "401 unauthorized"), (None, "403 forbidden")]
)
def test_only_an_admin_steers(serving: Serving, devices: list[Device], token: str | None, text: str) -> None:
    token = token or devices[0].identity.token.reveal()
    done = serving.run("rounds", "any", token=token)
    assert done.returncode == 2
    assert text in done.stderr
    assert done.stderr.count("\n") == 1
    assert token not in done.stderr


def test_an_unknown_run_is_named(serving: Serving) -> None:
    for command in ("status", "watch", "start", "rounds", "close"):
        done = serving.run(command, "nowhere")
        assert done.returncode == 2
        assert "nowhere" in done.stderr
        assert "404 not-found" in done.stderr


def test_a_bundle_the_server_refuses_says_why(serving: Serving, run: str, bundle: Bundle) -> None:
    done = serving.run("create", run, "--bundle", "0" * 64)
    assert done.returncode == 2
    assert "404 not-found" in done.stderr


def test_a_token_file_serves_as_well(serving: Serving, tmp_path: Path) -> None:
    (tmp_path / "token").write_text(serving.admin + "\n")
    done = serving.run("list", "--token-file", str(tmp_path / "token"), token="not-this-one")
    assert done.returncode == 0, done.stderr
