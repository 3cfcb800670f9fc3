"""ExecuTorch on ARM64, without PyTorch: its libraries from the aarch64 wheel, and ours cross-compiled against them."""

import importlib.util
import json
import shutil
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import pytest
from safetensors.numpy import load_file

from spafl.proof import PROOF, RELATIVE_TOLERANCE
from tests.arm64.closeness import assert_close
from tests.arm64.conftest import TRAJECTORY, Trajectories
from tests.arm64.machine import SPAFL, Machine
from tests.arm64.trajectory import ended

pytestmark = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="its programs are made by ExecuTorch: make engines"
)


@pytest.fixture(scope="module")
def phone(
    phone: Machine, desktop: Machine, sysroot: Path, tmp_path_factory: pytest.TempPathFactory
) -> Machine:
    """The phone with a folder of libraries copied to it; no wheel of ExecuTorch can be imported there."""
    folder = tmp_path_factory.mktemp("libraries")
    wheel, compiler = sysroot / "executorch" / "executorch", sysroot / "tools" / "c++"
    desktop.device("build-executorch", "--package", wheel, "--compiler", compiler, "--out", folder)
    return replace(phone, environment={**phone.environment, "SPAFL_EXECUTORCH": str(folder)})


@pytest.fixture(scope="module")
def desktop(desktop: Machine) -> Machine:
    if shutil.which("c++") is None:
        pytest.skip("no C++ compiler here to build ExecuTorch's side of the comparison with: apt install g++")
    desktop.device("build-executorch")
    return desktop


@pytest.fixture(scope="module")
def service(bundle: Path) -> Iterator[str]:
    """The URL of a program service on this machine."""
    command = [sys.executable, *SPAFL, "programs", str(bundle), "--port", "0", "--json"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        line = process.stdout.readline()
        assert line, "the service did not start"
        yield json.loads(line)["url"]
        process.terminate()


def test_five_steps_on_arm64_are_those_on_x86_64_and_those_of_onnxruntime(
    phone: Machine, desktop: Machine, trajectories: Trajectories
) -> None:
    got, expected = (load_file(trajectories("executorch", machine)) for machine in (phone, desktop))
    assert_close(got, expected)
    assert_close(got, load_file(trajectories("onnx", desktop)))


def test_a_round_begun_by_onnxruntime_on_x86_64_ends_by_executorch_on_arm64(
    phone: Machine, desktop: Machine, trajectories: Trajectories, bundle: Path, inputs: Path, tmp_path: Path
) -> None:
    begun = trajectories("onnx", desktop)
    phone.run(TRAJECTORY, "executorch", bundle, inputs, tmp_path / "out", begun)
    got, expected = load_file(tmp_path / "out"), load_file(begun)
    assert_close(ended(got), ended(expected))


def test_a_compact_program_is_filled_proven_and_run_on_arm64(
    phone: Machine, desktop: Machine, service: str, bundle: Path, data: Path, tmp_path: Path
) -> None:
    state = tmp_path / "state"
    options = ("--epochs", "1", "--batch-size", "8", "--rounds", "1")
    desktop.device("train", "--bundle", bundle, "--data", data, "--state", state, *options)
    proofs = {}
    for name, machine in (("there", phone), ("here", desktop)):
        out = tmp_path / name
        machine.device("compact", "--state", state, "--data", data, "--programs", service, "--out", out)
        proofs[name] = json.loads((out / PROOF).read_text())
    got, expected = proofs["there"], proofs["here"]
    assert got["relative_difference"] <= RELATIVE_TOLERANCE
    assert got["runtime"] == expected["runtime"]
    assert [layer["kept"] < layer["total"] for layer in got["layers"]] == [True, True, True, False]
    for same in ("equal", "density", "layers"):
        assert got[same] == expected[same]
    assert got["compact"]["bytes"] == expected["compact"]["bytes"]
    model = tmp_path / "there" / "model.pte"
    predicted = [
        machine.device("predict", data, "--state", state, "--model", model) for machine in (phone, desktop)
    ]
    assert predicted[0] == predicted[1]
