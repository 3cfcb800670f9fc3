"""Class folders of images, in a directory or a .zip: each folder's name is a label.

<label>/<image>                        a fifth of each label becomes test examples
train/<label>/<image>, test/<label>/<image>
"""

import io
import zipfile
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path, PurePosixPath
from typing import TypeAlias

import numpy as np
from PIL import Image, UnidentifiedImageError
from rich.console import Console
from rich.progress import MofNCompleteColumn, Progress, TimeRemainingColumn

from trainer.data.dataset import MAX_BYTES, Bytes, Dataset, Split, split_off_test
from trainer.errors import DataError

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".webp", ".pgm", ".ppm"})
PARTS = ("train", "test")
MAX_IMAGES = 2_000_000
MAX_FILE_BYTES = 64 << 20

Read: TypeAlias = Callable[[str], bytes]


def load_images(source: Path, *, limit: int | None = None, seed: int = 0) -> Split:
    """Returns the images below `source` as bytes (n, channels, height, width): grey if the first is, else RGB.

    limit  images of each label, train and test counted apart, first by name; None takes all

    Raises:
        DataError: no images, folders that are not as described, images of different sizes, or too much of anything.
    """
    with _opened(source) as (names, read):
        found = sorted(
            (path for name in names if _is_image(path := PurePosixPath(name))), key=lambda path: path.parts
        )
        if not found:
            raise DataError(
                f"no images below {source}: expected <label>/<image>, with train/ and test/ or without"
            )
        root = _root(found)
        paths = [path.relative_to(root) for path in found]

        def decoded(part: list[PurePosixPath], label: int) -> Dataset:
            labels = tuple(sorted({path.parts[label] for path in paths}))
            return _decoded(source, _first(part, limit), labels, lambda name: read(str(root / name)))

        depths = {len(path.parts) for path in paths}
        if depths == {3} and {path.parts[0] for path in paths} == set(PARTS):
            return Split(*(decoded([path for path in paths if path.parts[0] == part], 1) for part in PARTS))
        if depths == {2}:
            return split_off_test(decoded(paths, 0), seed=seed)
    raise DataError(
        f"{source} holds {paths[0]}: expected all images as <label>/<image>, or as train|test/<label>/<image>"
    )


def _is_image(path: PurePosixPath) -> bool:
    hidden = any(part.startswith((".", "__MACOSX")) for part in path.parts)
    return path.suffix.lower() in SUFFIXES and not hidden


def _root(paths: list[PurePosixPath]) -> PurePosixPath:
    """Returns the folder all images share above their label's, "." where there is none."""
    root = PurePosixPath()
    while min(len(path.parts) for path in paths) > 2 and len({path.parts[0] for path in paths}) == 1:
        root /= paths[0].parts[0]
        paths = [path.relative_to(path.parts[0]) for path in paths]
    return root


def _first(paths: Iterable[PurePosixPath], limit: int | None) -> list[PurePosixPath]:
    taken: dict[PurePosixPath, int] = {}
    kept = []
    for path in paths:
        taken[path.parent] = taken.get(path.parent, 0) + 1
        if limit is None or taken[path.parent] <= limit:
            kept.append(path)
    return kept


def _decoded(source: Path, paths: list[PurePosixPath], labels: tuple[str, ...], read: Read) -> Dataset:
    first = _image(str(paths[0]), read(str(paths[0])))
    mode = "L" if first.mode in ("1", "L") else "RGB"
    (width, height), channels = first.size, len(mode)
    if len(paths) > MAX_IMAGES or len(paths) * channels * height * width > MAX_BYTES:
        raise DataError(f"{len(paths)} images of {width}x{height} are too many: use --limit")
    x = np.empty((len(paths), channels, height, width), np.uint8)

    def decode(index: int) -> None:
        name = str(paths[index])
        image = _image(name, read(name))
        if image.size != first.size:
            raise DataError(
                f"{name} is {image.size}, {paths[0]} is {first.size}: bring all to one size first"
            )
        x[index] = _pixels(name, image, mode)

    y = np.array([labels.index(path.parent.name) for path in paths], np.int64)
    with _progress() as progress, ThreadPoolExecutor(max_workers=4) as workers:
        task = progress.add_task(f"reading {source.name}", total=len(paths))
        try:
            for done, _ in enumerate(workers.map(decode, range(len(paths))), 1):
                if done % 100 == 0 or done == len(paths):
                    progress.update(task, completed=done)
        except BaseException:
            workers.shutdown(cancel_futures=True)
            raise
    return Dataset(x, y, labels)


def _image(name: str, data: bytes) -> Image.Image:
    """Returns the image, its header read and nothing decoded yet: its size is known before it takes memory."""
    try:
        return Image.open(io.BytesIO(data))
    except (UnidentifiedImageError, OSError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{name} is not an image: {error}") from error


def _pixels(name: str, image: Image.Image, mode: str) -> Bytes:
    try:
        pixels = np.asarray(image.convert(mode))
    except (OSError, ValueError, SyntaxError) as error:
        raise DataError(f"{name} is damaged: {error}") from error
    return pixels[None] if mode == "L" else pixels.transpose(2, 0, 1)


@contextmanager
def _opened(source: Path) -> Iterator[tuple[list[str], Read]]:
    """Yields the names of the files below `source` and a function that reads one of them."""
    if source.is_dir():
        names = [path.relative_to(source).as_posix() for path in source.rglob("*") if path.is_file()]

        def read(name: str) -> bytes:
            with (source / name).open("rb") as file:
                return _bounded(name, file.read(MAX_FILE_BYTES + 1))

        yield names, read
        return
    try:
        with zipfile.ZipFile(source) as archive:

            def read_member(name: str) -> bytes:
                try:
                    with archive.open(name) as member:
                        return _bounded(name, member.read(MAX_FILE_BYTES + 1))
                except (zipfile.BadZipFile, RuntimeError, EOFError, NotImplementedError) as error:
                    raise DataError(f"cannot read {name} of {source}: {error}") from error

            yield archive.namelist(), read_member
    except (OSError, zipfile.BadZipFile) as error:
        raise DataError(f"cannot read {source} as a .zip: {error}") from error


def _bounded(name: str, data: bytes) -> bytes:
    if len(data) > MAX_FILE_BYTES:
        raise DataError(f"{name} is longer than {MAX_FILE_BYTES} bytes")
    return data


def _progress() -> Progress:
    console = Console(stderr=True)
    return Progress(
        *Progress.get_default_columns()[:2],
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        console=console,
        transient=True,
        disable=not console.is_terminal,
    )
