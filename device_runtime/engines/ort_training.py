"""The engine on ONNX Runtime Training: a worker process in an environment of its own does the steps.

The state goes in when a round begins and comes out when it is saved or ends; a step sends its batch only.
"""

import contextlib
import os
import signal
import subprocess
import tempfile
import weakref
from collections.abc import Mapping
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.dense import DenseEngine
from device_runtime.engines.engine import EngineError, StepResult
from device_runtime.engines.ort_training_environment import require_python
from device_runtime.engines.ort_training_worker import read_frame, write_frame
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.step import MOMENTUM

PREDICTION_BATCH = 256
STOP_SECONDS = 2.0
"""For a worker to end by itself once nothing more will be asked of it."""
_SCRIPT = Path(__file__).with_name("ort_training_worker.py")


class OrtTrainingEngine(DenseEngine):
    """Trains with the bundle's artifacts, in a worker process that starts when it is first needed.

    A worker that dies takes the steps since the last checkpoint with it; `begin_round` and `resume` start another.
    """

    name = "ort_training"

    def __init__(self, bundle: Bundle, *, threads: int = 1, spinning: bool = False) -> None:
        super().__init__(bundle.manifest)
        self._bundle, self._threads, self._spinning = bundle, threads, spinning
        self._python = require_python()
        self._worker: _Worker | None = None
        self._layout = _parameters(bundle.manifest)

    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        """Returns logits (n, labels) of `state`'s masked model for x (n, *shape); see `Engine`."""
        x = np.ascontiguousarray(x, np.float32)
        header, logits = self._alive().ask(
            {"do": "predict", "shape": x.shape, "batch": PREDICTION_BATCH}, self._joined(state), x
        )
        return np.frombuffer(logits, np.float32).reshape(len(x), header["labels"])

    def _load(self, tensors: dict[str, Floats]) -> None:
        self._alive().ask({"do": "load"}, self._joined(tensors))

    def _tensors(self) -> dict[str, Floats]:
        _, body = self._current_worker().ask({"do": "tensors"})
        flat, tensors, at = np.frombuffer(body, np.float32), dict[str, Floats](), 0
        for name, shape in self._layout.items():
            size = int(np.prod(shape))
            tensors[name] = flat[at : at + size].reshape(shape).copy()
            at += size
        return tensors

    def _step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        request = {"do": "step", "shape": x.shape, "scalars": hyperparameters.scalars()}
        answer, _ = self._current_worker().ask(request, x, y)
        return StepResult(answer["loss"], answer["correct"])

    def _joined(self, tensors: Mapping[str, Floats]) -> Floats:
        """Returns the parameters one after the other, as the worker takes them; momenta not given are 0."""
        parts = [
            np.ravel(tensors[name]) if name in tensors else np.zeros(int(np.prod(shape)), np.float32)
            for name, shape in self._layout.items()
        ]
        return np.concatenate(parts, dtype=np.float32)

    def _alive(self) -> "_Worker":
        """Returns a worker with the bundle's artifacts: the one at work, or a new one."""
        if self._worker is None or self._worker.dead:
            self._worker = _Worker(self._python)
            self._open(self._worker)
        return self._worker

    def _current_worker(self) -> "_Worker":
        if self._worker is None or self._worker.dead:
            raise EngineError(
                "the process of engine ort_training is gone, and with it the steps since the last checkpoint: start "
                "again, the device goes on from there"
            )
        return self._worker

    def _open(self, worker: "_Worker") -> None:
        expected = sum(int(np.prod(shape)) for shape in self._layout.values())
        with tempfile.TemporaryDirectory(
            prefix="spafl-"
        ) as folder:  # that runtime loads models from files only
            for role, name in self.manifest.engines[self.name].files.items():
                suffix = "" if role == "checkpoint" else ".onnx"
                (Path(folder) / f"{role}{suffix}").write_bytes(self._bundle.read(name))
            request = {"do": "open", "folder": folder, "threads": self._threads, "spinning": self._spinning}
            answer, _ = worker.ask(request)
        if answer["parameters"] != expected:
            worker.stop()
            raise EngineError(
                f"the bundle's ort_training files hold {answer['parameters']} numbers, its manifest {expected}: "
                "export it again"
            )


class _Worker:
    """The process, asked one thing at a time."""

    def __init__(self, python: Path) -> None:
        self._log: IO[bytes] = tempfile.TemporaryFile()  # noqa: SIM115 - as long as the process
        command: list[str | Path] = [python, "-I", _SCRIPT, str(os.getpid())]
        try:
            self._process = subprocess.Popen(
                command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=self._log
            )
        except OSError as error:
            self._log.close()
            raise EngineError(f"cannot start {python}: {error}") from error
        self.dead = False
        # when the engine is forgotten, or the interpreter ends: no process is left behind
        self._finalizer = weakref.finalize(self, _stop, self._process, self._log)

    def ask(self, request: dict[str, Any], *body: Any) -> tuple[dict[str, Any], bytearray]:
        """Returns the answer's header and body.

        Raises:
            EngineError: the worker refused or failed, or its process is gone.
        """
        stdin, stdout = self._process.stdin, self._process.stdout
        assert stdin is not None
        assert stdout is not None
        try:
            write_frame(stdin, request, *body)
            answer, out = read_frame(stdout)
        except (EOFError, OSError) as error:
            raise EngineError(self._obituary()) from error
        except ValueError as error:
            self.stop()
            raise EngineError(f"engine ort_training: {error}") from error
        except BaseException:
            self.stop()  # in the middle of a frame: whatever came next would be read as the rest of this one
            raise
        if "error" in answer:
            raise EngineError(f"engine ort_training: {answer['error']}")
        return answer, out

    def stop(self) -> None:
        """Returns nothing; the process has ended."""
        self.dead = True
        self._finalizer()

    def _obituary(self) -> str:
        try:
            code = self._process.wait(STOP_SECONDS)
            how = f"killed by {signal.Signals(-code).name}" if code < 0 else f"it ended with {code}"
        except subprocess.TimeoutExpired:
            how = "it closed its streams"
        self._log.seek(0)
        words = self._log.read()[-2000:].decode(errors="replace").strip().splitlines()
        self.stop()
        said = f"; it said: {words[-1][:300]}" if words else ""
        return (
            f"the process of engine ort_training is gone ({how}{said}): start again, the device goes on from its last "
            "checkpoint"
        )


def _stop(process: subprocess.Popen[bytes], log: IO[bytes]) -> None:
    log.close()
    for stream in (process.stdin, process.stdout):
        if stream is not None:
            with contextlib.suppress(OSError):
                stream.close()  # no more requests: it ends
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


def _parameters(manifest: Manifest) -> dict[str, tuple[int, ...]]:
    """Returns the shapes of the training model's parameters by name, in its order."""
    shapes = {tensor.name: tensor.shape for tensor in manifest.state}
    return shapes | {MOMENTUM + tensor.name: tensor.shape for tensor in manifest.state if tensor.trained}
