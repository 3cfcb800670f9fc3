"""Compact programs as they travel: a device's mask one way, a program whose weights are holes the other.

    mask      8 bytes: the layout's id | one bit per filter in layout order, 1 = active, each byte's highest bit first,
              the last byte filled up with 0
    program   u64 little-endian length of the header | header, JSON (`ProgramHeader`) | fold program | hollow model

Both programs are ExecuTorch .pte files. The fold program takes the device's state tensors and returns the weights the
holes want, one flat float32 array each: pruned filters left out, norms worked in. The model's file lacks exactly these
bytes; put where the header says, they make it whole. So the device computes nothing by itself, and what it holds stays
with it.
"""

import struct
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Annotated

import numpy as np
from numpy.typing import NDArray

from spafl.algorithm import Mask
from spafl.canonical import canonical_json, sha256_hex
from spafl.errors import WireError
from spafl.layout import MAX_NAME, Floats, ThresholdLayout
from spafl.protocol import BundleId
from spafl.record import Limits, Record, RecordError

MASK_MEDIA_TYPE = "application/vnd.spafl.mask"
PROGRAM_MEDIA_TYPE = "application/vnd.spafl.program"
TOKEN_VARIABLE = "SPAFL_PROGRAM_TOKEN"
"""Holds the token of a program service, on its side and on the devices'."""
MAX_HEADER_BYTES = 1 << 20
MAX_BODY_BYTES = 32 << 20
"""Of a program without its weights, LeNet-5's has 18 kB: it grows with the number of layers, not with their size."""
MAX_MODEL_BYTES = 1 << 30


def mask_bytes(layout: ThresholdLayout) -> int:
    """Returns the length of a mask of `layout`; no other is valid."""
    return 8 + (layout.size + 7) // 8


def encode_mask(layout: ThresholdLayout, mask: Mask) -> bytes:
    """Returns the body that says `mask`: nothing but the layout's id and one bit per filter."""
    bits = np.concatenate([mask[layer.name] for layer in layout.layers])
    return bytes.fromhex(layout.id) + np.packbits(bits).tobytes()


def decode_mask(layout: ThresholdLayout, body: bytes) -> dict[str, NDArray[np.bool_]]:
    """Returns the mask in `body`.

    Raises:
        WireError: another length, another layout, or bits beyond the last filter.
    """
    if len(body) != mask_bytes(layout):
        raise WireError(
            f"mask of {len(body)} bytes, expected {mask_bytes(layout)} for {layout.size} filters: 8 of the layout's "
            "id, and one bit each"
        )
    if body[:8].hex() != layout.id:
        raise WireError(f"the mask is of layout {body[:8].hex()}, expected {layout.id}: another model's")
    bits = np.unpackbits(np.frombuffer(body, np.uint8, offset=8)).astype(np.bool_)
    if bits[layout.size :].any():
        raise WireError(f"the mask has active filters beyond the layout's {layout.size}")
    return {layer.name: bits[layer.span].copy() for layer in layout.layers}


@dataclass(frozen=True, kw_only=True, slots=True)
class ProgramHeader(Record):
    """What a program is of, and how to make it whole.

    mask         SHA-256 of the mask's body
    executorch   the release that made both programs, and runs them
    inputs       state tensors the fold program takes, in this order, thresholds as `decided` makes them
    holes        (offset, bytes) in the model's whole file; the fold program's outputs fill them in this order
    fold, model  bytes of the two programs that follow the header
    """

    bundle: BundleId
    layout: Annotated[str, Limits(pattern=r"^[0-9a-f]{16}$")]
    mask: Annotated[str, Limits(pattern=r"^[0-9a-f]{64}$")]
    executorch: Annotated[str, Limits(max_length=64)]
    inputs: Annotated[
        tuple[Annotated[str, Limits(max_length=2 * MAX_NAME)], ...], Limits(min_length=1, max_length=65_536)
    ]
    holes: Annotated[
        tuple[
            tuple[
                Annotated[int, Limits(ge=0, le=MAX_MODEL_BYTES)],
                Annotated[int, Limits(ge=4, le=MAX_MODEL_BYTES, multiple_of=4)],
            ],
            ...,
        ],
        Limits(min_length=1, max_length=65_536),
    ]
    fold: Annotated[int, Limits(ge=1, le=MAX_BODY_BYTES)]
    model: Annotated[int, Limits(ge=1, le=MAX_BODY_BYTES)]

    @property
    def whole(self) -> int:
        """Returns the bytes of the model's file once it is filled."""
        return self.model + sum(size for _, size in self.holes)

    def check(self) -> None:
        """Returns nothing if the holes lie in the model, one after the other."""
        if any(start + size > after for (start, size), (after, _) in pairwise(self.holes)):
            raise ValueError("holes overlap, or are not in order")
        if sum(self.holes[-1]) > self.whole or self.whole > MAX_MODEL_BYTES:
            raise ValueError(
                f"holes reach beyond the model's {self.whole} bytes, or those beyond what is sane"
            )


