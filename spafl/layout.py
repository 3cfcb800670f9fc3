"""Which filter each number of a threshold vector belongs to."""

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property
from typing import Any, Literal, Self, TypeAlias

import numpy as np
from numpy.typing import NDArray

from spafl.canonical import canonical_json, sha256_hex
from spafl.errors import LayoutError

Floats: TypeAlias = NDArray[np.float32]

MAX_LAYERS = 4096
MAX_NAME = 256
MAX_AXIS = 2**31 - 1
MAX_THRESHOLDS = 16_777_216
MIN_SCALE, MAX_SCALE = 1e-4, 1e4


@dataclass(frozen=True, slots=True)
class Layer:
    """One masked layer: `out` filters (or neurons) of `n_in` weights each.

    name     its module path in the model; its tensors are `<name>.weight` (out, ...) and `<name>.threshold` (out,)
    n_in     weights per filter: C_in * kh * kw of a convolution, input features of a linear layer
    n_scale  divisor of the catch-up step: kh * kw of a convolution in the published code, n_in of a linear layer
    offset   index of its first threshold in the flat vector
    scale    the unit its thresholds are in: 1 as published, else the layer's initial mean |w|

    Raises:
        LayoutError: an unknown kind, or a name, size or scale that is not of its type or in its range.
    """

    name: str
    kind: Literal["conv", "linear"]
    out: int
    n_in: int
    n_scale: int
    offset: int
    scale: float = 1.0

    def __post_init__(self) -> None:
        if not (isinstance(self.name, str) and 0 < len(self.name) <= MAX_NAME):
            raise LayoutError(f"expected a layer name of 1 to {MAX_NAME} characters, got {self.name!r:.80}")
        if self.kind not in ("conv", "linear"):
            raise LayoutError(f"layer {self.name!r} has kind {self.kind!r:.80}, expected conv or linear")
        sizes = (self.out, self.n_in, self.n_scale)
        if any(type(size) is not int or not 1 <= size <= MAX_AXIS for size in sizes):
            raise LayoutError(
                f"layer {self.name!r} needs out, n_in and n_scale of 1 to {MAX_AXIS}, got {sizes}"
            )
        if not (isinstance(self.scale, float | int) and MIN_SCALE <= self.scale <= MAX_SCALE):
            raise LayoutError(
                f"layer {self.name!r} has scale {self.scale!r}, expected {MIN_SCALE} to {MAX_SCALE}"
            )

    @property
    def span(self) -> slice:
        """Returns where this layer's thresholds lie in the flat vector."""
        return slice(self.offset, self.offset + self.out)

    @property
    def weight(self) -> str:
        """Returns the name of its weight tensor, shape (out, ...)."""
        return f"{self.name}.weight"

    @property
    def threshold(self) -> str:
        """Returns the name of its threshold tensor, shape (out,)."""
        return f"{self.name}.threshold"


@dataclass(frozen=True)
class ThresholdLayout:
    """The ordered masked layers of a model: the meaning of a flat float32 threshold vector.

    Raises:
        LayoutError: no layers or too many, a repeated name, or offsets with gaps or overlaps.
    """

    layers: tuple[Layer, ...]

    def __post_init__(self) -> None:
        if not 0 < len(self.layers) <= MAX_LAYERS:
            raise LayoutError(f"a layout needs 1 to {MAX_LAYERS} masked layers, got {len(self.layers)}")
        if len({layer.name for layer in self.layers}) != len(self.layers):
            raise LayoutError(f"layer names repeat: {[layer.name for layer in self.layers][:8]}")
        start = 0
        for layer in self.layers:
            if type(layer.offset) is not int or layer.offset != start:
                raise LayoutError(f"layer {layer.name!r} starts at {layer.offset!r}, expected {start}")
            start += layer.out
        if self.size > MAX_THRESHOLDS:
            raise LayoutError(f"a layout holds at most {MAX_THRESHOLDS} thresholds, got {self.size}")

    @cached_property
    def id(self) -> str:
        """Returns the first 16 hex digits of the SHA-256 of the canonical JSON: equal ids, equal meaning.

        Sixteen, because the id travels in every body and guards against mistakes, not against forgery: who may
        upload is decided by tokens and leases.
        """
        return sha256_hex(canonical_json(self.to_json()))[:16]

    @property
    def size(self) -> int:
        """Returns the length of a threshold vector: the sum of the layers' filters."""
        last = self.layers[-1]
        return last.offset + last.out

    @classmethod
    def of(cls, layers: Iterable[Layer | Mapping[str, Any]]) -> Self:
        """Returns the layout of `layers` in the given order with their offsets computed."""
        placed, offset = [], 0
        for layer in layers:
            fields = asdict(layer) if isinstance(layer, Layer) else dict(layer)
            placed.append(Layer(**{**fields, "offset": offset}))
            offset = placed[-1].span.stop
        return cls(tuple(placed))

    def to_json(self) -> list[dict[str, Any]]:
        """Returns the layers as JSON objects in order: what the id is the hash of."""
        return [asdict(layer) for layer in self.layers]

    @classmethod
    def from_json(cls, layers: Sequence[Mapping[str, Any]]) -> Self:
        """Returns the layout written by `to_json`.

        Raises:
            LayoutError: fields are missing or unknown, or the layers do not fit together.
        """
        try:
            return cls(tuple(Layer(**layer) for layer in layers))
        except TypeError as error:
            raise LayoutError(f"a layer of the layout has wrong fields: {error}") from error

    def join(self, tensors: Mapping[str, NDArray[Any]]) -> Floats:
        """Returns the flat float32 vector (size,) of the layers' `<name>.threshold` tensors.

        Raises:
            LayoutError: a threshold tensor is missing or its shape is not (out,).
        """
        vector = np.empty(self.size, np.float32)
        for layer in self.layers:
            threshold = tensors.get(layer.threshold)
            if threshold is None or threshold.shape != (layer.out,):
                got = "nothing" if threshold is None else f"shape {threshold.shape}"
                raise LayoutError(f"{layer.threshold}: expected shape ({layer.out},), got {got}")
            vector[layer.span] = threshold
        return vector

    def split(self, vector: NDArray[Any]) -> dict[str, Floats]:
        """Returns `<name>.threshold` -> (out,) copies of the flat `vector` (size,).

        Raises:
            LayoutError: the vector's shape is not (size,).
        """
        if vector.shape != (self.size,):
            raise LayoutError(f"layout {self.id} has {self.size} thresholds, got shape {vector.shape}")
        return {layer.threshold: vector[layer.span].astype(np.float32) for layer in self.layers}
