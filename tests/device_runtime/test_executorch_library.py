"""The library between ExecuTorch and Python: built once, for one version; each way it can be missing told in a line."""

import ctypes
import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from device_runtime.engines import EngineError, require_engine
from device_runtime.engines import executorch_library as library
from device_runtime.engines.executorch_program import open_program
from spafl.cli import main as spafl

installed = pytest.mark.skipif(
    importlib.util.find_spec("executorch") is None, reason="pip install --no-deps executorch==1.5.1"
)


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("CXX", raising=False)
    monkeypatch.delenv(library.FOLDER_VARIABLE, raising=False)
    return tmp_path / "cache"


@pytest.fixture
def without_torch(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device: PyTorch is not there to fall back on."""
    found = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None if name == "torch" else found(name))


@pytest.fixture
def wheel(tmp_path: Path) -> Path:
    """A folder that looks like an installed executorch."""
    site = tmp_path / "site"
    for name in (*library.LIBRARIES, *library.BACKENDS.values()):
        (site / "executorch" / "lib").mkdir(parents=True, exist_ok=True)
        (site / "executorch" / "lib" / name).write_bytes(name.encode())
    (site / "executorch-1.5.1.dist-info").mkdir()
    (site / "executorch-1.5.1.dist-info" / "METADATA").write_text(
        "Metadata-Version: 2.4\nName: executorch\nVersion: 1.5.1+cpu\n", encoding="ascii"
    )
    return site / "executorch"


def test_a_missing_wheel_names_the_command(
    cache: Path, without_torch: None, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    with pytest.raises(EngineError) as caught:
        require_engine("executorch")
    assert "pip install --no-deps executorch==1.5.1" in str(caught.value)
    assert "spafl device build-executorch" in str(caught.value)
    assert "\n" not in str(caught.value)


@installed
def test_a_missing_library_names_the_command(cache: Path, without_torch: None) -> None:
    with pytest.raises(EngineError, match="not built yet: spafl device build-executorch"):
        require_engine("executorch")


def test_a_wheel_is_taken_for_what_it_is(wheel: Path) -> None:
    assert library.checked(wheel) == wheel


def test_another_release_is_refused(wheel: Path) -> None:
    metadata = wheel.parent / "executorch-1.5.1.dist-info" / "METADATA"
    metadata.write_text(metadata.read_text(encoding="ascii").replace("1.5.1+cpu", "1.4.1"), encoding="ascii")
    with pytest.raises(EngineError, match=r"needs ExecuTorch 1\.5\.1, found 1\.4\.1"):
        library.checked(wheel)


def test_a_wheel_without_libraries_is_refused(wheel: Path) -> None:
    (wheel / "lib" / library.RUNTIME).unlink()
    with pytest.raises(EngineError, match=r"lacks libexecutorch\.so"):
        library.checked(wheel)


def test_no_compiler_is_told_with_what_helps(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    with pytest.raises(EngineError, match=r"no C\+\+ compiler \(c\+\+, g\+\+, clang\+\+\).*--out DIR"):
        library.build(wheel)
    monkeypatch.setenv("CXX", "icc -fast")
    with pytest.raises(EngineError, match=r"no C\+\+ compiler \(icc -fast\)"):
        library.build(wheel)
    assert not list(cache.glob("**/*.so"))


def test_a_compiler_that_fails_is_quoted(cache: Path, wheel: Path, tmp_path: Path) -> None:
    compiler = tmp_path / "broken++"
    compiler.write_text(
        "#!/bin/sh\necho one line >&2\necho 'x.cpp:3: error: no such header' >&2\nexit 1\n", encoding="ascii"
    )
    compiler.chmod(0o755)
    with pytest.raises(EngineError, match=r"broken.* cannot compile .*x\.cpp:3: error: no such header"):
        library.build(wheel, compiler=str(compiler))
    assert not list(cache.glob("**/*.so"))


def test_the_command_tells_of_a_missing_compiler_in_one_line(
    cache: Path, wheel: Path, tmp_path: Path
) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-c",
            "from spafl.cli import main; main()",
            "device",
            "build-executorch",
            "--package",
            str(wheel),
            "--compiler",
            "none++",
        ],
        env={**os.environ, "XDG_CACHE_HOME": str(cache)},
        capture_output=True,
        text=True,
        check=False,
        timeout=60,
    )
    assert done.returncode != 0
    assert "no C++ compiler (none++)" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_key_of_the_cache_is_what_was_built_for(
    cache: Path, wheel: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    paths = [library.shim_path(wheel)]
    assert cache in paths[0].parents
    monkeypatch.setattr(library, "_source", lambda: "// another source")
    paths.append(library.shim_path(wheel))
    (wheel / "lib" / library.RUNTIME).write_bytes(b"another build")
    paths.append(library.shim_path(wheel))
    monkeypatch.setattr(library.platform, "machine", lambda: "riscv64")
    paths.append(library.shim_path(wheel))
    assert len(set(paths)) == 4


@pytest.fixture
def runnable() -> Path:
    """The libraries every test of this process runs; the shim is built for them if nobody did."""
    package = library.wheel()
    library.build(package)
    return package / "lib"


def in_another_process(script: str, *args: Path) -> subprocess.CompletedProcess[str]:
    """What `script` prints that loads another copy of ExecuTorch: what was loaded once stays loaded."""
    command = [sys.executable, "-c", script, *map(str, args)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The library and all it needs, as a device without the wheel gets them."""
    out = tmp_path_factory.mktemp("executorch")
    library.build(library.wheel(), out)
    return out


@installed
def test_what_is_built_is_built_once(
    cache: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "argv", ["spafl", "device", "build-executorch", "--json"])
    with pytest.raises(SystemExit) as status:
        spafl()
    assert not status.value.code
    (path,) = cache.glob(f"spafl/*/{library.SHIM}")
    assert str(path) in capsys.readouterr().out
    before = path.stat().st_mtime_ns
    assert library.build(library.wheel()) == path
    assert path.stat().st_mtime_ns == before
    assert library.find() == (path, library.wheel() / "lib")
    assert [entry.name for entry in path.parent.iterdir()] == [library.SHIM]


@installed
def test_a_library_built_for_another_runtime_is_refused(folder: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    shutil.copytree(folder, other)
    with (other / library.RUNTIME).open("ab") as runtime:
        runtime.write(b"another build of the same release")
    done = in_another_process(
        "import sys; from pathlib import Path; from device_runtime.engines import executorch_library as library\n"
        "path = Path(sys.argv[1]); library.load(path / library.SHIM, path)",
        other,
    )
    assert "EngineError" in done.stderr
    assert "was built for executorch 1.5.1 (" in done.stderr


REPLACED = """
import importlib.util, os, sys
importlib.util.find_spec = lambda name: None
from device_runtime.engines import EngineError, executorch_library, require_engine
require_engine("executorch")
print("runs from the folder")
os.environ[executorch_library.FOLDER_VARIABLE] = sys.argv[1]
try:
    require_engine("executorch")
except EngineError as error:
    print(error)
"""


@installed
def test_a_folder_replaces_the_wheel(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(library.FOLDER_VARIABLE, str(folder))
    done = in_another_process(REPLACED, tmp_path)
    runs, told = done.stdout.splitlines()
    assert runs == "runs from the folder"
    assert told.startswith(f"{library.FOLDER_VARIABLE}={tmp_path} holds no {library.SHIM}: make it with")


@installed
def test_two_copies_in_one_process_are_refused_before_they_abort_it(folder: Path) -> None:
    done = in_another_process(
        "import sys; from pathlib import Path; from device_runtime.engines import executorch_library as library\n"
        "path = Path(sys.argv[1]); library.load(path / library.SHIM, path); library.load(*library.find())",
        folder,
    )
    assert done.returncode == 1
    assert f"EngineError: this process runs the ExecuTorch in {folder} already" in done.stderr


@installed
def test_what_is_no_library_is_refused(runnable: Path, tmp_path: Path) -> None:
    (tmp_path / library.SHIM).write_bytes(b"not a library")
    with pytest.raises(EngineError, match="cannot load the ExecuTorch library"):
        library.load(tmp_path / library.SHIM, runnable)


@installed
def test_a_backend_nobody_brings_is_named(runnable: Path) -> None:
    with pytest.raises(EngineError, match="needs the ExecuTorch backend QnnBackend"):
        library.load_backend("QnnBackend", runnable)


@installed
@pytest.mark.usefixtures("runnable")
@pytest.mark.parametrize("data", [b"", b"hello" * 50, b"\0" * 4096], ids=["empty", "text", "zeros"])
def test_what_is_no_program_is_refused(data: bytes) -> None:
    with pytest.raises(EngineError, match="ExecuTorch cannot open the program"):
        open_program(data)


@pytest.fixture(scope="module")
def program() -> bytes:
    """x (n <= 64, 3), weight (3, 2) -> relu(x weight), x's sum, weight."""
    torch = pytest.importorskip("torch")
    from export import executorch_programs as programs

    inputs = {"x": torch.zeros(5, 3), "weight": torch.zeros(3, 2)}
    return programs.program(lambda x, w: (torch.relu(x @ w), x.sum(), w.clone()), inputs, ("x",))[0]


@installed
@pytest.mark.usefixtures("runnable")
def test_programs_run_on_arrays(program: bytes) -> None:
    opened, draw = open_program(program), np.random.default_rng(0)
    weight = draw.standard_normal((3, 2), np.float32)
    assert opened.largest("forward", 0) == (64, 3)
    results = []
    for size in (5, 1, 64):
        x = draw.standard_normal((size, 3), np.float32)
        results.append((opened.run("forward", [x, weight]), x))
    for (y, total, same), x in results:  # after all of them ran: outputs are the caller's own
        assert np.allclose(y, np.maximum(x @ weight, 0), atol=1e-6)
        assert np.isclose(total, x.sum(), atol=1e-4)
        assert np.array_equal(same, weight)
        assert same is not weight
    transposed = np.asfortranarray(weight)
    assert np.array_equal(opened.run("forward", [results[0][1], transposed])[0], results[0][0][0])


@installed
@pytest.mark.usefixtures("runnable")
def test_outputs_are_written_where_told(program: bytes) -> None:
    opened = open_program(program)
    place = np.zeros((3, 2), np.float32)
    weight = np.ones((3, 2), np.float32)
    out = opened.run("forward", [np.ones((4, 3), np.float32), weight], [None, None, place])
    assert out[2] is place
    assert np.array_equal(place, weight)
    for wrong in (np.zeros((2, 3), np.float32), np.zeros((3, 2)), np.zeros((2, 3), np.float32).T):
        with pytest.raises(EngineError, match="output 2"):
            opened.run("forward", [np.ones((4, 3), np.float32), weight], [None, None, wrong])


@installed
@pytest.mark.usefixtures("runnable")
def test_what_a_program_does_not_take_is_told(program: bytes) -> None:
    opened = open_program(program)
    x, weight = np.ones((4, 3), np.float32), np.ones((3, 2), np.float32)
    for arrays, told in [
        ([np.ones((65, 3), np.float32), weight], r"at most \(64, 3\) as input 0, got \(65, 3\)"),
        ([x.astype(np.float64), weight], "takes float32 .* got float64"),
        ([x[0], weight], r"input 0, got float32 \(3,\)"),
        ([x], "takes 2 arrays, got 1"),
        ([x, weight[:2]], "ExecuTorch cannot run forward"),
    ]:
        with pytest.raises(EngineError, match=told):
            opened.run("forward", arrays)
    # followed by the runtime's own words, unless PyTorch's bindings took its log over, as in tests of the export
    with pytest.raises(EngineError, match=r"cannot find backward \(error 0x12\): "):
        opened.run("backward", [x, weight])
    assert np.array_equal(opened.run("forward", [x, weight])[0], np.full((4, 2), 3, np.float32))


@installed
@pytest.mark.usefixtures("runnable")
def test_a_program_outlives_its_bytes(program: bytes) -> None:
    """The runtime reads a program's bytes as long as it runs and keeps no reference to them."""
    data = bytes(bytearray(program))  # nobody else's, to be spoilt
    opened = open_program(data)
    ctypes.memset(id(data) + bytes.__basicsize__ - 1, 0xFF, len(data))
    x, weight = np.ones((4, 3), np.float32), np.ones((3, 2), np.float32)
    assert np.array_equal(opened.run("forward", [x, weight])[0], np.full((4, 2), 3, np.float32))


@installed
def test_threads_are_those_asked_for(runnable: Path) -> None:
    shim = library.load(library.find()[0], runnable)
    assert [shim.spafl_use_threads(threads) for threads in (2, 1)] == [2, 1]
