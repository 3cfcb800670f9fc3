"""benchmarks/wire.py counts what it says, and its --check can fail."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest

from benchmarks.wire import BARS, LENET5, WEIGHT_BYTES, Cost

ROOT = Path(__file__).parents[2]
COST = Cost("f16", 1296, 1296, 1300, 2000, 1700, 400, 600)


def test_it_measures_and_passes_its_bars() -> None:
    command = [sys.executable, "benchmarks/wire.py", "--devices", "2", "--rounds", "1", "--json", "--check"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert (done.returncode, done.stderr) == (0, "")
    for cost in json.loads(done.stdout):
        width = {"f32": 4, "f16": 2}[cost["precision"]]
        assert width * LENET5.size < cost["body_up"] == cost["body_down"] <= cost["bar"]
        assert cost["total_up"] > cost["body_up"]
        assert cost["total_down"] > cost["body_down"]


def test_the_model_is_the_papers() -> None:
    assert (LENET5.size, WEIGHT_BYTES) == (580, 4 * 430_500)


@pytest.mark.parametrize("field", ["body_up", "body_down", "last_body"])
def test_a_missed_bar_is_named(field: str) -> None:
    assert COST.missed() == []
    (line,) = replace(COST, **{field: BARS["f16"] + 1}).missed()
    assert line == f"f16 {field.replace('_', ' ')}: 1,301 B, bar 1,300 B"
