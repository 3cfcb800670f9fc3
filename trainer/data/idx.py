"""IDX files, the form of MNIST, Fashion-MNIST and their kin, plain or gzipped.

    0x00 0x00 | type byte (0x08: unsigned byte) | number of dimensions | each size as u32 big-endian | values

Source: Y. LeCun, "The MNIST database", file formats; names as in the published downloads.
"""

import gzip
import struct
import zlib
from math import prod
from pathlib import Path
from typing import IO, cast

import numpy as np

from trainer.data.dataset import MAX_BYTES, Bytes, Dataset, Split
from trainer.errors import DataError

UNSIGNED_BYTE = 0x08


def is_idx_folder(folder: Path) -> bool:
    """Returns whether `folder` holds the training images of an IDX dataset."""
    return bool(_matches(folder, "train", "images", 3))


def load_idx_folder(folder: Path) -> Split:
    """Returns the dataset of `train-*` and `t10k-*` (or `test-*`) files in `folder`, images as (n, 1, rows, columns).

    Raises:
        DataError: one of the four files is missing, damaged, too large, or they disagree.
    """
    arrays = {
        (part, kind): read_idx(_only_match(folder, part, kind, dimensions), dimensions)
        for part in ("train", "t10k")
        for kind, dimensions in (("images", 3), ("labels", 1))
    }
    labels = tuple(map(str, range(max(2, 1 + int(arrays["train", "labels"].max(initial=0))))))
    train, test = (
        Dataset(arrays[part, "images"][:, None], arrays[part, "labels"].astype(np.int64), labels)
        for part in ("train", "t10k")
    )
    return Split(train, test)


def read_idx(path: Path, dimensions: int) -> Bytes:
    """Returns the array in an IDX file of unsigned bytes with that many dimensions.

    Raises:
        DataError: another type or number of dimensions, more than `MAX_BYTES`, or bytes missing or left over.
    """
    try:
        with _opened(path) as stream:
            magic = stream.read(4)
            if magic != bytes((0, 0, UNSIGNED_BYTE, dimensions)):
                expected = f"0000{UNSIGNED_BYTE:02x}{dimensions:02x}"
                raise DataError(f"{path} starts with {magic.hex() or 'nothing'}, expected IDX {expected}")
            header = stream.read(4 * dimensions)
            if len(header) != 4 * dimensions:
                raise DataError(f"{path} ends in its header, after {4 + len(header)} bytes")
            shape = struct.unpack(f">{dimensions}I", header)
            size = prod(shape)
            if size > MAX_BYTES:
                raise DataError(f"{path} claims {size} bytes, expected at most {MAX_BYTES}")
            values = stream.read(size + 1)
    except (OSError, EOFError, zlib.error) as error:
        raise DataError(f"cannot read {path}: {error}") from error
    if len(values) != size:
        more = "more" if len(values) > size else f"only {len(values)}"
        raise DataError(f"{path} claims {size} values {shape} and holds {more}")
    return np.frombuffer(values, np.uint8).reshape(shape)


def _opened(path: Path) -> IO[bytes]:
    return cast(IO[bytes], gzip.open(path)) if path.suffix == ".gz" else path.open("rb")


def _matches(folder: Path, part: str, kind: str, dimensions: int) -> list[Path]:
    # both spellings are about: train-images-idx3-ubyte and train-images.idx3-ubyte
    names = [f"{part}-{kind}{joint}idx{dimensions}-ubyte{end}" for joint in "-." for end in ("", ".gz")]
    return [path for name in names if (path := folder / name).is_file()]


def _only_match(folder: Path, part: str, kind: str, dimensions: int) -> Path:
    found = _matches(folder, part, kind, dimensions)
    if not found and part == "t10k":
        found = _matches(folder, "test", kind, dimensions)
    if not found:
        raise DataError(f"{folder} lacks {part}-{kind}-idx{dimensions}-ubyte (or the same with .gz)")
    return found[0]
