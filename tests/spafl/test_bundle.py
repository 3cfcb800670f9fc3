"""A bundle opens if and only if every byte of it is what its manifest says, and nothing else lies beside it."""

import os
import struct
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spafl.bundle import INITIAL_STATE, MANIFEST, Bundle, check_state, write_bundle
from spafl.canonical import sha256_hex
from spafl.errors import BundleError
from spafl.manifest import Manifest

Write = Callable[[Path], Bundle]


def test_what_is_written_opens(
    written: Write, place: Path, files: dict[str, bytes], manifest: Manifest
) -> None:
    written(place)
    bundle = Bundle.open(place)
    assert bundle.id == sha256_hex(bundle.manifest.to_bytes())
    assert {name: bundle.read(name) for name in files} == files
    assert bundle.manifest.layout == manifest.layout


def test_directory_and_zip_are_the_same_bundle(written: Write, tmp_path: Path) -> None:
    assert written(tmp_path / "a").id == written(tmp_path / "a.zip").id


def test_the_same_bundle_is_the_same_zip(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a.zip"), written(tmp_path / "b.zip")
    assert (tmp_path / "a.zip").read_bytes() == (tmp_path / "b.zip").read_bytes()


def test_initial_state(written: Write, place: Path, state: dict[str, np.ndarray]) -> None:
    bundle = written(place)
    got = bundle.initial_state()
    assert set(got) == set(state)
    for name, tensor in state.items():
        np.testing.assert_array_equal(got[name], tensor)
    np.testing.assert_array_equal(bundle.initial_thresholds(), bundle.manifest.layout.join(state))


def test_an_unknown_file_is_named(written: Write, place: Path) -> None:
    with pytest.raises(BundleError, match=r"no file 'train_step\.onnx'"):
        written(place).read("train_step.onnx")


@pytest.mark.parametrize("name", ["../secret", "/etc/passwd", "graphs/../../secret", "manifest.json"])
def test_read_reaches_no_file_the_manifest_does_not_name(written: Write, place: Path, name: str) -> None:
    (place.parent / "secret").write_text("secret")
    with pytest.raises(BundleError, match="no file"):
        written(place).read(name)


def test_nothing_there(tmp_path: Path) -> None:
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(tmp_path / "absent.zip")
    os.mkfifo(tmp_path / "pipe")
    with pytest.raises(BundleError, match="no bundle at"):
        Bundle.open(tmp_path / "pipe")


@pytest.mark.parametrize(
    "data", [b"", b"PK", b"not a zip", b"PK\x05\x06" + b"\0" * 18, b"PK\x05\x06" + b"\xff" * 18]
)
def test_a_file_that_is_no_zip(tmp_path: Path, data: bytes) -> None:
    (tmp_path / "a.zip").write_bytes(data)
    with pytest.raises(BundleError):
        Bundle.open(tmp_path / "a.zip")


def test_write_refuses_what_would_overwrite(written: Write, tmp_path: Path) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "file").write_text("mine")
    for taken in ("full", "file"):
        with pytest.raises(BundleError, match="give another --out"):
            written(tmp_path / taken)
    assert (tmp_path / "file").read_text() == (tmp_path / "full" / "mine.txt").read_text() == "mine"


@pytest.mark.parametrize("name", ["../escape", "/escape", "a/b/c", "C:\\escape", ""])
def test_write_refuses_unsafe_names(manifest: Manifest, place: Path, name: str) -> None:
    with pytest.raises(BundleError, match="not a safe file name"):
        write_bundle(place, manifest, {name: b""})
    assert not place.exists()


# ---- what someone changed afterwards


