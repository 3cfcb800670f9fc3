"""What engines share that train whole tensors: their rounds begin and end in numpy, between their steps."""

from abc import ABC, abstractmethod
from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.checkpoint import refuse_foreign
from device_runtime.engines.engine import EngineError, RoundStart, StepResult
from spafl import algorithm
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.rows import training_rows
from spafl.step import ACTIVE, MOMENTUM


class DenseEngine(ABC):
    """An engine whose steps take and return the whole state; a subclass supplies the steps (see `Engine`).

    A step on whole tensors is masked where a step on rows leaves out, so both train the same numbers. Which rows
    were active when the round began is kept for the checkpoint alone: an engine of rows may go on from it.
    """

    name: str

    def __init__(self, manifest: Manifest) -> None:
        self.manifest = manifest
        self._active: dict[str, NDArray[np.int64]] | None = None

    @abstractmethod
    def _load(self, tensors: dict[str, Floats]) -> None:
        """Returns nothing; the next step starts from `tensors`: the state, and momentum.<tensor>; given away."""

    @abstractmethod
    def _tensors(self) -> dict[str, Floats]:
        """Returns copies of the state and momentum.<tensor> as the last step left them."""

    @abstractmethod
    def _step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        """Returns the outcome of one step; x and y are contiguous and of the right dtypes."""

    @abstractmethod
    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        """Returns logits (n, labels); see `Engine`."""

    def begin_round(self, state: Mapping[str, Floats], base: Floats, target: Floats) -> RoundStart:
        """Returns what the round starts from; see `Engine`."""
        layout = self.manifest.layout
        caught_up = algorithm.apply_global(layout, state, base, target)
        density = algorithm.densities(layout, caught_up)
        started, collapsed = algorithm.reset_collapsed(layout, caught_up)
        self._active = training_rows(self.manifest, algorithm.mask_of(layout, started))
        tensors = {
            tensor.name: _own(started[tensor.name], state[tensor.name]) for tensor in self.manifest.state
        }
        momenta = {
            MOMENTUM + tensor.name: np.zeros(tensor.shape, np.float32)
            for tensor in self.manifest.state
            if tensor.trained
        }
        self._load({**tensors, **momenta})
        return RoundStart(density, tuple(collapsed))

    def step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        """Returns the outcome of one step; see `Engine`."""
        self._current()
        return self._step(
            np.ascontiguousarray(x, np.float32), np.ascontiguousarray(y, np.int64), hyperparameters
        )

    def checkpoint(self) -> dict[str, NDArray[Any]]:
        """Returns the round as it stands; see `Engine`."""
        active = self._current()
        return {**self._tensors(), **{ACTIVE + layer: index for layer, index in active.items()}}

    def resume(self, checkpoint: Mapping[str, NDArray[Any]]) -> None:
        """Returns nothing; the round goes on where `checkpoint` was taken; see `Engine`."""
        refuse_foreign(self.manifest, checkpoint)
        names = [tensor.name for tensor in self.manifest.state]
        names += [MOMENTUM + tensor.name for tensor in self.manifest.state if tensor.trained]
        self._active = {
            name.removeprefix(ACTIVE): index.copy()
            for name, index in checkpoint.items()
            if name.startswith(ACTIVE)
        }
        self._load({name: np.array(checkpoint[name], order="C") for name in names})

    def end_round(self) -> dict[str, Floats]:
        """Returns the whole state after the round; see `Engine`."""
        self._current()
        self._active = None
        tensors = self._tensors()
        return {tensor.name: tensors[tensor.name] for tensor in self.manifest.state}

    def _current(self) -> dict[str, NDArray[np.int64]]:
        if self._active is None:
            raise EngineError("no round is under way: call begin_round or resume first")
        return self._active


def _own(value: Floats, given: Floats) -> Floats:
    """Returns `value` in C order, a copy where it is still the caller's `given`: weights caught up are new already."""
    return np.array(value, np.float32, order="C", copy=True if value is given else None)
