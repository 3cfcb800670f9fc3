"""A model as devices receive it: a directory or a .zip of files, each named and hashed in `manifest.json`."""

import hashlib
import struct
import zipfile
import zlib
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Self

import numpy as np
import safetensors.numpy
from safetensors import SafetensorError

from spafl.canonical import sha256_hex
from spafl.errors import BundleError
from spafl.layout import Floats
from spafl.manifest import MAX_FILES, MAX_MANIFEST_BYTES, FileEntry, Manifest

MANIFEST = "manifest.json"
INITIAL_STATE = "init.safetensors"
_CHUNK = 1 << 20
_ZIP_TIME = (1980, 1, 1, 0, 0, 0)
_ZIP_ERRORS = (
    OSError,
    KeyError,
    ValueError,
    RuntimeError,
    EOFError,
    struct.error,
    zipfile.BadZipFile,
    zlib.error,
)
"""What zipfile raises for damaged archives (found by mutating one); ValueError covers names that are not UTF-8."""


class Bundle:
    """An opened bundle whose every byte was checked against its manifest when it was opened."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest

    @classmethod
    def open(cls, path: Path | str) -> Self:
        """Returns the bundle at `path`, a directory or a .zip, after checking every size and hash.

        Raises:
            BundleError: missing, damaged, unsafe or oversized files, or files the manifest does not name.
        """
        path = Path(path)
        if not (path.is_dir() or path.is_file()):
            raise BundleError(f"no bundle at {path}: export one with `spafl export`")
        names = _names(path)
        with _reading(path, MANIFEST) as stream:
            manifest = Manifest.from_bytes(stream.read(MAX_MANIFEST_BYTES + 1))
        if names != sorted({MANIFEST, *manifest.files}):
            raise BundleError(f"{path} holds other files than its manifest names: {names[:8]}")
        bundle = cls(path, manifest)
        for name, entry in manifest.files.items():
            bundle._check(name, entry)
        return bundle

    @property
    def id(self) -> str:
        """Returns the bundle's id, 64 hex digits."""
        return self.manifest.id

    def read(self, name: str) -> bytes:
        """Returns the content of file `name`, checked again.

        Raises:
            BundleError: the bundle has no such file, or it changed since the bundle was opened.
        """
        entry = self._entry(name)
        with _reading(self.path, name) as stream:
            data = stream.read(entry.bytes + 1)
        if len(data) != entry.bytes or sha256_hex(data) != entry.sha256:
            raise BundleError(f"{name} in {self.path} is not the file its manifest names")
        return data

    def initial_state(self) -> dict[str, Floats]:
        """Returns the state tensors a device starts from, float32 by name, as the manifest lists them.

        Raises:
            BundleError: a tensor is missing, unknown, of another shape or dtype, or not finite.
        """
        try:
            tensors = safetensors.numpy.load(self.read(INITIAL_STATE))
        except (SafetensorError, KeyError) as error:  # KeyError: a dtype numpy does not have
            raise BundleError(f"{INITIAL_STATE} is not a safetensors file: {error}") from error
        check_state(self.manifest, tensors)
        return tensors

    def initial_thresholds(self) -> Floats:
        """Returns the global thresholds (size,) of version 0."""
        return self.manifest.layout.join(self.initial_state())

    def _entry(self, name: str) -> FileEntry:
        try:
            return self.manifest.files[name]
        except KeyError:
            raise BundleError(
                f"bundle {self.manifest.name} has no file {name!r}: {sorted(self.manifest.files)}"
            ) from None

    def _check(self, name: str, entry: FileEntry) -> None:
        digest, size = hashlib.sha256(), 0
        with _reading(self.path, name) as stream:
            # never more than one byte past the declared size: a zip bomb stops here
            while chunk := stream.read(min(_CHUNK, entry.bytes + 1 - size)):
                digest.update(chunk)
                size += len(chunk)
                if size > entry.bytes:
                    raise BundleError(f"{name} is longer than the {entry.bytes} bytes its manifest names")
        if size != entry.bytes or digest.hexdigest() != entry.sha256:
            raise BundleError(f"{name} in {self.path} is damaged: its SHA-256 differs from the manifest's")


