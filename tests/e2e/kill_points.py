"""Runs a device again and again, killed (SIGKILL) one write later each time; prints what became of it as JSON lines.

    python -m tests.e2e.kill_points FOLDER

A write is any call that changes the disk: a state file being written (killed half way through), a flush, a rename, a
removal. Each line is one kill point: the device was killed there, started again, and finished its run.
"""

import json
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import safetensors.numpy

from device_runtime.agent import Agent, Work
from device_runtime.client import Client
from device_runtime.journal import Identity
from device_runtime.report import JsonLines
from device_runtime.state import DeviceState
from device_runtime.training import Tempo
from device_runtime.watch import Watch
from spafl.bundle import Bundle, write_bundle
from spafl.canonical import sha256_hex
from spafl.secret import Secret
from tests.device_runtime.tiny import TOKEN, FileServer, NumpyEngine, tiny_bundle, tiny_data

ROUNDS = 2


class Fuse:
    """Kills this process at the `left`-th write from now; -1: never."""

    def __init__(self, left: int) -> None:
        self.left = left
        for module, name in ((os, "fsync"), (os, "replace"), (os, "rename"), (os, "unlink"), (os, "fdopen")):
            setattr(module, name, self.before(getattr(module, name)))
        self.save = safetensors.numpy.save_file
        safetensors.numpy.save_file = self.half_way  # type: ignore[assignment]

    def burn(self) -> bool:
        self.left -= 1
        return self.left == 0

    def before(self, write: Callable[..., Any]) -> Callable[..., Any]:
        def guarded(*args: Any, **options: Any) -> Any:
            if self.burn():
                os.kill(os.getpid(), signal.SIGKILL)
            return write(*args, **options)

        return guarded

    def half_way(self, tensors: Any, path: Path) -> None:
        self.save(tensors, path)
        if self.burn():
            os.truncate(path, path.stat().st_size // 2)
            os.kill(os.getpid(), signal.SIGKILL)


def run(folder: Path, bundle: Bundle, left: int) -> None:
    server = FileServer(folder / "server.json", bundle, ROUNDS)
    with (folder / "events").open("a") as stream:
        report = JsonLines(stream)
        Fuse(left)
        with DeviceState(folder / "state") as state, Watch(report) as watch:
            if state.identity is None:
                state.enrolled(Identity(server="http://server", device="d1", token=Secret(TOKEN)))
            client = Client("http://server", Secret(TOKEN), transport=server.transport)
            Agent(
                client,
                state,
                Work("r", tempo=Tempo(3600.0, steps=1)),
                load=lambda manifest: tiny_data(count=5),  # a step and a left-over example per epoch
                open_engine=NumpyEngine,
                watch=watch,
                report=report,
            ).work()


def forked(folder: Path, bundle: Bundle, left: int) -> int:
    child = os.fork()
    if child == 0:
        try:
            run(folder, bundle, left)
            os._exit(0)
        except BaseException as error:
            sys.stderr.write(f"{folder.name}: {type(error).__name__}: {error}\n")
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def outcome(folder: Path, bundle: Bundle) -> dict[str, Any]:
    with DeviceState(folder / "state") as state:
        journal = state.journal
        tensors, base = state.rest(bundle)
    told = json.loads((folder / "server.json").read_text())
    weights = b"".join(tensors[name].tobytes() for name in sorted(tensors)) + base.tobytes()
    return {
        "phase": journal.phase,
        "trained": journal.trained,
        "updates": journal.updates,
        "late": journal.late,
        "version": journal.version,
        "weights": sha256_hex(weights),
        "versions": told["versions"],
        "counted": sorted(told["updates"]),
        "left_over": sorted(file.name for file in (folder / "state").glob("*.part")),
    }


def main(folder: Path) -> None:
    bundle = tiny_bundle(folder / "bundle")
    point, status = 0, -signal.SIGKILL
    while status == -signal.SIGKILL:
        point += 1
        place = folder / f"kill-{point}"
        # the bundle is downloaded once in another test; here it would only repeat the same writes
        files = {name: bundle.read(name) for name in bundle.manifest.files}
        write_bundle(place / "state" / "bundle", bundle.manifest, files)
        status = forked(place, bundle, point)
        again = forked(place, bundle, -1)
        print(json.dumps({"point": point, "status": status, "again": again, **outcome(place, bundle)}))  # noqa: T201


if __name__ == "__main__":
    main(Path(sys.argv[1]))
