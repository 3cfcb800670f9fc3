"""The machines, and a LeNet-5 to train on both. Everything here is skipped without a sysroot: `make test-arm64`."""

import fcntl
import importlib.util
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spafl import algorithm
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from tests.arm64 import machine
from tests.arm64.machine import SPAFL, Machine

BATCH, STEPS, EXAMPLES = 8, 5, 48

TRAJECTORY = Path(__file__).with_name("trajectory.py")

Trajectories = Callable[[str, Machine], Path]
"""The file `trajectory.py` writes for an engine on a machine."""


@pytest.fixture(scope="session")
def sysroot() -> Path:
    if "SPAFL_ARM64" not in os.environ:
        pytest.skip("no ARM64 sysroot (SPAFL_ARM64): make test-arm64 builds one and runs this")
    return Path(os.environ["SPAFL_ARM64"]).resolve()


@pytest.fixture(scope="session")
def phone(sysroot: Path) -> Machine:
    return machine.phone(sysroot)


@pytest.fixture(scope="session")
def desktop(sysroot: Path) -> Machine:
    return machine.desktop(sysroot)


@pytest.fixture(scope="session")
def bundle(sysroot: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """LeNet-5 with thresholds that leave half of its filters active, so that there is something to cut."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # the workers' own lie in it: one of them exports, which takes a minute
    half = folder / "half"
    with (folder / "half.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not half.is_dir():
            _export(folder / "whole")
            _at_half_density(Bundle.open(folder / "whole"), half)
    return half


def _export(out: Path) -> None:
    # in a process of its own, so that this one stays free of torch
    command = [sys.executable, *SPAFL, "export", "lenet5", "--out", str(out), "--no-parity"]
    if importlib.util.find_spec("executorch"):
        command += ["--engine", "executorch"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=500, check=False)
    assert done.returncode == 0, done.stderr


def _at_half_density(whole: Bundle, out: Path) -> None:
    layout, state = whole.manifest.layout, whole.initial_state()
    thresholds = algorithm.thresholds_at(layout, state, 0.5, np.random.default_rng(4))
    state |= {layer.threshold: thresholds[layer.span] for layer in layout.layers}
    files = {name: whole.read(name) for name in whole.manifest.files}
    write_bundle(out, whole.manifest, {**files, INITIAL_STATE: safetensors.numpy.save(state)})


@pytest.fixture(scope="session")
def inputs(bundle: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What `trajectory.py` trains on: a catch-up that moves every weight, and collapses the first layer."""
    opened = Bundle.open(bundle)
    layout = opened.manifest.layout
    draw = np.random.default_rng(5)
    target = opened.initial_thresholds()
    target[layout.layers[0].span] = 9.0
    base = (target - draw.normal(0, 0.01, layout.size)).astype(np.float32)
    x = draw.normal(size=(STEPS, BATCH, *opened.manifest.input.shape)).astype(np.float32)
    y = draw.integers(0, len(opened.manifest.labels), (STEPS, BATCH))
    path = tmp_path_factory.mktemp("inputs") / "inputs.npz"
    np.savez(path, base=base, target=target, x=x, y=y)
    return path


@pytest.fixture(scope="session")
def trajectories(bundle: Path, inputs: Path, tmp_path_factory: pytest.TempPathFactory) -> Trajectories:
    """Runs each once."""
    folder = tmp_path_factory.mktemp("trajectories")
    made: dict[tuple[str, str], Path] = {}

    def run(engine: str, machine: Machine) -> Path:
        key = (engine, machine.command[0])
        if key not in made:
            made[key] = folder / f"{len(made)}.safetensors"
            machine.run(TRAJECTORY, engine, bundle, inputs, made[key])
        return made[key]

    return run


@pytest.fixture(scope="session")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Byte images that show their label: a bright square on noise."""
    draw = np.random.default_rng(9)
    y = draw.integers(0, 10, EXAMPLES)
    x = draw.integers(0, 128, (EXAMPLES, 28, 28), np.uint8)
    for image, label in zip(x, y, strict=True):
        row, column = divmod(int(label), 4)
        image[9 * row : 9 * row + 6, 7 * column : 7 * column + 6] += 100
    path = tmp_path_factory.mktemp("data") / "data.npz"
    np.savez(path, x=x, y=y)
    return path
