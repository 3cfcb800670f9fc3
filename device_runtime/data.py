"""Where a device's examples come from. Nothing here unpickles, and nothing needs torch.

    digits.npz         arrays x (n, ...) and y (n,), maybe x_val and y_val
    photos/            a folder per class, its name the label; maybe under train/ and val/ (or validation/, test/)
    photos.zip         the same, packed
    table.csv          a header, a column `label`, and one number per input in every other column
    module:function    called without arguments: (x, y) or (x, y, x_val, y_val)

Bytes (and whole numbers of images) are scaled as the bundle says; floats, and other whole numbers, are taken as the
model's input as they are. A model of token ids takes whole numbers of any type.
Labels are the bundle's label names, or their indices.
"""

import csv
import importlib
import math
import re
import sys
import zipfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import DataError
from device_runtime.examples import Examples, LocalData, split
from device_runtime.images import SUFFIXES, fit_images, images_in, read_image
from spafl.manifest import InputSpec, Manifest

MAX_FLOAT_IMAGE = 30.0
"""Float images beyond this are raw pixels somebody forgot to scale: training on them ends in NaN within two rounds."""

MAX_WHOLE = 1 << 24
"""Beyond it float32, which models take, does not hold every whole number."""

_HELD_OUT = frozenset({"val", "validation", "test"})
_CALLABLE = re.compile(r"[A-Za-z_][\w.]*:[A-Za-z_]\w*")

Parts: TypeAlias = tuple[Examples, Examples | None]


def load_data(source: str, manifest: Manifest, *, validation: float = 0.2, seed: int = 0) -> LocalData:
    """Returns the examples of `source` for the model of `manifest`.

    validation   share held out where the source does not say which
    seed         of that choice

    Raises:
        DataError: it cannot be read, holds no examples, or they do not fit the model.
    """
    path = Path(source)
    # an empty text, of a variable that is not set perhaps, would be the current directory
    if (source and path.is_dir()) or path.suffix == ".zip":
        train, held_out = _class_folders(path, manifest)
    elif path.suffix == ".npz":
        train, held_out = _npz(path, manifest)
    elif path.suffix == ".csv":
        train, held_out = _csv(path, manifest), None
    elif _CALLABLE.fullmatch(source):
        train, held_out = _called(source, manifest)
    else:
        raise DataError(
            f"cannot use {source!r} as data: expected an .npz or .csv file, a folder or .zip of class folders, or "
            "module:function"
        )
    data = split(train, validation, seed) if held_out is None else LocalData(train, held_out)
    if not len(data.train):
        raise DataError(f"{source} holds no examples to train on")
    return data


def load_images(files: Sequence[str], manifest: Manifest) -> NDArray[np.uint8]:
    """Returns image files as byte examples (n, *shape) for the model of `manifest`.

    Raises:
        DataError: a file is not an image, or the model takes none.
    """
    return np.stack([read_image(Path(file), manifest.input.shape) for file in files])


def is_image(source: str) -> bool:
    """Returns whether `source` names an image file."""
    return Path(source).suffix.lower() in SUFFIXES


def _class_folders(path: Path, manifest: Manifest) -> Parts:
    parts: dict[bool, tuple[list[NDArray[np.uint8]], list[str]]] = {False: ([], []), True: ([], [])}
    for name, pixels in images_in(path, manifest.input.shape):
        if len(name.parts) < 2:
            raise DataError(f"{name} in {path} is in no class folder: expected <label>/<image>")
        images, labels = parts[not _HELD_OUT.isdisjoint(name.parts[:-2])]
        images.append(pixels)
        labels.append(name.parts[-2])
    if not parts[False][0]:
        raise DataError(f"{path} holds no images in class folders ({', '.join(sorted(SUFFIXES))})")
    train, held_out = (
        examples_of(np.stack(images), np.array(labels), manifest, str(path)) if images else None
        for images, labels in parts.values()
    )
    assert train is not None  # checked above
    return train, held_out


def _npz(path: Path, manifest: Manifest) -> Parts:
    try:
        with path.open("rb") as stream, np.load(stream, allow_pickle=False) as archive:
            arrays = {name: archive[name] for name in archive.files}
    except (OSError, TypeError, ValueError, EOFError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path} as .npz of plain arrays: {error}") from error
    if not {"x", "y"} <= set(arrays) or ("x_val" in arrays) != ("y_val" in arrays):
        raise DataError(f"{path} holds {sorted(arrays)}: expected x and y, maybe x_val and y_val")
    return _parts(
        [arrays[name] for name in ("x", "y", "x_val", "y_val") if name in arrays], manifest, str(path)
    )


def _called(source: str, manifest: Manifest) -> Parts:
    module, _, name = source.partition(":")
    if "" not in sys.path:
        sys.path.insert(0, "")  # a console script does not see the user's folder, `python -m` does
    try:
        function = getattr(importlib.import_module(module), name)
    except (ImportError, AttributeError) as error:
        raise DataError(f"cannot import {source}: {error}") from error
    arrays = function()
    if not isinstance(arrays, tuple) or len(arrays) not in (2, 4):
        raise DataError(f"{source} returned {type(arrays).__name__}: expected (x, y) or (x, y, x_val, y_val)")
    return _parts([np.asarray(array) for array in arrays], manifest, source)


