"""What a bundle says about itself: `manifest.json`."""

import math
import re
from collections.abc import Mapping
from typing import Annotated, Any, Literal, Self

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    PlainSerializer,
    PlainValidator,
    SerializerFunctionWrapHandler,
    ValidationError,
    model_serializer,
    model_validator,
)

from spafl.canonical import canonical_json, sha256_hex
from spafl.errors import BundleError, LayoutError
from spafl.layout import MAX_AXIS, MAX_NAME, ThresholdLayout
from spafl.step import ROWS

FORMAT = "spafl-bundle"
FORMAT_VERSION = 1
MAX_MANIFEST_BYTES = 4 << 20
MAX_FILE_BYTES = 1 << 30
MAX_BUNDLE_BYTES = 2 << 30
MAX_FILES = 64
MAX_IDS = 1 << 24
"""Token ids travel as float32, which holds every whole number up to here."""

_FILE_NAME = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{0,99}(/[A-Za-z0-9][A-Za-z0-9._-]{0,99})?")


def safe_file_name(name: str) -> str:
    """Returns `name` if it may stand in a bundle: ASCII letters, digits, '.', '_', '-' and at most one folder.

    Raises:
        ValueError: anything else; absolute paths, '..' and drive letters among it.
    """
    if not _FILE_NAME.fullmatch(name) or ".." in name:
        raise ValueError(f"{name[:120]!r} is not a safe file name")
    return name


def _layout(value: Any) -> ThresholdLayout:
    if isinstance(value, ThresholdLayout):
        return value
    try:
        return ThresholdLayout.from_json(value)
    except LayoutError as error:
        raise ValueError(str(error)) from error


Layout = Annotated[ThresholdLayout, PlainValidator(_layout), PlainSerializer(ThresholdLayout.to_json)]


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False)


class StateTensor(_Frozen):
    """A tensor of the state a device keeps.

    role    weight and threshold belong to a masked layer; parameter is trained; statistic is updated, not trained
    layer   the masked layer whose filters its first axis runs over (weights, thresholds, the norm behind them)
    rows    True where the train step takes and returns only the active rows of it
    """

    name: str = Field(min_length=1, max_length=2 * MAX_NAME)
    shape: tuple[Annotated[int, Field(ge=1, le=MAX_AXIS)], ...] = Field(max_length=8)
    role: Literal["weight", "threshold", "parameter", "statistic"]
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


class TrainStep(_Frozen):
    """The form of `train_step.onnx`: `rows` takes active rows only and is exact; `dense` takes whole tensors.

    reason says why rows was refused, or what makes it exact.
    """

    form: Literal["rows", "dense"]
    reason: str


class Compaction(_Frozen):
    """A layer with weights, what it costs, and what compaction does with its pruned filters.

    out, n_in   filters and weights per filter
    positions   outputs per filter and example: H * W of a convolution's output, 1 of a linear layer on (N, features)
    reads       the layer whose channels it reads and whose dropped ones it leaves out; None: it reads all there are
    drops       whether its pruned filters are dropped; `reason` says why, or why not
    """

    layer: str
    out: int = Field(ge=1)
    n_in: int = Field(ge=1)
    positions: int = Field(ge=1)
    reads: str | None
    drops: bool
    reason: str


class InputSpec(_Frozen):
    """The examples a model takes, float32 (batch, *shape); bytes become (value / 255 - mean) / std by channel.

    ids   examples are token ids 0 .. ids - 1 and enter as they are, of whatever dtype; None, and then not written
          down: they are numbers
    """

    shape: tuple[int, ...]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    ids: int | None = Field(default=None, ge=1, le=MAX_IDS)

    @model_serializer(mode="wrap")
    def _without_absent_ids(self, written: SerializerFunctionWrapHandler) -> dict[str, Any]:
        fields: dict[str, Any] = written(self)
        if self.ids is None:
            del fields["ids"]  # manifests written before there were ids keep their spelling, and so their id
        return fields

    @model_validator(mode="after")
    def _one_per_channel(self) -> Self:
        if not self.shape or min(self.shape) < 1:
            raise ValueError(f"input shape {self.shape} needs positive sizes")
        if len(self.mean) != self.shape[0] or len(self.std) != self.shape[0] or min(self.std) <= 0:
            raise ValueError(
                f"expected {self.shape[0]} means and positive deviations, got {self.mean} and {self.std}"
            )
        return self


class EngineFiles(_Frozen):
    """The files an engine runs, by role, and what they need of it.

    requires   format or package -> version: {"opset": "18", "ir_version": "8"}, {"executorch": "1.5.1"}
    operators  by role, operators with their counts
    """

    files: dict[str, Annotated[str, AfterValidator(safe_file_name)]]
    requires: dict[str, str]
    operators: dict[str, dict[str, int]]


class FileEntry(_Frozen):
    """Size and SHA-256 of one file of the bundle."""

    bytes: int = Field(ge=0, le=MAX_FILE_BYTES)
    sha256: str = Field(pattern=r"^[0-9a-f]{64}$")


class Manifest(_Frozen):
    """Everything about a bundle but its bytes. Its id is the SHA-256 of its canonical JSON."""

    format: Literal["spafl-bundle"] = "spafl-bundle"
    format_version: Literal[1] = 1
    name: str = Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")
    layout: Layout
    state: tuple[StateTensor, ...]
    input: InputSpec
    labels: tuple[str, ...] = Field(min_length=2, max_length=100_000)
    options: dict[str, str | bool | float] = {}
    train_step: TrainStep
    compaction: tuple[Compaction, ...]
    engines: dict[str, EngineFiles]
    files: dict[Annotated[str, AfterValidator(safe_file_name)], FileEntry] = Field(max_length=MAX_FILES)
    producer: dict[str, str]

    @model_validator(mode="after")
    def _consistent(self) -> Self:
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
        canonical_json(self.model_dump(mode="json"))  # a number that has no canonical spelling has no id
        return self

    @property
    def id(self) -> str:
        """Returns the bundle's id: 64 hex digits, SHA-256 of the canonical manifest, and so of every file in it."""
        return sha256_hex(self.to_bytes())

    def to_bytes(self) -> bytes:
        """Returns the canonical JSON: the exact bytes of `manifest.json`."""
        return canonical_json(self.model_dump(mode="json"))

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
            manifest = cls.model_validate_json(data)
        except ValidationError as error:
            raise BundleError(
                f"not a bundle this version reads ({FORMAT} {FORMAT_VERSION}): {_first(error)}"
            ) from error
        if manifest.to_bytes() != data:
            raise BundleError("the manifest is not canonical JSON, so its hash is not the bundle's id")
        return manifest

    def holding(self, files: Mapping[str, bytes]) -> Self:
        """Returns this manifest with `files` as its files, sized and hashed.

        Raises:
            BundleError: unsafe names, too many or too large files, or an engine's file is not among them.
        """
        entries = {
            name: {"bytes": len(data), "sha256": sha256_hex(data)} for name, data in sorted(files.items())
        }
        try:
            return self.model_validate({**self.model_dump(), "files": entries})
        except ValidationError as error:
            raise BundleError(f"these files make no bundle: {_first(error)}") from error


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"]) or "manifest.json"
    return f"{where}: {first['msg']}"
