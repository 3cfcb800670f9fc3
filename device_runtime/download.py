"""A bundle over HTTP: file by file, resumed where it stopped, believed only after its hashes agree."""

import hashlib
import shutil
from pathlib import Path

from device_runtime.client import Client
from device_runtime.errors import BadAnswer, Unreachable
from spafl.bundle import MANIFEST, Bundle
from spafl.canonical import sha256_hex
from spafl.errors import BundleError
from spafl.manifest import MAX_MANIFEST_BYTES, FileEntry, Manifest


def fetch_bundle(client: Client, bundle: str, path: Path) -> Bundle:
    """Returns bundle `bundle` at directory `path`, downloaded there unless it already is.

    Pieces lie in `<path>-<id>.part` until the bundle is whole, so a download goes on where the last one stopped.

    Raises:
        BadAnswer: a manifest or file is not what its id or hash says; nothing of it is kept.
        ServerError: the server has no such bundle, or does not answer.
    """
    if (opened := _opened(path)) is not None:
        if opened.id != bundle:
            raise BundleError(
                f"{path} holds bundle {opened.id[:12]}, not {bundle[:12]}: give another --state"
            )
        return opened
    part = path.with_name(f"{path.name}-{bundle[:12]}.part")
    manifest = _manifest(client, bundle, part)
    for name, entry in manifest.files.items():
        _fetch(client, f"/bundles/{bundle}/files/{name}", entry, part / name)
    part.replace(path)
    return Bundle.open(path)


def _manifest(client: Client, bundle: str, part: Path) -> Manifest:
    body = client.request("GET", f"/bundles/{bundle}", limit=MAX_MANIFEST_BYTES)
    if sha256_hex(body) != bundle:
        raise BadAnswer(f"the server's manifest of bundle {bundle[:12]} has another SHA-256")
    manifest = Manifest.from_bytes(body)
    part.mkdir(parents=True, exist_ok=True)
    (part / MANIFEST).write_bytes(body)
    return manifest


def _fetch(client: Client, url: str, entry: FileEntry, file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    file.touch()
    attempt = 0
    while (size := file.stat().st_size) < entry.bytes:
        try:
            _append(client, url, entry, file, size)
        except Unreachable as error:
            if file.stat().st_size > size:
                attempt = 0  # it moves: a bad line may take as many pieces as it needs
            client.pause(attempt, error)
            attempt += 1
    if _sha256(file) != entry.sha256:
        file.unlink()
        raise BadAnswer(f"GET {url}: SHA-256 differs from the manifest's; the download starts anew next time")


def _append(client: Client, url: str, entry: FileEntry, file: Path, size: int) -> None:
    headers = {"Range": f"bytes={size}-", "If-Range": f'"{entry.sha256}"'} if size else {}
    with client.stream("GET", url, headers=headers) as response:
        if response.status_code == 206:
            if not response.headers.get("Content-Range", "").startswith(f"bytes {size}-"):
                raise BadAnswer(f"GET {url}: asked for bytes from {size}, got another range")
        else:
            size = 0  # the server sends it whole
        with file.open("r+b") as out:
            out.truncate(size)
            out.seek(size)
            for chunk in response.iter_raw():
                size += len(chunk)
                if size > entry.bytes:
                    raise BadAnswer(f"GET {url}: more than the {entry.bytes} bytes its manifest names")
                out.write(chunk)
                client.wait(0)
    if size < entry.bytes:
        raise Unreachable(f"GET {url}: ended after {size} of {entry.bytes} bytes")


def _opened(path: Path) -> Bundle | None:
    try:
        return Bundle.open(path)
    except BundleError:  # flash forgets, and a power cut may come before the last flush: fetch it again
        shutil.rmtree(path, ignore_errors=True)
        return None


def _sha256(file: Path) -> str:
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()
