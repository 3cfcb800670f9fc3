"""Local examples in memory, and the order in which they train: pure functions of seeds."""

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spafl.layout import Floats
from spafl.manifest import InputSpec


@dataclass(frozen=True, slots=True)
class Examples:
    """Examples of one kind: `x` (n, *shape), bytes still to be scaled or float32 as the model takes them; `y` (n,)."""

    x: NDArray[Any]
    y: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.y)

    def take(self, indices: NDArray[np.intp]) -> "Examples":
        """Returns the examples at `indices`, in that order."""
        return Examples(self.x[indices], self.y[indices])

    def inputs(self, spec: InputSpec) -> Floats:
        """Returns float32 (n, *shape) as the model takes them: bytes become (value / 255 - mean) / std by channel."""
        if self.x.dtype != np.uint8:
            return np.asarray(self.x, np.float32)
        by_channel = (-1, *[1] * (len(spec.shape) - 1))
        mean = np.asarray(spec.mean, np.float32).reshape(by_channel)
        std = np.asarray(spec.std, np.float32).reshape(by_channel)
        return (self.x.astype(np.float32) / np.float32(255) - mean) / std


@dataclass(frozen=True, slots=True)
class LocalData:
    """A device's examples: those it trains on, and those it only measures its accuracy on."""

    train: Examples
    validation: Examples


def split(examples: Examples, share: float, seed: int) -> LocalData:
    """Returns `examples` split: a random `share` (0 to below 1, rounded down) of them is for validation.

    The same examples and seed are split the same way each time.
    """
    order = np.random.default_rng([seed, len(examples)]).permutation(len(examples))
    count = int(len(examples) * share)
    return LocalData(examples.take(np.sort(order[count:])), examples.take(np.sort(order[:count])))


def batches(count: int, size: int, seed: int, round: int, epoch: int) -> list[NDArray[np.intp]]:
    """Returns the indices of each batch of an epoch: every one of `count` examples once, the last batch maybe smaller.

    A function of its arguments alone, so that an epoch interrupted by kill -9 goes on as the same epoch.
    """
    order = np.random.default_rng([seed, round, epoch]).permutation(count)
    return [order[start : start + size] for start in range(0, count, size)]
