"""The sysroot's builder where nothing is downloaded: what it refuses, and what it keeps. Runs everywhere."""

import platform
import shutil
import sys
from pathlib import Path

import pytest

from device_runtime.engines.executorch_library import RELEASE
from tests.arm64 import sysroot
from tests.arm64.sysroot import SysrootError, provide, requirements, run


@pytest.fixture
def debian(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """A machine that has what is needed; its commands lie in the folder."""
    for name in ("apt-get", "apt-config", "dpkg-deb"):
        (tmp_path / name).touch(mode=0o755)
    (tmp_path / "keyring").touch()
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setattr(platform, "machine", lambda: "x86_64")
    monkeypatch.setattr(sysroot, "KEYRING", tmp_path / "keyring")
    return tmp_path


def test_a_debian_on_x86_64_is_fit(debian: Path) -> None:
    sysroot.require_host()


def test_a_machine_without_apt_is_told_where_to_go(debian: Path) -> None:
    (debian / "apt-get").unlink()
    with pytest.raises(
        SysrootError, match="Debian packages, and apt-get is not here: run this on Debian or Ubuntu"
    ):
        sysroot.require_host()


def test_a_machine_without_debians_keys_is_told_what_to_install(debian: Path) -> None:
    (debian / "keyring").unlink()
    with pytest.raises(SysrootError, match="sudo apt-get install debian-archive-keyring"):
        sysroot.require_host()


def test_arm64_itself_needs_no_emulation(debian: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(platform, "machine", lambda: "aarch64")
    with pytest.raises(SysrootError, match="this machine is aarch64: on ARM64 itself run `make test`"):
        sysroot.require_host()


def test_the_device_gets_what_pyproject_says() -> None:
    wanted, executorch = requirements()
    names = {entry.partition(">")[0] for entry in wanted}
    assert {"numpy", "safetensors", "onnxruntime", "httpx2", "typer"} <= names
    assert not {"torch", "executorch"} & names
    assert executorch == [f"executorch=={RELEASE}"]


def test_a_part_is_kept_until_what_it_is_made_of_changes(tmp_path: Path) -> None:
    folder, made = tmp_path / "part", []

    def make(part: Path) -> None:
        made.append(part)
        (part / "file").write_text(str(len(made)))

    assert provide(folder, ["a"], make)
    assert not provide(folder, ["a"], make)
    assert provide(folder, ["b"], make)
    assert (folder / "file").read_text() == "2"
    assert len(made) == 2


def test_a_part_that_was_interrupted_is_made_anew(tmp_path: Path) -> None:
    folder = tmp_path / "part"

    def fail(part: Path) -> None:
        (part / "half").touch()
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        provide(folder, [], fail)
    assert not folder.exists()
    assert provide(folder, [], lambda part: (part / "whole").touch())
    assert [file.name for file in folder.iterdir()] == ["whole"]


def test_a_command_that_fails_is_quoted() -> None:
    script = "import sys; sys.exit('E: Unable to locate package python9')"
    with pytest.raises(SysrootError, match="apt cannot fetch:\n    E: Unable to locate package python9"):
        run([sys.executable, "-c", script], "apt cannot fetch")


@pytest.mark.skipif(shutil.which("dpkg-deb") is None, reason="no dpkg-deb here")
def test_what_is_no_package_is_refused(tmp_path: Path) -> None:
    broken = tmp_path / "broken.deb"
    broken.write_bytes(b"no archive")
    with pytest.raises(SysrootError, match=r"cannot unpack broken\.deb"):
        sysroot.extract(broken, tmp_path)
