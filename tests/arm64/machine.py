"""The two machines a device runs on here: this one, and ARM64 under emulation. Both get the same code and files."""

import json
import os
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from tests.arm64.sysroot import EMULATOR, PYTHON

SECONDS = 500
"""Emulation takes 30 to 300 times as long as the machine underneath: up to a minute, where nothing else runs."""

SPAFL = ("-c", "from spafl.cli import main; main()")


@dataclass(frozen=True)
class Machine:
    """Runs Python with `command` and `environment`; warnings are errors."""

    command: tuple[str, ...]
    environment: dict[str, str]

    def start(self, *arguments: str | Path, **environment: str) -> "subprocess.Popen[str]":
        """Returns a running Python; its output is to be read from stdout."""
        return subprocess.Popen(
            [*self.command, "-W", "error", *map(str, arguments)],
            env={**self.environment, **environment},
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )

    def run(self, *arguments: str | Path, **environment: str) -> str:
        """Returns what Python printed once it ended well."""
        with self.start(*arguments, **environment) as process:
            try:
                out, errors = process.communicate(timeout=SECONDS)
            except BaseException:
                process.kill()
                raise
        assert process.returncode == 0, (
            f"{arguments} ended with {process.returncode}: {out[-2000:]}{errors[-4000:]}"
        )
        return out

    def device(self, *arguments: str | Path, **environment: str) -> list[dict[str, Any]]:
        """Returns the lines `spafl device ... --json` printed."""
        out = self.run(*SPAFL, "device", *arguments, "--json", **environment)
        return [json.loads(line) for line in out.splitlines()]


def desktop(sysroot: Path) -> Machine:
    """Returns this machine, with the device's rooms from the sysroot's folder."""
    return Machine((sys.executable,), {**_environment(sysroot), "PYTHONPATH": str(sysroot / "app")})


def phone(sysroot: Path) -> Machine:
    """Returns ARM64 under emulation."""
    root = sysroot / "root"
    command = (
        str(sysroot / "tools/usr/bin" / EMULATOR),
        "-L",
        str(root),
        str(root / f"usr/bin/python{PYTHON}"),
    )
    return Machine(command, {**_environment(sysroot), "PYTHONPATH": f"{sysroot / 'app'}:{sysroot / 'site'}"})


def _environment(sysroot: Path) -> dict[str, str]:
    # only what both need: a variable of the one Python, or a library path, would break the other
    return {
        "PATH": os.environ.get("PATH", "/usr/bin:/bin"),
        "HOME": str(sysroot),
        "PYTHONPYCACHEPREFIX": str(sysroot / "pycache"),
        "PYTHONSAFEPATH": "1",  # the current folder is the checkout, with rooms that a device has not
        "OMP_NUM_THREADS": "1",
        "LC_ALL": "C.UTF-8",
    }
