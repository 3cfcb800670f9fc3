"""A program service and a device as processes: the device without PyTorch, the service without weights."""

import json
import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from spafl.proof import Proof
from tests.device_runtime.test_device_imports import WALL

SPAFL = "from spafl.cli import main; main()"
MODEL = "tests.device_runtime.small_model:small_model"


@pytest.fixture
def token(tmp_path: Path) -> Path:
    (tmp_path / "token").write_text("t0ken-of-the-service\n")
    return tmp_path / "token"


@pytest.fixture
def service(small_bundle_file: Path, token: Path) -> Iterator[str]:
    command = [sys.executable, "-c", SPAFL, "programs", str(small_bundle_file), "--model", MODEL]
    process = subprocess.Popen(
        [*command, "--port", "0", "--token-file", str(token), "--json"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).parents[2],
    )
    assert process.stdout is not None
    try:
        yield json.loads(process.stdout.readline())["url"]
        process.send_signal(signal.SIGTERM)
        assert process.wait(60) == 0
    finally:
        process.kill()
        process.wait(60)
        process.stdout.close()


def device(folder: Path, *arguments: object, refused: bool = False) -> str:
    """What `spafl device` prints, in a process that cannot import PyTorch; or says on stderr if it is refused."""
    done = subprocess.run(
        [sys.executable, "-W", "error", "-c", WALL + SPAFL, "device", *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=240,
        check=False,
        cwd=folder,
        env={**os.environ, "XDG_CACHE_HOME": str(folder / "cache")},
    )
    assert done.returncode == (2 if refused else 0), done.stderr
    return done.stderr if refused else done.stdout


def test_a_device_gets_its_compact_program(
    service: str, token: Path, small_bundle_file: Path, tmp_path: Path
) -> None:
    draw = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=draw.integers(0, 256, (40, 8, 8), np.uint8), y=draw.integers(0, 3, 40))
    common = ("--state", "s", "--data", "d.npz")
    rounds = ("--rounds", 2, "--epochs", 1, "--batch-size", 8, "--coeff", 0.4)
    device(tmp_path, "train", "--bundle", small_bundle_file, *common, *rounds)
    ask = ("compact", *common, "--programs", service, "--json")
    device(tmp_path, "build-executorch")
    assert "401 unauthorized" in device(tmp_path, *ask, refused=True)
    told = json.loads(device(tmp_path, *ask, "--token-file", token))
    assert told.pop("model") == "s/program/model.pte"
    proof = Proof.from_json(told)
    assert proof.equal
    assert 0 < proof.density["5"] < 1, "nothing pruned, nothing shown"
    assert proof.compact.bytes == (tmp_path / "s" / "program" / "model.pte").stat().st_size
    assert Proof.from_text((tmp_path / "s" / "program" / "proof.json").read_text()) == proof
    predicted = json.loads(device(tmp_path, "predict", "d.npz", "--state", "s", "--json"))
    assert predicted["examples"] == 40
    # the same labels as by onnxruntime, from the same state
    device(tmp_path, "compact", *common)
    assert json.loads(device(tmp_path, "predict", "d.npz", "--state", "s", "--json")) == predicted
