"""Thresholds as bytes: a safetensors file with one flat tensor (PROTOCOL.md is the normative text).

    u64 little-endian header length | JSON header | raw little-endian values

The header's only tensor is `thresholds`, F32 or F16, shape [size]; its metadata holds `layout` (the layout id) and
`version` (decimal). Format: https://github.com/huggingface/safetensors#format
"""

import json
import struct
from dataclasses import dataclass
from typing import Any, Literal, TypeAlias

import numpy as np

from spafl.errors import WireError
from spafl.layout import Floats, ThresholdLayout

MEDIA_TYPE = "application/vnd.safetensors"
TENSOR = "thresholds"
MAX_HEADER_BYTES = 512
MAX_VERSION = 2**53 - 1
"""The largest integer every JSON reader keeps exact (RFC 8259, section 6)."""

Precision: TypeAlias = Literal["f32", "f16"]


@dataclass(frozen=True, slots=True)
class Thresholds:
    """Global or local thresholds: `values` (size,) float32, and the global version they are (or were trained from)."""

    values: Floats
    version: int


def max_body_bytes(layout: ThresholdLayout) -> int:
    """Returns the most bytes a valid body for `layout` has: refuse longer ones before reading them."""
    return 8 + MAX_HEADER_BYTES + 4 * layout.size


def encode_thresholds(layout: ThresholdLayout, thresholds: Thresholds, precision: Precision = "f32") -> bytes:
    """Returns the body for `thresholds`, about 140 bytes more than the raw values; equal inputs give equal bytes.

    Raises:
        WireError: the values are not (size,), not finite, or too large for f16, or the version is out of range.
    """
    values = np.asarray(thresholds.values)
    if not 0 <= thresholds.version <= MAX_VERSION:
        raise WireError(f"expected a version of 0 to {MAX_VERSION}, got {thresholds.version}")
    if values.shape != (layout.size,):
        raise WireError(f"layout {layout.id} has {layout.size} thresholds, got shape {values.shape}")
    with np.errstate(over="ignore"):
        values = values.astype("<f4" if precision == "f32" else "<f2")
    if not np.isfinite(values).all():
        raise WireError(
            f"{int((~np.isfinite(values)).sum())} thresholds are not finite in {precision}: not sent"
        )
    # written here, not by safetensors: it orders metadata at random, and an update sent twice must be the same bytes
    header = {
        "__metadata__": {"layout": layout.id, "version": str(thresholds.version)},
        TENSOR: {"dtype": precision.upper(), "shape": [layout.size], "data_offsets": [0, values.nbytes]},
    }
    text = json.dumps(header, separators=(",", ":"))
    # values start at a multiple of 4 so that they can be read in place; of 8, as safetensors itself writes, would
    # take LeNet-5's f16 body beyond 1.3 kB from version 100 on
    text += " " * (-len(text) % 4)
    return struct.pack("<Q", len(text)) + text.encode() + values.tobytes()


def decode_thresholds(layout: ThresholdLayout, body: bytes) -> Thresholds:
    """Returns the thresholds in `body`, as float32.

    Raises:
        WireError: the body is too long or short, not safetensors, holds another tensor, dtype, shape or layout, has
            no valid version, or a value is NaN or infinite. Checked in this order; nothing is used before all pass.
    """
    if len(body) > max_body_bytes(layout):
        raise WireError(
            f"body of {len(body)} bytes, expected at most {max_body_bytes(layout)} for this layout"
        )
    header, start = _header(body)
    metadata = header.pop("__metadata__", None)
    if list(header) != [TENSOR]:
        raise WireError(f"expected exactly one tensor {TENSOR!r}, got {sorted(header)[:5]}")
    tensor = header[TENSOR]
    dtype = tensor.get("dtype") if isinstance(tensor, dict) else None
    if dtype not in ("F32", "F16"):
        raise WireError(f"expected dtype F32 or F16, got {dtype!r}")
    nbytes = layout.size * (4 if dtype == "F32" else 2)
    # compared as text: in Python [1] == [1.0] == [True], to other readers of safetensors these differ
    shape, offsets = repr(tensor.get("shape")), repr(tensor.get("data_offsets"))
    if shape != f"[{layout.size}]" or offsets != f"[0, {nbytes}]":
        raise WireError(f"expected shape [{layout.size}] at [0, {nbytes}], got {shape} at {offsets}")
    if len(body) - start != nbytes:
        raise WireError(f"expected {nbytes} bytes of values, got {len(body) - start}")
    if not isinstance(metadata, dict) or metadata.get("layout") != layout.id:
        got = metadata.get("layout") if isinstance(metadata, dict) else None
        raise WireError(
            f"thresholds are for layout {got!r}, this run has {layout.id!r}: fetch the run's bundle again"
        )
    version = _version(metadata.get("version"))
    values = np.frombuffer(body, "<f4" if dtype == "F32" else "<f2", layout.size, start).astype(np.float32)
    if not np.isfinite(values).all():
        raise WireError(
            f"{int((~np.isfinite(values)).sum())} of {layout.size} thresholds are NaN or infinite"
        )
    return Thresholds(values, version)


def _header(body: bytes) -> tuple[dict[str, Any], int]:
    if len(body) < 8:
        raise WireError(f"truncated: {len(body)} bytes hold no safetensors header")
    (length,) = struct.unpack_from("<Q", body)
    if length > MAX_HEADER_BYTES or 8 + length > len(body):
        raise WireError(f"header of {length} bytes, expected at most {min(MAX_HEADER_BYTES, len(body) - 8)}")
    if body[8:9] != b"{":
        raise WireError("the header is not a JSON object")
    try:
        header = json.loads(body[8 : 8 + length].decode(), object_pairs_hook=_unique)
    except (ValueError, RecursionError) as error:
        raise WireError(f"the header is not JSON: {error}") from None
    return header, 8 + length


def _unique(pairs: list[tuple[str, object]]) -> dict[str, object]:
    if len({key for key, _ in pairs}) != len(pairs):
        raise ValueError("a key is written twice")
    return dict(pairs)


def _version(text: object) -> int:
    if (
        not isinstance(text, str)
        or not (text.isascii() and text.isdigit())
        or len(text) > 16
        or int(text) > MAX_VERSION
    ):
        raise WireError(f"expected a version of 0 to {MAX_VERSION} in decimal, got {str(text)[:24]!r}")
    return int(str(text))
