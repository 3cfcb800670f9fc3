"""The files of the bundles a server holds, one directory for each, named by its id."""

import os
import shutil
import tempfile
import time
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from server_api.errors import BadBundle, NotFound
from spafl.bundle import MANIFEST, Bundle
from spafl.errors import BundleError
from spafl.layout import Floats
from spafl.manifest import FileEntry, Manifest

_ABANDONED_SECONDS = 86_400.0
"""An upload that has not moved for a day is not going on; the server was killed in the middle of it."""


class BundleFiles:
    """Bundles below `directory`. Uploads are received in a corner of it and moved in once they are checked."""

    def __init__(self, directory: Path) -> None:
        self.directory = directory
        self._incoming = directory / ".incoming"
        self._incoming.mkdir(parents=True, exist_ok=True)
        for left in self._incoming.iterdir():
            if left.stat().st_mtime < time.time() - _ABANDONED_SECONDS:
                shutil.rmtree(left, ignore_errors=True)

    @contextmanager
    def receiving(self) -> Iterator[Path]:
        """Yields a directory for one upload, on the same disk; it is gone afterwards."""
        with tempfile.TemporaryDirectory(dir=self._incoming) as directory:
            yield Path(directory)

    def install(self, upload: Path) -> Manifest:
        """Returns the manifest of the bundle in `upload`, a .zip of one of our directories, now held for good.

        Raises:
            BadBundle: it is not a whole and safe bundle with usable initial thresholds.
        """
        try:
            bundle = Bundle.open(upload)
            bundle.initial_thresholds()
        except BundleError as error:
            # the temporary path means nothing to the one who uploaded
            raise BadBundle(str(error).replace(str(upload), "the upload")) from error
        home = self.directory / bundle.id
        if not home.exists():
            staged = upload.with_name(bundle.id)
            _unpack(upload, bundle.manifest, staged)
            try:
                staged.rename(home)
            except OSError:
                if not home.is_dir():  # else the same bundle was uploaded twice at once, and either will do
                    raise
            _sync(self.directory)
        return bundle.manifest

    def initial_thresholds(self, id: str) -> Floats:
        """Returns the thresholds (size,) of version 0 of a bundle that is held."""
        return Bundle.open(self.directory / id).initial_thresholds()

    def path(self, id: str, manifest: Manifest, name: str) -> tuple[Path, FileEntry]:
        """Returns where file `name` of a held bundle is, and its entry in the manifest.

        Raises:
            NotFound: the bundle has no such file. Only names of the manifest are ever looked up on the disk.
        """
        entry = manifest.files.get(name)
        if entry is None:
            raise NotFound(f"bundle {id} has no file {name[:120]!r}: see its manifest")
        return self.directory / id / name, entry


def _unpack(upload: Path, manifest: Manifest, home: Path) -> None:
    home.mkdir()
    with zipfile.ZipFile(upload) as archive:
        for name in (MANIFEST, *manifest.files):
            path = home / name
            path.parent.mkdir(exist_ok=True)
            with archive.open(name) as source, path.open("wb") as target:
                shutil.copyfileobj(source, target, 1 << 20)
                target.flush()
                os.fsync(target.fileno())
    for directory in {(home / name).parent for name in manifest.files} | {home}:
        _sync(directory)


def _sync(directory: Path) -> None:
    # a rename or a new name is on the disk once its directory is
    handle = os.open(directory, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