def test_a_changed_byte_is_found(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    target = tmp_path / "a" / "graphs" / "infer.onnx"
    target.write_bytes(b"Graph" + target.read_bytes()[5:])
    with pytest.raises(BundleError, match=r"graphs/infer\.onnx .* is damaged"):
        Bundle.open(tmp_path / "a")


@pytest.mark.parametrize(("change", "text"), [(b"x", "longer"), (None, "damaged")])
def test_a_longer_and_a_shorter_file_are_found(
    written: Write, tmp_path: Path, change: bytes | None, text: str
) -> None:
    written(tmp_path / "a")
    target = tmp_path / "a" / INITIAL_STATE
    target.write_bytes(target.read_bytes() + change if change else target.read_bytes()[:-1])
    with pytest.raises(BundleError, match=text):
        Bundle.open(tmp_path / "a")


def test_a_change_after_opening_is_found_when_read(written: Write, tmp_path: Path) -> None:
    bundle = written(tmp_path / "a")
    (tmp_path / "a" / INITIAL_STATE).write_bytes(b"other")
    with pytest.raises(BundleError, match="is not the file its manifest names"):
        bundle.initial_state()


def test_a_missing_file_is_found(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    (tmp_path / "a" / INITIAL_STATE).unlink()
    with pytest.raises(BundleError, match="other files than its manifest names"):
        Bundle.open(tmp_path / "a")


def test_a_missing_manifest_is_named(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    (tmp_path / "a" / MANIFEST).unlink()
    with pytest.raises(BundleError, match=r"cannot read manifest\.json"):
        Bundle.open(tmp_path / "a")


@pytest.mark.parametrize("extra", ["notes.txt", ".hidden", "graphs/other.onnx", "deep/er/file"])
def test_files_the_manifest_does_not_name_are_refused(written: Write, tmp_path: Path, extra: str) -> None:
    written(tmp_path / "a")
    (tmp_path / "a" / extra).parent.mkdir(parents=True, exist_ok=True)
    (tmp_path / "a" / extra).write_bytes(b"")
    with pytest.raises(BundleError, match="other files"):
        Bundle.open(tmp_path / "a")


def test_a_directory_with_very_many_files_is_given_up_early(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    for i in range(200):
        (tmp_path / "a" / f"f{i}").touch()
    with pytest.raises(BundleError, match="more than"):
        Bundle.open(tmp_path / "a")


@pytest.mark.parametrize("name", [INITIAL_STATE, MANIFEST, "graphs/infer.onnx"])
def test_a_link_out_of_the_bundle_is_not_followed(written: Write, tmp_path: Path, name: str) -> None:
    """Even to a file with the very bytes the manifest names."""
    written(tmp_path / "a")
    target = tmp_path / "a" / name
    target.rename(tmp_path / "outside")
    target.symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="no links"):
        Bundle.open(tmp_path / "a")


def test_a_linked_folder_is_not_followed(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    (tmp_path / "a" / "graphs").rename(tmp_path / "outside")
    (tmp_path / "a" / "graphs").symlink_to(tmp_path / "outside")
    with pytest.raises(BundleError, match="no links"):
        Bundle.open(tmp_path / "a")


def test_a_pipe_is_not_waited_for(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    (tmp_path / "a" / INITIAL_STATE).unlink()
    os.mkfifo(tmp_path / "a" / INITIAL_STATE)
    with pytest.raises(BundleError, match="no links or devices"):
        Bundle.open(tmp_path / "a")


def test_a_link_to_a_bundle_is_the_users_own_choice(written: Write, tmp_path: Path) -> None:
    written(tmp_path / "a")
    (tmp_path / "link").symlink_to(tmp_path / "a")
    assert Bundle.open(tmp_path / "link").id == Bundle.open(tmp_path / "a").id


# ---- states


@pytest.mark.parametrize(
    ("change", "text"),
    [
        (lambda s: s.pop("fc.weight"), r"missing or unknown: \['fc.weight'\]"),
        (lambda s: s.update(other=np.zeros(1, np.float32)), "missing or unknown"),
        (
            lambda s: s.update({"fc.weight": np.zeros((36, 3), np.float32)}),
            r"fc\.weight: expected float32 \(3, 36\)",
        ),
        (lambda s: s.update({"fc.weight": np.zeros((3, 36), np.float64)}), "got float64"),
        (lambda s: s["norm.mean"].__setitem__(0, np.nan), r"norm\.mean holds NaN"),
        (lambda s: s["norm.mean"].__setitem__(0, -np.inf), r"norm\.mean holds NaN or infinite"),
    ],
)
def test_a_state_that_is_not_the_models_is_refused(
    manifest: Manifest,
    state: dict[str, np.ndarray],
    tmp_path: Path,
    change: Callable[[dict[str, np.ndarray]], object],
    text: str,
) -> None:
    check_state(manifest, state)
    change(state)
    with pytest.raises(BundleError, match=text):
        check_state(manifest, state)
    bundle = write_bundle(tmp_path / "a", manifest, {INITIAL_STATE: safetensors.numpy.save(state)})
    with pytest.raises(BundleError, match=text):
        bundle.initial_state()


def _bf16() -> bytes:
    header = b'{"a":{"dtype":"BF16","shape":[1],"data_offsets":[0,2]}}'
    return struct.pack("<Q", len(header)) + header + b"\0\0"


@pytest.mark.parametrize("data", [b"", b"\xff" * 100, struct.pack("<Q", 2**40), _bf16()])
def test_a_state_file_that_cannot_be_read_is_refused(manifest: Manifest, tmp_path: Path, data: bytes) -> None:
    bundle = write_bundle(tmp_path / "a", manifest, {INITIAL_STATE: data})
    with pytest.raises(BundleError):
        bundle.initial_state()


def test_a_bundle_without_initial_state_says_so(manifest: Manifest, tmp_path: Path) -> None:
    with pytest.raises(BundleError, match=r"no file 'init\.safetensors'"):
        write_bundle(tmp_path / "a", manifest, {}).initial_thresholds()
