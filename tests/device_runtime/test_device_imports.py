"""The device path needs none of the other rooms' packages: here they cannot even be imported."""

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

BLOCKED = (
    "torch",
    "onnx",
    "onnxscript",
    "fastapi",
    "starlette",
    "uvicorn",
    "sqlalchemy",
    "sklearn",
    "matplotlib",
    "trainer",
    "export",
    "server_api",
)
WALL = f"""
import sys
def importer():
    frame = sys._getframe(2)
    while frame.f_globals["__name__"].startswith(("importlib", "pydantic")):
        frame = frame.f_back
    return frame.f_globals["__name__"]
class Wall:
    def find_spec(self, name, path=None, target=None):
        package = name.partition(".")[0]
        # typer reads the command line with pydantic; nothing of ours may
        if package in {BLOCKED!r} or package == "pydantic" and not importer().startswith("typer"):
            raise ImportError(f"the device path imported {{name}}")
sys.meta_path.insert(0, Wall())
"""


def walled(script: str, *arguments: str, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", WALL + script, *arguments],
        capture_output=True,
        text=True,
        timeout=120,
        check=False,
        cwd=cwd,
    )


def test_the_wall_holds() -> None:
    assert "the device path imported torch" in walled("import torch").stderr
    assert "the device path imported pydantic" in walled("import pydantic").stderr


def test_every_module_imports_behind_the_wall() -> None:
    script = """
import pkgutil, importlib, device_runtime
names = [module.name for module in pkgutil.walk_packages(device_runtime.__path__, "device_runtime.")]
for name in names:
    importlib.import_module(name)
print(len(names))
"""
    done = walled(script)
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def test_training_compacting_and_predicting_behind_the_wall(small_bundle_file: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=random.integers(0, 256, (40, 8, 8), np.uint8), y=random.integers(0, 3, 40))
    script = """
from spafl.cli import main
for line in sys.argv[1:]:
    sys.argv = ["spafl", "device", *line.split(), "--json"]
    try:
        main()
    except SystemExit as status:
        assert not status.code, status.code
"""
    done = walled(
        script,
        f"train --bundle {small_bundle_file} --state s --data d.npz --rounds 1 --epochs 1 --batch-size 8",
        "compact --state s --data d.npz",
        "predict --state s d.npz",
        "status --state s",
        cwd=tmp_path,
    )
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "s" / "compact" / "model.onnx").stat().st_size > 1000


def test_a_training_process_loads_no_pydantic(small_bundle_file: Path, tmp_path: Path) -> None:
    random = np.random.default_rng(0)
    np.savez(tmp_path / "d.npz", x=random.integers(0, 256, (40, 8, 8), np.uint8), y=random.integers(0, 3, 40))
    script = """
import device_runtime.agent, device_runtime.program
from device_runtime.data import load_data
from device_runtime.engines import open_engine
from device_runtime.local import adopt, train_locally
from device_runtime.report import JsonLines
from device_runtime.state import DeviceState, read_journal
from device_runtime.watch import Watch
from pathlib import Path
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
report = JsonLines()
with DeviceState("s") as state, Watch(report) as watch:
    held = adopt(state, Bundle.open(sys.argv[1]))
    data = load_data("d.npz", held.manifest, validation=0.2, seed=0)
    settings = Hyperparameters(epochs=1, batch_size=8)
    train_locally(state, held, open_engine("onnx", held), data, 1, settings, seed=0, watch=watch, report=report)
assert read_journal(Path("s")).trained == 1
assert not {"pydantic", "pydantic_core", "annotated_types", "torch"} & set(sys.modules)
"""
    done = walled(script, str(small_bundle_file), cwd=tmp_path)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize("script", ["import device_runtime", "import device_runtime.command"])
def test_importing_the_room_or_its_command_loads_nothing_heavy(script: str) -> None:
    heavy = ("onnxruntime", "numpy", "httpx2", "pydantic", "PIL", "safetensors")
    done = walled(f"{script}\nprint([name for name in {heavy!r} if name in sys.modules])")
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_executorch_is_found_without_what_only_its_build_needs() -> None:
    script = """
from device_runtime.engines import EngineError, require_engine
import device_runtime.engines.executorch
try:
    require_engine("executorch")
except EngineError:
    pass
print([name for name in ("subprocess", "tempfile", "email", "importlib.metadata") if name in sys.modules])
"""
    done = walled(script)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


def test_the_client_and_agent_leave_engines_and_pictures_alone() -> None:
    script = "import device_runtime.agent, device_runtime.data"
    done = walled(
        f"{script}\nprint([name for name in ('onnxruntime', 'PIL', 'rich') if name in sys.modules])"
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"
