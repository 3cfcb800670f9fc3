"""Where ONNX Runtime Training is: in a virtual environment of its own, which export and devices start processes in.

Its package owns the module name `onnxruntime`, as the ordinary one does, so no process can have both.
"""

import functools
import os
import subprocess
from pathlib import Path

from spafl.errors import SettingsError

RELEASE = "1.19.2"
"""The last one. Files and Python interface of others differ."""
PACKAGES = ("onnxruntime-training-cpu", "onnxruntime-training")
"""Names of the one distribution: for processors, and for graphics cards too."""
VARIABLE = "SPAFL_ORT_TRAINING"
"""Names the environment's Python, in place of the one in the user's cache."""
INSTALL = "spafl device install-ort-training"
_ADVICE = f"run `{INSTALL}` (`make engines` in a checkout does it too)"
_PROBE_SECONDS = 60

_PROBE = f"""
from importlib.metadata import PackageNotFoundError, version
import numpy
for name in {PACKAGES!r}:
    try:
        print(version(name))
        break
    except PackageNotFoundError:
        pass
"""


def environment() -> Path:
    """Returns the folder of the environment in the user's cache, whether it is there or not."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(cache) / "spafl" / f"ort-training-{RELEASE}"


def python_of(folder: Path) -> Path:
    """Returns the Python of the virtual environment in `folder`."""
    return folder / "bin" / "python"


def find_python() -> Path:
    """Returns the Python that has ONNX Runtime Training: the one `VARIABLE` names, or the one in the user's cache.

    Raises:
        SettingsError: there is none, or it has another release; the message names the command that helps.
    """
    named = os.environ.get(VARIABLE)
    python = Path(named) if named else python_of(environment())
    needs = f"engine ort_training needs ONNX Runtime Training {RELEASE}"
    advice = f"unset {VARIABLE} and {_ADVICE}" if named else _ADVICE
    if not python.is_file():
        raise SettingsError(
            f"{needs}, and {f'{python} is no file' if named else 'it is not installed'}: {advice}"
        )
    found = installed(python)
    if found != RELEASE:
        raise SettingsError(f"{needs}; {python} has {found or 'none'}: {advice}")
    return python


@functools.cache
def installed(python: Path) -> str | None:
    """Returns the release of ONNX Runtime Training that `python` has; None without it, or without numpy."""
    try:
        done = subprocess.run(
            [python, "-I", "-c", _PROBE], capture_output=True, text=True, timeout=_PROBE_SECONDS, check=True
        )
    except (OSError, subprocess.SubprocessError):
        return None
    return done.stdout.strip() or None