def _csv(path: Path, manifest: Manifest) -> Examples:
    try:
        with path.open(newline="", encoding="utf-8-sig") as stream:
            rows = csv.reader(stream, strict=True)
            header = next(rows, [])
            if header.count("label") != 1:
                raise DataError(f"{path} has columns {header[:8]}: expected one named 'label'")
            column = header.index("label")
            labels, values = [], []
            for row in rows:
                if len(row) != len(header):
                    raise DataError(f"{path} line {rows.line_num}: {len(row)} fields, expected {len(header)}")
                labels.append(row.pop(column))
                values.append(np.array(row, np.float32))
    except (OSError, ValueError, csv.Error) as error:
        raise DataError(f"cannot read {path} as numbers with a label: {error}") from error
    if not values:
        raise DataError(f"{path} holds no examples")
    x = np.stack(values)
    if len(manifest.input.shape) == 3 and x.min() >= 0 and 1 < x.max() <= 255 and (x == np.floor(x)).all():
        x = x.astype(np.uint8)  # an image as text: its pixels
    return examples_of(x, np.array(labels), manifest, str(path))


def _parts(arrays: Sequence[NDArray[Any]], manifest: Manifest, source: str) -> Parts:
    train = examples_of(arrays[0], arrays[1], manifest, source)
    return train, examples_of(arrays[2], arrays[3], manifest, source) if len(arrays) == 4 else None


def examples_of(x: NDArray[Any], y: NDArray[Any], manifest: Manifest, source: str) -> Examples:
    """Returns arrays as examples for the model of `manifest`; `source` names them in errors.

    x   (n, *shape) or (n, values), channels first or last; bytes also of other image sizes and colours
    y   (n,) label indices or names

    Raises:
        DataError: lengths, shapes, types, values or labels do not fit.
    """
    if x.ndim < 2 or y.shape != (len(x),):
        raise DataError(f"{source}: x {x.shape} and y {y.shape}, expected (n, ...) and (n,)")
    try:
        return Examples(_inputs(x, manifest.input), _labels(y, manifest.labels))
    except DataError as error:
        raise DataError(f"{source}: {error}") from error


def _inputs(x: NDArray[Any], spec: InputSpec) -> NDArray[Any]:
    shape = spec.shape
    if x.dtype.kind not in "iuf":
        raise DataError(f"x of dtype {x.dtype}: expected bytes or floats")
    if x.dtype.kind == "f" and not np.isfinite(x).all():
        raise DataError("x holds NaN or infinite values")
    if spec.ids is not None:
        if x.size and not (x.min() >= 0 and x.max() < spec.ids and (x == np.floor(x)).all()):
            raise DataError(
                f"x of {x.min():g} to {x.max():g}: expected token ids, whole numbers to {spec.ids - 1}"
            )
        x = x.astype(np.float32)
    elif x.dtype.kind == "f":
        x = x.astype(np.float32)
        if len(shape) == 3 and x.size and float(np.abs(x).max()) > MAX_FLOAT_IMAGE:
            raise DataError(f"float images up to {np.abs(x).max():g} are not scaled: give them as bytes")
    elif x.dtype != np.uint8 and len(shape) != 3:
        if x.size and max(-int(x.min()), int(x.max())) > MAX_WHOLE:
            raise DataError(f"whole numbers of {x.min()} to {x.max()}: models take at most {MAX_WHOLE}")
        x = x.astype(np.float32)
    else:
        if x.size and not 0 <= int(x.min()) <= int(x.max()) <= 255:
            raise DataError(f"whole numbers of {x.min()} to {x.max()}: expected bytes 0 to 255, or floats")
        x = x.astype(np.uint8)
    if x.shape[1:] == shape:
        return x
    if x.ndim == 2 and x.shape[1] == math.prod(shape):
        return x.reshape(-1, *shape)
    if len(shape) == 3 and x.shape[1:] == (*shape[1:], shape[0]):
        return np.ascontiguousarray(x.transpose(0, 3, 1, 2))
    if [size for size in x.shape[1:] if size != 1] == [size for size in shape if size != 1]:
        return x.reshape(
            -1, *shape
        )  # grey images, and windows of sensor samples, with an axis of 1 more or less
    if x.dtype == np.uint8:
        return fit_images(x, shape)
    raise DataError(f"examples of shape {x.shape[1:]}, the model takes {shape}")


def _labels(y: NDArray[Any], names: tuple[str, ...]) -> NDArray[np.int64]:
    if y.dtype.kind in "iu":
        labels = y.astype(np.int64)
        if len(labels) and not 0 <= labels.min() <= labels.max() < len(names):
            raise DataError(f"labels of {y.min()} to {y.max()}, the model has 0 to {len(names) - 1}")
        return labels
    if y.dtype.kind != "U":
        raise DataError(f"labels of dtype {y.dtype}: expected names or whole numbers")
    index = {str(number): number for number in range(len(names))} | {name: i for i, name in enumerate(names)}
    if unknown := sorted(set(y.tolist()) - set(index)):
        raise DataError(f"labels {unknown[:5]} are unknown to the model: it has {list(names[:12])}")
    return np.array([index[label] for label in y.tolist()], np.int64)
