"""Five steps of LeNet-5 on ARM64 and on x86-64: the same numbers, in one piece or cut in two between the machines."""

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file

from tests.arm64.closeness import assert_close
from tests.arm64.conftest import TRAJECTORY, Trajectories
from tests.arm64.machine import Machine
from tests.arm64.trajectory import CHECKPOINT, CUT, ended


def test_the_phone_is_arm64_and_has_no_torch(phone: Machine, desktop: Machine) -> None:
    script = """
import importlib, importlib.util, json, pkgutil, platform, device_runtime
for module in pkgutil.walk_packages(device_runtime.__path__, "device_runtime."):
    importlib.import_module(module.name)
found = [name for name in ("torch", "onnx", "fastapi", "trainer", "export") if importlib.util.find_spec(name)]
print(json.dumps([platform.machine(), found]))
"""
    assert json.loads(phone.run("-c", script)) == ["aarch64", []]
    assert json.loads(desktop.run("-c", script))[0] == "x86_64"


def test_five_steps_on_arm64_are_those_on_x86_64(
    phone: Machine, desktop: Machine, trajectories: Trajectories
) -> None:
    there, here = trajectories("onnx", phone), trajectories("onnx", desktop)
    got, expected = load_file(there), load_file(here)
    assert metadata(there) == {"machine": "aarch64", "torch": "False"}
    assert metadata(here)["machine"] == "x86_64"
    assert expected["collapsed"].tolist() == [True, False, False]
    assert expected["density"].tolist() == [0.0, 0.5, 0.5]
    assert_close(got, expected)


@pytest.mark.parametrize("way", ["from x86-64 to ARM64", "from ARM64 to x86-64"])
def test_a_checkpoint_goes_on_on_the_other_architecture(
    way: str,
    phone: Machine,
    desktop: Machine,
    trajectories: Trajectories,
    bundle: Path,
    inputs: Path,
    tmp_path: Path,
) -> None:
    first, second = (desktop, phone) if way.startswith("from x86-64") else (phone, desktop)
    second.run(TRAJECTORY, "onnx", bundle, inputs, tmp_path / "out", trajectories("onnx", first))
    got, expected = load_file(tmp_path / "out"), load_file(trajectories("onnx", first))
    assert_close(ended(got), ended(expected))
    assert_close({"loss": got["loss"]}, {"loss": expected["loss"][CUT:]})
    moved = [
        name for name, value in ended(got).items() if not np.array_equal(value, expected[CHECKPOINT + name])
    ]
    assert set(moved) == set(ended(got))


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata())