def check_state(manifest: Manifest, tensors: Mapping[str, Floats]) -> None:
    """Returns nothing if `tensors` are a whole state of `manifest`'s model: names, shapes, float32, finite.

    Raises:
        BundleError: naming the first tensor that is not as the manifest lists it.
    """
    expected = {tensor.name: tensor.shape for tensor in manifest.state}
    if unknown := sorted(set(tensors) ^ set(expected)):
        raise BundleError(f"state tensors missing or unknown: {unknown[:5]}")
    for name, shape in expected.items():
        tensor = tensors[name]
        if tensor.shape != shape or tensor.dtype != np.float32:
            raise BundleError(f"{name}: expected float32 {shape}, got {tensor.dtype} {tensor.shape}")
        if not np.isfinite(tensor).all():
            raise BundleError(f"{name} holds NaN or infinite values")


def write_bundle(path: Path | str, manifest: Manifest, files: Mapping[str, bytes]) -> Bundle:
    """Returns the bundle written to `path`: a .zip where the name ends so, else a directory.

    manifest   its `files` are replaced by the sizes and hashes of `files`

    Raises:
        BundleError: `files` do not fit the manifest, the path exists as something else, or the result does not open.
    """
    path = Path(path)
    manifest = manifest.holding(files)
    contents = {MANIFEST: manifest.to_bytes(), **files}
    path.parent.mkdir(parents=True, exist_ok=True)
    if path.suffix == ".zip" and not path.is_dir():
        part = path.with_name(path.name + ".part")
        with zipfile.ZipFile(part, "w", zipfile.ZIP_DEFLATED) as archive:
            for name, data in contents.items():
                archive.writestr(zipfile.ZipInfo(name, _ZIP_TIME), data, zipfile.ZIP_DEFLATED)
        part.replace(path)
    else:
        if path.exists() and (not path.is_dir() or any(path.iterdir())):
            raise BundleError(f"{path} exists and is not an empty directory: give another --out")
        for name, data in contents.items():
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_bytes(data)
    return Bundle.open(path)


def _names(path: Path) -> list[str]:
    if not path.is_dir():
        with _archive(path) as archive:
            members = archive.infolist()
        if odd := [member.filename for member in members if not _is_plain(member)]:
            raise BundleError(f"{path} holds members that are not plain stored or deflated files: {odd[:8]}")
        return sorted(member.filename for member in members)
    names = []
    for item in path.rglob("*"):  # does not descend into links
        if item.is_symlink() or not (item.is_file() or item.is_dir()):
            raise BundleError(f"{item} is not a plain file: a bundle holds no links or devices")
        if item.is_file():
            names.append(item.relative_to(path).as_posix())
        if len(names) > MAX_FILES + 1:
            raise BundleError(f"{path} holds more than {MAX_FILES + 1} files")
    return sorted(names)


def _is_plain(member: zipfile.ZipInfo) -> bool:
    # bzip2 and LZMA would be inflated without a bound on what one read makes; bit 0 of the flags means encrypted
    return member.compress_type in (zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED) and not member.flag_bits & 1


@contextmanager
def _archive(path: Path) -> Iterator[zipfile.ZipFile]:
    try:
        with zipfile.ZipFile(path) as archive:
            yield archive
    except _ZIP_ERRORS as error:
        raise BundleError(f"cannot read bundle {path}: {error}") from error


@contextmanager
def _reading(path: Path, name: str) -> Iterator[IO[bytes]]:
    if not path.is_dir():
        with _archive(path) as archive, archive.open(name) as member:
            yield member
        return
    try:
        with (path / name).open("rb") as stream:
            yield stream
    except OSError as error:
        raise BundleError(f"cannot read {name} of bundle {path}: {error}") from error
