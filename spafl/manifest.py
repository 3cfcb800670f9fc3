"""What a bundle says about itself: `manifest.json`."""

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Annotated, Literal, Self, TypeAlias

from spafl.canonical import canonical_json, sha256_hex
from spafl.errors import BundleError
from spafl.layout import MAX_AXIS, MAX_NAME, ThresholdLayout
from spafl.record import Limits, Record, RecordError
from spafl.step import ROWS

FORMAT = "spafl-bundle"
FORMAT_VERSION = 2
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 30
MAX_BUNDLE_BYTES = 2 << 30
MAX_FILES = 64
MAX_IDS = 1 << 24
"""Token ids travel as float32, which holds every whole number up to here."""

Role: TypeAlias = Literal["weight", "threshold", "parameter", "statistic"]

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?")


def safe_file_name(name: str) -> str:
    """Returns `name` if it may stand in a bundle: ASCII letters, digits, '.', '_', '-' and at most one folder.

    Raises:
        ValueError: anything else; absolute paths, '..' and drive letters among it.
    """
    if not _FILE_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{name[:120]!r} is not a safe file name")
    return name


@dataclass(frozen=True, kw_only=True, slots=True)
class StateTensor(Record):
    """A tensor of the state a device keeps.

    role    weight and threshold belong to a masked layer; parameter is trained; statistic is updated, not trained
    layer   the masked layer whose filters its first axis runs over (weights, thresholds, the norm behind them); with
            rows, the first of all layers that share these rows
    rows    True where the train step takes and returns only some rows of it: those in active.<layer>
    """

    name: Annotated[str, Limits(min_length=1, max_length=2 * MAX_NAME)]
    shape: Annotated[tuple[Annotated[int, Limits(ge=1, le=MAX_AXIS)], ...], Limits(max_length=8)]
    role: Role
    layer: str | None = None
    rows: bool = False

    @property
    def trained(self) -> bool:
        """Returns whether SGD moves it: it then has a momentum of the same shape during a round."""
        return self.role != "statistic"

    @property
    def step_name(self) -> str:
        """Returns what the train step calls it: rows.<name> where it takes active rows only."""
        return f"{ROWS}{self.name}" if self.rows else self.name


@dataclass(frozen=True, kw_only=True, slots=True)
class TrainStep(Record):
    """The form of `train_step.onnx`: `rows` takes active rows only and is exact; `dense` takes whole tensors.

    reason says why rows was refused, or what makes it exact.
    """

    form: Literal["rows", "dense"]
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class Compaction(Record):
    """A layer with weights, what it costs, and what compaction does with its pruned filters.

    out, n_in   filters and weights per filter
    positions   outputs per filter and example: H * W of a convolution's output, 1 of a linear layer on (N, features)
    reads       layers of whose channels it reads only those that stay, and how many of a filter's weights each feeds
    groups      of a convolution: a filter reads the channels of its own group alone
    drops       whether filters are dropped; `reason` says why, or why not
    live        which stay if so: those of which, for any of these sets, the filters of all its layers are active
    blocks      stretches of the filters that keep equally many: heads of attention, groups of a convolution
    width_at    byte of `infer.onnx` where five hold the number of filters that stay; None: it stands nowhere
    """

    layer: str
    out: Annotated[int, Limits(ge=1)]
    n_in: Annotated[int, Limits(ge=1)]
    positions: Annotated[int, Limits(ge=1)]
    reads: dict[str, int] = field(default_factory=dict)
    groups: Annotated[int, Limits(ge=1)] = 1
    drops: bool
    live: tuple[tuple[str, ...], ...] = ()
    blocks: Annotated[int, Limits(ge=1)] = 1
    width_at: Annotated[int, Limits(ge=0)] | None = None
    reason: str


@dataclass(frozen=True, kw_only=True, slots=True)
class InputSpec(Record):
    """The examples a model takes, float32 (batch, *shape); bytes become (value / 255 - mean) / std by channel."""

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ids: Annotated[int, Limits(ge=1, le=MAX_IDS)] | None = None

    def check(self) -> None:
        """Returns nothing if there is a mean and a deviation per channel."""
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"input shape {self.shape} needs positive sizes")
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0] or min(self.std) <= 0:
            raise ValueError(
                f"expected {self.shape[0]} means and positive deviations, got {self.mean} and {self.std}"
            )


