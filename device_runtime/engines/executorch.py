"""Trains with ExecuTorch: `train_step.pte` through the shim, without PyTorch; else through the official runtime."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.dense import DenseEngine
from device_runtime.engines.engine import EngineError, StepResult
from device_runtime.engines.executorch_library import RELEASE
from device_runtime.engines.executorch_program import Program, open_program
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.step import MOMENTUM, SCALARS

STEP, EVALUATE = "train_step", "evaluate"
METHOD = "forward"
PREDICTION_BATCH = 64


class ExecutorchEngine(DenseEngine):
    """An engine whose state lives in one set of arrays: the program reads them, and writes the next state over them.

    A batch may be as large as the exporter planned memory for. A larger one is refused: split in two it would be two
    steps, with other norms and another momentum.
    """

    name = "executorch"

    def __init__(self, bundle: Bundle, *, threads: int = 1) -> None:
        super().__init__(bundle.manifest)
        self._bundle, self._threads = bundle, threads
        self._names = [tensor.name for tensor in self.manifest.state]
        self._names += [MOMENTUM + tensor.name for tensor in self.manifest.state if tensor.trained]
        self._state: dict[str, Floats] | None = None
        self._step_program: Program | None = None
        release = self.manifest.engines[self.name].requires.get("executorch")
        if release != RELEASE:
            raise EngineError(
                f"bundle {self.manifest.name} has programs for ExecuTorch {release}, this engine runs those of "
                f"{RELEASE}: export it again"
            )

    def end_round(self) -> dict[str, Floats]:
        """Returns the whole state after the round; see `Engine`."""
        self._step_program = None  # its memory is for predictions now; opening it again takes milliseconds
        state = super().end_round()
        self._state = None
        return state

    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        """Returns logits (n, labels); see `Engine`."""
        # opened for each call: it is done in milliseconds, and its memory is free again afterwards
        program = self._open(EVALUATE)
        tensors = [np.asarray(state[tensor.name], np.float32) for tensor in self.manifest.state]
        x = np.ascontiguousarray(x, np.float32)
        starts = range(0, len(x), PREDICTION_BATCH)
        logits = [program.run(METHOD, [x[at : at + PREDICTION_BATCH], *tensors])[0] for at in starts]
        return np.concatenate([np.zeros((0, len(self.manifest.labels)), np.float32), *logits])

    def _load(self, tensors: dict[str, Floats]) -> None:
        self._state = tensors

    def _tensors(self) -> dict[str, Floats]:
        return {name: value.copy() for name, value in self._held().items()}

    def _step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        if self._step_program is None:
            self._step_program = self._open(STEP)
        state = self._held()
        most, *shape = self._step_program.largest(METHOD, 0)
        if not 1 <= len(x) <= most:
            raise EngineError(
                f"this bundle's ExecuTorch step takes 1 to {most} examples, got {len(x)}: set the run's batch_size to "
                f"{most} or less, or use another engine"
            )
        if list(x.shape[1:]) != shape or y.shape != x.shape[:1]:
            raise EngineError(
                f"expected x (n, {', '.join(map(str, shape))}) and y (n,), got {x.shape} and {y.shape}"
            )
        scalars = hyperparameters.scalars()
        arrays: list[NDArray[Any]] = [x, y, *(np.array(scalars[name], np.float32) for name in SCALARS)]
        places = [state[name] for name in self._names]
        self._state = None  # half written over if the program fails
        loss, correct, *_ = self._step_program.run(METHOD, [*arrays, *places], [None, None, *places])
        self._state = state
        return StepResult(float(loss), int(correct))

    def _held(self) -> dict[str, Floats]:
        if self._state is None:
            raise EngineError("the step before failed and left no state: resume from a checkpoint")
        return self._state

    def _open(self, role: str) -> Program:
        program = self._bundle.read(self.manifest.engines[self.name].files[role])
        return open_program(program, threads=self._threads)
