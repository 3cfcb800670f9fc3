"""What every engine does: train a bundle's model between two exchanges of thresholds, and infer with it."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import DeviceError
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest


class EngineError(DeviceError):
    """An engine cannot be opened or was used out of order."""


@dataclass(frozen=True, slots=True)
class RoundStart:
    """What a round starts from: share of active filters by layer, and the layers whose thresholds were reset."""

    density: dict[str, float]
    collapsed: tuple[str, ...]


@dataclass(frozen=True, slots=True)
class StepResult:
    """One step: the batch's mean task loss before it, and how many examples it classified rightly."""

    loss: float
    correct: int


class Engine(Protocol):
    """Trains a model in rounds: begin_round or resume, step as often as wanted, end_round.

    A state is a dict of float32 arrays under the names of `manifest.state`. All engines read and write the same
    states and checkpoints, so a device can change engines at any moment. Not safe to share between threads.
    """

    name: str
    manifest: Manifest

    def begin_round(self, state: Mapping[str, Floats], base: Floats, target: Floats) -> RoundStart:
        """Returns what the round starts from; `state` is caught up from thresholds `base` to `target`, both (size,)."""
        ...

    def step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        """Returns the outcome of one step on x (n, *shape) float32, y (n,) int64."""
        ...

    def checkpoint(self) -> dict[str, NDArray[Any]]:
        """Returns the round as it stands: whole state, momentum.<tensor> of its shape, active.<layer>."""
        ...

    def resume(self, checkpoint: Mapping[str, NDArray[Any]]) -> None:
        """Returns nothing; the next step goes on exactly where `checkpoint` was taken."""
        ...

    def end_round(self) -> dict[str, Floats]:
        """Returns the whole state after the round's last step."""
        ...

    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        """Returns logits (n, labels) float32 of `state`'s compact model for x (n, *shape)."""
        ...
