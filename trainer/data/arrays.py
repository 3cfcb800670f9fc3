"""Datasets as .npz files: what `spafl data split` writes for each device, and anyone's own arrays."""

import zipfile
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from trainer.data.dataset import MAX_BYTES, Dataset, Split, split_off_test
from trainer.errors import DataError

_NAMES = {
    "x": ("x", "x_train"),
    "y": ("y", "y_train"),
    "x_test": ("x_val", "x_test"),
    "y_test": ("y_val", "y_test"),
    "labels": ("labels",),
}
"""Array -> the names it goes by: a device holds out `x_val`; Keras' mnist.npz has `x_train` and `x_test`."""

MAX_WHOLE = 1 << 24
"""Beyond it float32, which models take, does not hold every whole number."""


def load_arrays(path: Path, *, seed: int = 0) -> Split:
    """Returns the dataset in an .npz of arrays `x` and `y` (n,); nothing is unpickled.

    `x` is (n, channels, height, width), (n, height, width) or (n, features): bytes, which are scaled, or floats,
    which are taken as they are, as are other whole numbers of (n, features), such as token ids.
    `x_val` and `y_val` (or `x_test` and `y_test`) are the test examples, else a fifth is split off.
    `labels` (labels,) are the labels' names, else they are numbers.

    Raises:
        DataError: not such a file, larger than `MAX_BYTES`, arrays missing, or of dtypes and shapes that do not fit.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            size = sum(member.file_size for member in archive.infolist())
        if size > MAX_BYTES:
            raise DataError(f"{path} unpacks to {size} bytes, expected at most {MAX_BYTES}")
        with np.load(path, allow_pickle=False) as file:
            arrays = {array: file[name] for array, names in _NAMES.items() for name in names if name in file}
    except (OSError, ValueError, EOFError, zipfile.BadZipFile, zlib.error) as error:
        raise DataError(f"cannot read {path} as .npz of plain arrays: {error}") from error
    if missing := {"x", "y"} - set(arrays):
        raise DataError(
            f"{path} lacks the arrays {sorted(missing)}: expected x and y, or x_train and y_train"
        )
    if ("x_test" in arrays) != ("y_test" in arrays):
        raise DataError(f"{path} has test examples without labels, or labels alone")
    labels = _labels(arrays)
    train = Dataset(_examples(arrays["x"]), _indices(arrays["y"]), labels)
    if "x_test" not in arrays:
        return split_off_test(train, seed=seed)
    return Split(train, Dataset(_examples(arrays["x_test"]), _indices(arrays["y_test"]), labels))


def save_arrays(path: Path, train: Dataset, test: Dataset | None = None) -> None:
    """Returns nothing; writes `train` as x and y, `test` as x_val and y_val, and the label names: a device's data."""
    arrays: dict[str, NDArray[Any]] = {"x": train.x, "y": train.y, "labels": np.array(train.labels)}
    if test is not None:
        arrays |= {"x_val": test.x, "y_val": test.y}
    # not compressed: images hardly shrink, and a device reads the file at every start
    np.savez(path, allow_pickle=False, **arrays)


def _examples(x: NDArray[Any]) -> NDArray[Any]:
    if x.ndim == 3:
        x = x[:, None]
    if x.ndim == 4 and x.shape[3] in (1, 3) and x.shape[1] not in (1, 3):
        raise DataError(f"images of shape {x.shape[1:]} have their channels last: transpose to (0, 3, 1, 2)")
    if x.dtype.kind in "iu" and x.dtype != np.uint8:
        if x.ndim != 2:
            raise DataError(
                f"whole numbers of {x.dtype} and shape {x.shape}: give pixels as uint8, samples of sensors as floats"
            )
        if x.size and max(-int(x.min()), int(x.max())) > MAX_WHOLE:
            raise DataError(f"whole numbers of {x.min()} to {x.max()}: models take at most {MAX_WHOLE}")
        return x.astype(np.float32)
    return x.astype(np.float32) if x.dtype.kind == "f" else x


def _indices(y: NDArray[Any]) -> NDArray[np.int64]:
    if y.dtype.kind not in "iu" or (y.ndim == 2 and y.shape[1] != 1):
        raise DataError(f"expected y (n,) of integers, got {y.shape} {y.dtype}")
    return y.reshape(len(y)).astype(np.int64)


def _labels(arrays: dict[str, NDArray[Any]]) -> tuple[str, ...]:
    if "labels" in arrays:
        return tuple(map(str, arrays["labels"].ravel()))
    return tuple(map(str, range(max(2, 1 + int(_indices(arrays["y"]).max(initial=0))))))
