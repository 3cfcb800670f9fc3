"""A hostile archive is refused, costs no memory, and leaves nothing behind."""

import random
import struct
import tracemalloc
import warnings
import zipfile
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import pytest

from spafl.bundle import INITIAL_STATE, MANIFEST, Bundle
from spafl.errors import BundleError
from spafl.manifest import FileEntry, Manifest


@pytest.fixture
def members(manifest: Manifest, files: dict[str, bytes]) -> dict[str, bytes]:
    return {MANIFEST: manifest.holding(files).to_bytes(), **files}


def archive(path: Path, members: list[tuple[str, bytes]], method: int = zipfile.ZIP_DEFLATED) -> Path:
    with warnings.catch_warnings(), zipfile.ZipFile(path, "w", method) as file:
        warnings.simplefilter(
            "ignore", UserWarning
        )  # zipfile warns of duplicate names, which are wanted here
        for name, data in members:
            file.writestr(zipfile.ZipInfo(name), data, method)
    return path


def test_these_members_make_a_bundle(members: dict[str, bytes], tmp_path: Path) -> None:
    Bundle.open(archive(tmp_path / "a.zip", list(members.items())))


@pytest.mark.parametrize(
    "name", ["../escape", "/escape", "..\\escape", "C:\\escape", "a/../../escape", "escape", "a/"]
)
def test_members_outside_and_beside_are_refused_and_nothing_is_written(
    members: dict[str, bytes], tmp_path: Path, name: str
) -> None:
    path = archive(tmp_path / "a.zip", [*members.items(), (name, b"gotcha")])
    with pytest.raises(BundleError, match="other files"):
        Bundle.open(path)
    assert [item.name for item in tmp_path.rglob("*")] == ["a.zip"]


def test_a_name_twice_is_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    """Readers differ in which of the two they take, so hashing one proves nothing about the other."""
    for name in (INITIAL_STATE, MANIFEST):
        path = archive(tmp_path / "a.zip", [(name, members[name]), *members.items()])
        with pytest.raises(BundleError, match="other files"):
            Bundle.open(path)


def test_a_member_that_is_a_link_is_read_as_the_bytes_it_is(
    members: dict[str, bytes], tmp_path: Path
) -> None:
    with zipfile.ZipFile(tmp_path / "a.zip", "w") as file:
        for name, data in members.items():
            info = zipfile.ZipInfo(name)
            if name == INITIAL_STATE:
                info.external_attr, data = 0o120777 << 16, b"/etc/passwd"
            file.writestr(info, data)
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(tmp_path / "a.zip")


@pytest.mark.parametrize("method", [zipfile.ZIP_BZIP2, zipfile.ZIP_LZMA])
def test_methods_that_inflate_without_bound_are_refused(
    members: dict[str, bytes], tmp_path: Path, method: int
) -> None:
    path = archive(tmp_path / "a.zip", list(members.items()), method)
    with pytest.raises(BundleError, match="plain stored or deflated"):
        Bundle.open(path)


BOMB = 256 << 20


@pytest.fixture
def measured() -> Iterator[Callable[[], int]]:
    """The peak of memory allocated since the test began, in bytes."""
    tracemalloc.start()
    yield lambda: tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()


@pytest.mark.parametrize("name", [MANIFEST, INITIAL_STATE])
def test_a_bomb_is_stopped_at_the_size_its_manifest_names(
    members: dict[str, bytes], tmp_path: Path, name: str, measured: Callable[[], int]
) -> None:
    """256 MiB of zeros in 261 kB; written in pieces so that the test itself stays small."""
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        for member, data in members.items():
            with file.open(member, "w") as stream:
                if member == name:
                    for _ in range(BOMB >> 20):
                        stream.write(bytes(1 << 20))
                else:
                    stream.write(data)
    assert (tmp_path / "a.zip").stat().st_size < 1 << 20
    with pytest.raises(BundleError, match=r"expected at most|longer than"):
        Bundle.open(tmp_path / "a.zip")
    assert measured() < 32 << 20, "the bomb went off"


def test_a_bomb_with_an_honest_manifest_costs_one_chunk(
    manifest: Manifest, tmp_path: Path, measured: Callable[[], int]
) -> None:
    """A file as large as it says is hashed piece by piece: never the whole of it in memory."""
    entry = FileEntry(bytes=BOMB, sha256="0" * 64)
    honest = replace(manifest, files={"zeros": entry})
    with zipfile.ZipFile(tmp_path / "a.zip", "w", zipfile.ZIP_DEFLATED) as file:
        file.writestr(MANIFEST, honest.to_bytes())
        with file.open("zeros", "w") as stream:
            for _ in range(BOMB >> 20):
                stream.write(bytes(1 << 20))
    with pytest.raises(BundleError, match="damaged"):
        Bundle.open(tmp_path / "a.zip")
    assert measured() < 32 << 20


def lying(members: dict[str, bytes], path: Path, claim: int) -> Path:
    """An archive whose directory claims `claim` bytes for the initial state."""
    data = bytearray(archive(path, list(members.items())).read_bytes())
    entry = data.rindex(b"PK\x01\x02", 0, data.rindex(INITIAL_STATE.encode()))
    struct.pack_into("<I", data, entry + 24, claim)  # offset of the uncompressed size: APPNOTE 4.3.12
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("claim", [0, 1, 10])
def test_an_archive_that_claims_too_little_is_found(
    members: dict[str, bytes], tmp_path: Path, claim: int
) -> None:
    with pytest.raises(BundleError):
        Bundle.open(lying(members, tmp_path / "a.zip", claim))


@pytest.mark.parametrize("claim", [2**31, 2**32 - 2])
def test_what_an_archive_claims_beyond_its_bytes_is_never_allocated(
    members: dict[str, bytes], tmp_path: Path, claim: int, measured: Callable[[], int]
) -> None:
    """Only the manifest's sizes and hashes count: it is the same bundle."""
    honest = Bundle.open(archive(tmp_path / "honest.zip", list(members.items())))
    bundle = Bundle.open(lying(members, tmp_path / "a.zip", claim))
    assert bundle.id == honest.id
    assert bundle.read(INITIAL_STATE) == members[INITIAL_STATE]
    assert measured() < 32 << 20


def test_an_encrypted_member_is_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    path = archive(tmp_path / "a.zip", list(members.items()))
    data = bytearray(path.read_bytes())
    data[data.rindex(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    with pytest.raises(BundleError, match="plain"):
        Bundle.open(path)


def test_every_truncation_is_refused(members: dict[str, bytes], tmp_path: Path) -> None:
    whole = archive(tmp_path / "a.zip", list(members.items())).read_bytes()
    for cut in range(0, len(whole), 7):
        (tmp_path / "cut.zip").write_bytes(whole[:cut])
        with pytest.raises(BundleError):
            Bundle.open(tmp_path / "cut.zip")


def test_a_mutated_archive_is_the_same_bundle_or_a_bundle_error(
    members: dict[str, bytes], tmp_path: Path
) -> None:
    whole = archive(tmp_path / "a.zip", list(members.items())).read_bytes()
    bundle_id = Bundle.open(tmp_path / "a.zip").id
    dice, refused = random.Random(5), 0
    for _ in range(600):
        data = bytearray(whole)
        for _ in range(dice.randint(1, 3)):
            data[dice.randrange(len(data))] = dice.choice([0, 1, 8, 0x7F, 0xFF, dice.randrange(256)])
        (tmp_path / "b.zip").write_bytes(data)
        try:
            assert Bundle.open(tmp_path / "b.zip").id == bundle_id
        except BundleError:
            refused += 1
    assert refused > 200
