"""Image files and byte arrays as a model's input: colours and sizes made to fit, with Pillow only where needed."""

import io
import warnings
import zipfile
from collections.abc import Iterator
from pathlib import Path, PurePosixPath
from types import ModuleType
from typing import TYPE_CHECKING

import numpy as np
from numpy.typing import NDArray

from device_runtime.errors import DataError

if TYPE_CHECKING:
    from PIL import Image

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff"})
MAX_IMAGE_BYTES = 64 << 20

_MODES = {1: "L", 3: "RGB"}


def images_in(path: Path, shape: tuple[int, ...]) -> Iterator[tuple[PurePosixPath, NDArray[np.uint8]]]:
    """Yields name and pixels (*shape) of each image under folder or .zip `path`, in the order of their names.

    Raises:
        DataError: a file is not an image, or too large.
    """
    if path.is_dir():
        for file in sorted(path.rglob("*")):
            if _is_image(name := PurePosixPath(file.relative_to(path))):
                yield name, read_image(file, shape)
        return
    try:
        with zipfile.ZipFile(path) as archive:
            for name in sorted(map(PurePosixPath, archive.namelist())):
                if not _is_image(name):
                    continue
                with archive.open(str(name)) as member:
                    data = member.read(MAX_IMAGE_BYTES + 1)
                yield name, _decoded(data, f"{name} in {path}", shape)
    except (OSError, RuntimeError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {path} as a .zip of class folders: {error}") from error


def read_image(file: Path, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Returns the pixels (*shape) of an image file, turned as its camera says, stretched where its size differs.

    Raises:
        DataError: it is not an image, or too large.
    """
    try:
        with file.open("rb") as stream:
            data = stream.read(MAX_IMAGE_BYTES + 1)
    except OSError as error:
        raise DataError(f"cannot read {file}: {error}") from error
    return _decoded(data, str(file), shape)


def fit_images(x: NDArray[np.uint8], shape: tuple[int, ...]) -> NDArray[np.uint8]:
    """Returns byte images (n, *shape) from (n, H, W), (n, H, W, C) or (n, C, H, W) of other sizes or colours.

    Raises:
        DataError: they are no grey or RGB images, or `shape` is not that of an image.
    """
    if x.ndim == 4 and x.shape[3] not in _MODES and x.shape[1] in _MODES:
        x = x.transpose(0, 2, 3, 1)
    if x.ndim == 4 and x.shape[3] == 1:
        x = x[..., 0]
    if x.ndim not in (3, 4) or (x.ndim == 4 and x.shape[3] != 3):
        raise DataError(f"examples of shape {x.shape[1:]} are neither {shape} nor grey or RGB images")
    image = _pillow().fromarray
    return np.stack([_fitted(image(pixels), shape) for pixels in x])


def _decoded(data: bytes, name: str, shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if len(data) > MAX_IMAGE_BYTES:
        raise DataError(f"{name} has more than {MAX_IMAGE_BYTES} bytes")
    image = _pillow()
    from PIL import ImageOps

    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", image.DecompressionBombWarning)
            with image.open(io.BytesIO(data)) as opened:
                return _fitted(ImageOps.exif_transpose(opened), shape)
    except (
        OSError,
        ValueError,
        SyntaxError,
        image.DecompressionBombError,
        image.DecompressionBombWarning,
    ) as error:
        raise DataError(f"cannot read {name} as an image: {error}") from error


def _fitted(image: "Image.Image", shape: tuple[int, ...]) -> NDArray[np.uint8]:
    if len(shape) != 3 or shape[0] not in _MODES:
        raise DataError(f"the model takes examples of shape {shape}, not grey or RGB images")
    channels, height, width = shape
    # grey is ITU-R 601 luma; P, CMYK, RGBA and the like become what the model takes
    image = image.convert(_MODES[channels])
    if image.size != (width, height):
        image = image.resize((width, height), _pillow().Resampling.BILINEAR)
    pixels = np.asarray(image, np.uint8).reshape(height, width, channels)
    return np.ascontiguousarray(pixels.transpose(2, 0, 1))


def _is_image(name: PurePosixPath) -> bool:
    return name.suffix.lower() in SUFFIXES and not any(
        part.startswith((".", "__MACOSX")) for part in name.parts
    )


def _pillow() -> ModuleType:
    try:
        from PIL import Image
    except ModuleNotFoundError as error:
        raise DataError("images of this kind need Pillow: pip install 'spafl[device]'") from error
    return Image
