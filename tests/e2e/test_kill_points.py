import json
import signal
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
WRITES = 60
"""At least so many: two rounds of two steps with a checkpoint each are above it."""


def test_a_device_killed_at_any_write_ends_with_the_same_weights_and_counts_each_round_once(
    tmp_path: Path,
) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "tests.e2e.kill_points", str(tmp_path)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    *killed, whole = map(json.loads, done.stdout.splitlines())
    assert len(killed) > WRITES
    assert whole["status"] == 0
    assert {line["status"] for line in killed} == {-signal.SIGKILL}

    assert (whole["trained"], whole["updates"], whole["late"], whole["phase"]) == (2, 2, 0, "idle")
    assert whole["counted"] == ["1", "2"]
    assert whole["left_over"] == []
    same = {key: value for key, value in whole.items() if key not in ("point", "status")}
    for line in killed:
        assert {key: line[key] for key in same} == same, f"killed at write {line['point']}"
