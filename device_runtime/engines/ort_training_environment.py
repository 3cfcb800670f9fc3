"""The virtual environment of ONNX Runtime Training: made once per machine, 115 MB, nothing of this project in it."""

import subprocess
import sys
from pathlib import Path

from device_runtime.engines.engine import EngineError
from spafl.errors import SettingsError
from spafl.ort_training import INSTALL, PACKAGES, RELEASE, environment, find_python, installed, python_of

NUMPY = "numpy>=1.26,<3"
LAST_PYTHON = (3, 12)
"""The newest that its wheels were built for."""
_SECONDS = 1800
"""9 MB of it and 17 of numpy, over a slow line."""


def require_python() -> Path:
    """Returns the Python that has ONNX Runtime Training.

    Raises:
        EngineError: it is not installed; the message names the command that helps.
    """
    try:
        return find_python()
    except SettingsError as error:
        raise EngineError(str(error)) from error


def install(folder: Path | None = None, python: Path | None = None) -> Path:
    """Returns the Python of an environment with ONNX Runtime Training; nothing is done if it is there already.

    folder   where to make it; default: the user's cache, where the engine looks
    python   to make it with; default: this one

    Raises:
        EngineError: this Python is too new, or pip cannot install it.
    """
    folder = folder or environment()
    made = python_of(folder)
    if made.is_file() and installed(made) == RELEASE:
        return made
    if python is None and sys.version_info[:2] > LAST_PYTHON:
        raise EngineError(
            f"ONNX Runtime Training {RELEASE} has no wheels for Python {sys.version_info[0]}.{sys.version_info[1]}: "
            f"run {INSTALL} --python with one of {LAST_PYTHON[0]}.{LAST_PYTHON[1]} or older"
        )
    _run([str(python or sys.executable), "-m", "venv", "--clear", "--without-pip", str(folder)])
    # without its dependencies, h5py and sympy among them: what runs there uses none but numpy
    requirements = [f"{PACKAGES[0]}=={RELEASE}", NUMPY]
    options = ["--no-deps", "--only-binary=:all:", "--disable-pip-version-check", "--quiet"]
    _run([sys.executable, "-m", "pip", "--python", str(made), "install", *options, *requirements])
    installed.cache_clear()
    if installed(made) != RELEASE:
        raise EngineError(f"{made} has no ONNX Runtime Training after all: remove {folder} and try again")
    return made


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"cannot install ONNX Runtime Training: {error}") from error
    if done.returncode:
        lines = [line for line in (done.stderr or done.stdout).splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR")] or lines or ["no output"]
        raise EngineError(f"cannot install ONNX Runtime Training: {errors[-1][:300]}")
