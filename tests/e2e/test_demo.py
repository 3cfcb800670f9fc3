"""The whole line as a user runs it: `spafl demo`, small, with every process real; and stopped in the middle."""

import json
import os
import signal
import subprocess
import sys
import time
from contextlib import suppress
from pathlib import Path

import pytest

from device_runtime.engines import ENGINES, EngineError, require_engine
from trainer.demo.results import Results

SPAFL = Path(sys.executable).with_name("spafl")


def with_path(folder: Path) -> set[str]:
    """Returns the command lines of processes that name `folder`."""
    lines = set()
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            line = entry.read_bytes().replace(b"\0", b" ").decode(errors="replace")
        except OSError:
            continue
        if str(folder) in line:
            lines.add(line)
    return lines


def demo(out: Path, *options: str) -> list[str]:
    small = ["--devices", "3", "--rounds", "2", "--per-round", "2", "--epochs", "2", "--no-parity"]
    return [str(SPAFL), "demo", *small, "--out", str(out), *options]


def engines() -> list[str]:
    """Those that can run here."""
    found = []
    for name in ENGINES:
        with suppress(EngineError):
            require_engine(name)
            found.append(name)
    return found


@pytest.mark.timeout(400)
def test_a_small_demo_from_examples_to_report(tmp_path: Path) -> None:
    """Each device trains with an engine of its own, as far as they can run here."""
    fleet = [option for name in engines() for option in ("--engine", name)]
    command = demo(tmp_path / "out", "--json", *fleet)
    done = subprocess.run(command, capture_output=True, text=True, timeout=360)
    assert done.returncode == 0, done.stderr
    results = Results.model_validate(json.loads(done.stdout))
    assert results == Results.model_validate_json((tmp_path / "out/results.json").read_bytes())
    assert [entry.round for entry in results.rounds] == [1, 2]
    assert sum(device.rounds for device in results.devices) == results.participations == 4
    assert all(device.proof.equal and device.steps > 0 for device in results.devices)
    assert {device.engine for device in results.devices} == set(engines())
    # 570 thresholds up four times, each about 140 bytes more than its values; down less often: version 0 comes with
    # the bundle
    thresholds = results.wire["thresholds"]
    assert 4 * 4 * 570 < thresholds.body_up < 4 * (4 * 570 + 200)
    assert 0 < thresholds.body_down < thresholds.body_up
    assert thresholds.total_up > thresholds.body_up
    assert results.fedavg_body == 2 * 4 * 4 * 430_500
    # the same steps, batches and start: what differs is only whose thresholds they were
    assert all(
        device.after > device.before and device.local_only > device.before for device in results.devices
    )
    assert (tmp_path / "out/report.html").stat().st_size > 100_000
    assert with_path(tmp_path) == set()


@pytest.mark.timeout(240)
@pytest.mark.parametrize(
    ("number", "stage"), [(signal.SIGTERM, "export"), (signal.SIGINT, "device-00")], ids=["early", "training"]
)
def test_a_demo_that_is_stopped_leaves_no_process(tmp_path: Path, number: signal.Signals, stage: str) -> None:
    process = subprocess.Popen(demo(tmp_path / "out", "--rounds", "99"), stderr=subprocess.PIPE, text=True)
    try:
        while not (tmp_path / f"out/work/logs/{stage}.log").exists():
            assert process.poll() is None, process.stderr.read()
            time.sleep(0.1)
        assert len(with_path(tmp_path)) > 1
        os.kill(process.pid, number)
        _, told = process.communicate(timeout=60)
    finally:
        process.kill()
    assert process.returncode == 130
    assert "every process has ended" in told
    assert with_path(tmp_path) == set()