@dataclass(frozen=True, kw_only=True, slots=True)
class EngineFiles(Record):
    """The files an engine runs, by role, and what they need of it.

    requires   format or package -> version: {"opset": "18", "ir_version": "8"}, {"executorch": "1.5.1"}
    operators  by role, operators with their counts
    """

    files: dict[str, str]
    requires: dict[str, str]
    operators: dict[str, dict[str, int]]

    def check(self) -> None:
        """Returns nothing if the names of the files are safe."""
        for name in self.files.values():
            safe_file_name(name)


@dataclass(frozen=True, kw_only=True, slots=True)
class FileEntry(Record):
    """Size and SHA-256 of one file of the bundle."""

    bytes: Annotated[int, Limits(ge=0, le=MAX_FILE_BYTES)]
    sha256: Annotated[str, Limits(pattern=r"^[0-9a-f]{64}$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Manifest(Record):
    """Everything about a bundle but its bytes. Its id is the SHA-256 of its canonical JSON."""

    format: Literal["spafl-bundle"] = "spafl-bundle"
    format_version: Literal[2] = 2
    name: Annotated[str, Limits(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
    layout: ThresholdLayout
    state: tuple[StateTensor, ...]
    input: InputSpec
    labels: Annotated[tuple[str, ...], Limits(min_length=2, max_length=100_000)]
    options: dict[str, str | bool | float] = field(default_factory=dict)
    train_step: TrainStep
    compaction: tuple[Compaction, ...]
    engines: dict[str, EngineFiles]
    files: Annotated[dict[str, FileEntry], Limits(max_length=MAX_FILES)]
    producer: dict[str, str]

    def check(self) -> None:
        """Returns nothing if state, layout, engines and files fit together, and it has an id."""
        for name in self.files:
            safe_file_name(name)
        shapes = {tensor.name: tensor.shape for tensor in self.state}
        if len(shapes) != len(self.state):
            raise ValueError("state tensor names repeat")
        for layer in self.layout.layers:
            weight = shapes.get(layer.weight, ())
            if shapes.get(layer.threshold) != (layer.out,) or weight[:1] != (layer.out,):
                raise ValueError(
                    f"the state lacks the weight or threshold of layer {layer.name!r}, or their shapes differ"
                )
            if math.prod(weight[1:]) != layer.n_in:
                raise ValueError(f"{layer.weight} {weight} has not {layer.n_in} weights per filter")
        named = {file for engine in self.engines.values() for file in engine.files.values()}
        if missing := named - set(self.files):
            raise ValueError(f"engine files are not in the bundle: {sorted(missing)}")
        if folders := {name.partition("/")[0] for name in self.files if "/" in name} & set(self.files):
            raise ValueError(f"both files and folders: {sorted(folders)}")
        if sum(entry.bytes for entry in self.files.values()) > MAX_BUNDLE_BYTES:
            raise ValueError(f"more than {MAX_BUNDLE_BYTES} bytes of files")
        self.to_bytes()  # a number that has no canonical spelling has no id

    @property
    def id(self) -> str:
        """Returns the bundle's id: 64 hex digits, SHA-256 of the canonical manifest, and so of every file in it."""
        return sha256_hex(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON: the exact bytes of `manifest.json`."""
        return canonical_json(self.to_json())

    @classmethod
    def from_bytes(cls, data: bytes) -> Self:
        """Returns the manifest in `data`.

        Raises:
            BundleError: too large, not a manifest, of another format version, contradicting itself, or not written
                canonically: its id would not be the hash of `data`.
        """
        if len(data) > MAX_MANIFEST_BYTES:
            raise BundleError(f"manifest of {len(data)} bytes, expected at most {MAX_MANIFEST_BYTES}")
        try:
            manifest = cls.from_text(data)
        except RecordError as error:
            raise BundleError(
                f"not a bundle this version reads ({FORMAT} {FORMAT_VERSION}): {error}"
            ) from error
        if manifest.to_bytes() != data:
            raise BundleError("the manifest is not canonical JSON, so its hash is not the bundle's id")
        return manifest

    def holding(self, files: Mapping[str, bytes]) -> Self:
        """Returns this manifest with `files` as its files, sized and hashed.

        Raises:
            BundleError: unsafe names, too many or too large files, or an engine's file is not among them.
        """
        try:
            entries = {
                name: FileEntry(bytes=len(data), sha256=sha256_hex(data))
                for name, data in sorted(files.items())
            }
            return replace(self, files=entries)
        except RecordError as error:
            raise BundleError(f"these files make no bundle: {error}") from error
