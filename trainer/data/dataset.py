"""Labelled examples in memory, and what a model has to know about them."""

import hashlib
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from spafl.layout import Floats
from spafl.manifest import InputSpec
from trainer.errors import DataError

MAX_BYTES = 4 << 30
"""The most memory a dataset may take: sources check what their headers claim against it before they read on."""

Bytes = NDArray[np.uint8]
Ints = NDArray[np.int64]


@dataclass(frozen=True, slots=True, eq=False)
class Dataset:
    """Examples `x` (n, *shape), uint8 or float32, channels first; labels `y` (n,) int64, indices into `labels`.

    Raises:
        DataError: dtypes or shapes differ from these, a label has no name, or a float is not finite.
    """

    x: Bytes | Floats
    y: Ints
    labels: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.x.dtype not in (np.uint8, np.float32) or self.x.ndim < 2 or 0 in self.x.shape[1:]:
            raise DataError(
                f"expected examples (n, ...) in uint8 or float32, got {self.x.shape} {self.x.dtype}"
            )
        if self.y.dtype != np.int64 or self.y.shape != self.x.shape[:1]:
            raise DataError(f"expected {len(self.x)} labels int64, got {self.y.shape} {self.y.dtype}")
        if len(self.labels) < 2:
            raise DataError(f"expected names of at least 2 labels, got {self.labels}")
        if len(self.y) and not 0 <= self.y.min() <= self.y.max() < len(self.labels):
            raise DataError(
                f"labels run from {self.y.min()} to {self.y.max()}, expected 0 to {len(self.labels) - 1}"
            )
        if self.x.dtype == np.float32 and not np.isfinite(self.x).all():
            raise DataError("examples hold NaN or infinite values")

    def __len__(self) -> int:
        return len(self.y)

    @property
    def shape(self) -> tuple[int, ...]:
        """Returns the shape of one example, channels first."""
        return self.x.shape[1:]

    def take(self, indices: Any) -> "Dataset":
        """Returns the examples at `indices`, in that order."""
        return Dataset(self.x[indices], self.y[indices], self.labels)

    def counts(self) -> Ints:
        """Returns the number of examples of each label (labels,)."""
        return np.bincount(self.y, minlength=len(self.labels))


@dataclass(frozen=True, slots=True, eq=False)
class Split:
    """Examples to train on and others to test with, of the same shape, dtype and labels.

    Raises:
        DataError: they differ in these, or there is nothing to train on.
    """

    train: Dataset
    test: Dataset

    def __post_init__(self) -> None:
        ours, theirs = ((part.shape, part.x.dtype.name, part.labels) for part in (self.train, self.test))
        if ours != theirs:
            raise DataError(f"training examples are {ours}, test examples {theirs}: they have to be alike")
        if not len(self.train):
            raise DataError("no training examples")

    def take(self, train: Any, test: Any) -> "Split":
        """Returns the training examples at indices `train` and the test examples at `test`."""
        return Split(self.train.take(train), self.test.take(test))

    def shaped(self, shape: tuple[int, ...]) -> "Split":
        """Returns the same examples as (n, *shape), where only axes of length 1 are more or fewer; else unchanged."""
        if [size for size in self.train.shape if size != 1] != [size for size in shape if size != 1]:
            return self
        parts = (Dataset(part.x.reshape(-1, *shape), part.y, part.labels) for part in (self.train, self.test))
        return Split(*parts)

    def digest(self) -> str:
        """Returns 64 hex digits that name exactly these examples in this order."""
        digest = hashlib.sha256("\0".join(self.train.labels).encode())
        for part in (self.train, self.test):
            digest.update(f"{part.x.shape}{part.x.dtype.name}".encode())
            digest.update(np.ascontiguousarray(part.x).data)
            digest.update(part.y.astype("<i8").data)
        return digest.hexdigest()


def split_off_test(data: Dataset, *, share: float = 0.2, seed: int = 0) -> Split:
    """Returns `data` with `share` of each label's examples, rounded, drawn as test examples."""
    draw = np.random.default_rng(seed)
    chosen = np.zeros(len(data), bool)
    for label in range(len(data.labels)):
        (indices,) = np.nonzero(data.y == label)
        chosen[draw.permutation(indices)[: round(share * len(indices))]] = True
    return Split(data.take(~chosen), data.take(chosen))


def input_spec(data: Dataset) -> InputSpec:
    """Returns how examples enter a model: their shape, and mean and deviation by channel of bytes / 255.

    Six digits each, computed from exact integer sums, so that the manifest is the same on every machine. Floats are
    taken as they are: their mean is given as 0, their deviation as 1.
    """
    channels = data.shape[0]
    if data.x.dtype != np.uint8:
        return InputSpec(shape=data.shape, mean=(0.0,) * channels, std=(1.0,) * channels)
    mean, std = [], []
    levels = np.arange(256, dtype=np.int64)
    for channel in range(channels):
        counts = np.bincount(data.x[:, channel].ravel(), minlength=256)
        total = int(counts.sum())
        first, second = int(counts @ levels) / total, int(counts @ levels**2) / total
        mean.append(first / 255)
        std.append(max(second - first * first, 0.0) ** 0.5 / 255)
    return InputSpec(
        shape=data.shape,
        # below 1e-4 a number has no canonical spelling: black stays black, a constant channel is only centred
        mean=tuple(round(value, 6) if value >= 1e-4 else 0.0 for value in mean),
        std=tuple(round(value, 6) if value >= 1e-4 else 1.0 for value in std),
    )


def model_input(x: Bytes | Floats, spec: InputSpec) -> Floats:
    """Returns examples (n, *shape) as a model takes them: bytes as (x / 255 - mean) / std, floats and ids as they are.

    Raises:
        DataError: the model takes token ids, and these are none it knows.
    """
    if spec.ids is not None:
        if x.size and not (x.min() >= 0 and x.max() < spec.ids and (x == np.floor(x)).all()):
            raise DataError(
                f"examples of {x.min():g} to {x.max():g}: expected token ids, whole numbers of 0 to {spec.ids - 1}"
            )
        return np.asarray(x, np.float32)
    if x.dtype != np.uint8:
        return np.asarray(x, np.float32)
    axes = (-1, *[1] * (x.ndim - 2))
    mean, std = (np.asarray(values, np.float32).reshape(axes) for values in (spec.mean, spec.std))
    return (x.astype(np.float32) / np.float32(255) - mean) / std