@dataclass(frozen=True, slots=True)
class HollowProgram:
    """A compact program without its weights; `model` is the file's bytes with the holes cut out."""

    header: ProgramHeader
    fold: bytes
    model: bytes

    def filled(self, weights: Sequence[Floats]) -> bytes:
        """Returns the whole .pte file, `weights` (the fold program's outputs) in its holes.

        Raises:
            WireError: they are not what fits the holes.
        """
        got = [weight.nbytes for weight in weights]
        wanted = [size for _, size in self.header.holes]
        if got != wanted or any(weight.dtype != np.float32 for weight in weights):
            raise WireError(
                f"the fold program returned {len(got)} arrays of {got[:8]} bytes, the holes want {wanted[:8]}"
            )
        whole, read = bytearray(), 0
        for (offset, _), weight in zip(self.header.holes, weights, strict=True):
            until = read + offset - len(whole)
            whole += self.model[read:until]
            whole += weight.astype("<f4", copy=False).tobytes()
            read = until
        return bytes(whole + self.model[read:])


def hollow(
    model: bytes, holes: Sequence[tuple[int, int]], fold: bytes, **header: str | tuple[str, ...]
) -> HollowProgram:
    """Returns the program of a whole `model` file with `holes` (offset, bytes), ascending, cut out of it."""
    kept, end = [], 0
    for offset, size in holes:
        kept.append(model[end:offset])
        end = offset + size
    cut = b"".join([*kept, model[end:]])
    described = ProgramHeader.from_json({**header, "holes": holes, "fold": len(fold), "model": len(cut)})
    return HollowProgram(described, fold, cut)


def encode_program(program: HollowProgram) -> bytes:
    """Returns the body for `program`; equal programs give equal bytes."""
    text = canonical_json(program.header.to_json())
    return struct.pack("<Q", len(text)) + text + program.fold + program.model


def decode_program(body: bytes) -> HollowProgram:
    """Returns the program in `body`.

    Raises:
        WireError: too long, truncated, or a header that does not describe what follows it.
    """
    if len(body) > MAX_BODY_BYTES:
        raise WireError(f"program of {len(body)} bytes, expected at most {MAX_BODY_BYTES}")
    if len(body) < 8:
        raise WireError(f"truncated: {len(body)} bytes hold no program")
    (length,) = struct.unpack_from("<Q", body)
    if length > min(MAX_HEADER_BYTES, len(body) - 8):
        raise WireError(f"header of {length} bytes, expected at most {min(MAX_HEADER_BYTES, len(body) - 8)}")
    start = 8 + length
    try:
        header = ProgramHeader.from_text(body[8:start])
    except RecordError as error:
        raise WireError(f"not the header of a program: {error}") from None
    if len(body) - start != header.fold + header.model:
        raise WireError(
            f"expected {header.fold} and {header.model} bytes of programs, got {len(body) - start}"
        )
    return HollowProgram(header, body[start : start + header.fold], body[start + header.fold :])


def mask_digest(body: bytes) -> str:
    """Returns what a program's header calls its mask: the SHA-256 of the mask's body."""
    return sha256_hex(body)
