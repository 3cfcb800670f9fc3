"""The plainest client of a bundle's ExecuTorch programs: what the parity check trains and infers with.

Runs them with ExecuTorch's own Python runtime, which is there where PyTorch is.
"""

import os
import sys
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.host import Arrays
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.step import SCALARS

METHOD = "forward"


class LoadedProgram:
    """A program in ExecuTorch's Python runtime."""

    def __init__(self, program: bytes) -> None:
        with warnings.catch_warnings(), _silent():
            warnings.simplefilter("ignore")  # it warns of being experimental
            from executorch.extension.pybindings import portable_lib

            portable_lib._unsafe_reset_threadpool(1)
            self._held = (
                program  # the runtime reads the bytes as long as it runs, and keeps no reference to them
            )
            self._module = portable_lib._load_for_executorch_from_buffer(program)

    def run(self, arrays: Sequence[NDArray[Any]]) -> list[NDArray[Any]]:
        """Returns copies of the outputs."""
        tensors = tuple(torch.from_numpy(np.array(value, order="C")) for value in arrays)
        outputs: list[Tensor] = self._module.run_method(METHOD, tensors)
        return [output.numpy().copy() for output in outputs]


@contextmanager
def _silent() -> Iterator[None]:
    """Keeps what native code writes to standard error away: the runtime tells there how it looks for ARM cores."""
    sys.stderr.flush()
    kept = os.dup(2)
    try:
        with Path(os.devnull).open("wb") as nowhere:
            os.dup2(nowhere.fileno(), 2)
        yield
    finally:
        os.dup2(kept, 2)
        os.close(kept)


class ProgramHost:
    """A device's state in a round, moved forward by `train_step.pte`; `files` are the programs' bytes by name."""

    def __init__(self, manifest: Manifest, files: Mapping[str, bytes]) -> None:
        self._tensors = manifest.state
        names = manifest.engines["executorch"].files
        self._step = LoadedProgram(files[names["train_step"]])
        self._evaluate = LoadedProgram(files[names["evaluate"]])
        self.state: Arrays = {}
        self.momenta: Arrays = {}
        self.active: Arrays = {}
        self.rows: Arrays = {}

    def synchronise(self, state: Mapping[str, Floats], momenta: Mapping[str, Floats]) -> None:
        """Returns nothing; the next step starts from the given whole state and momenta."""
        self.state, self.momenta = dict(state), dict(momenta)

    def step(self, x: Floats, y: NDArray[np.int64], h: Hyperparameters) -> tuple[float, int]:
        """Returns mean task loss and right predictions of one step."""
        scalars = h.scalars()
        state = [tensor.name for tensor in self._tensors]
        trained = [tensor.name for tensor in self._tensors if tensor.trained]
        loss, correct, *following = self._step.run(
            [
                x,
                y,
                *(np.array(scalars[name], np.float32) for name in SCALARS),
                *(self.state[name] for name in state),
                *(self.momenta[name] for name in trained),
            ]
        )
        self.state = dict(zip(state, following, strict=False))
        self.momenta = dict(zip(trained, following[len(state) :], strict=True))
        return float(loss), int(correct)

    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        """Returns logits (n, labels) of the masked model for x (n, *shape)."""
        return self._evaluate.run([x, *(state[tensor.name] for tensor in self._tensors)])[0]
