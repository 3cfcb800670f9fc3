"""ExecuTorch's own libraries, which need no PyTorch, and the small one between them and Python, built here.

The wheel's Python runtime imports PyTorch; its C++ libraries do not. `shim/program.cpp` gives them a C interface. It is
compiled once per machine and version, with the wheel's headers, into the user's cache.
"""

import ctypes
import functools
import hashlib
import importlib.util
import os
import platform
import shutil
from collections.abc import Sequence
from pathlib import Path

from device_runtime.engines.engine import EngineError

RELEASE = "1.5.1"
"""The only one: programs and the C++ interface change between releases."""
INSTALL = f"pip install --no-deps executorch=={RELEASE}"
"""Without its dependencies: a device needs none of them."""
BUILD = "spafl device build-executorch"
FOLDER_VARIABLE = "SPAFL_EXECUTORCH"
"""Names a folder made by `spafl device build-executorch --out`; it replaces wheel and cache."""

RUNTIME = "libexecutorch.so"
LIBRARIES = (RUNTIME, "libexecutorch_threadpool.so", "libexecutorch_kernels_optimized.so")
"""In the order in which they need each other."""
BACKENDS = {"XnnpackBackend": "libexecutorch_backend_xnnpack.so"}
"""Loaded only for programs that name them."""
SHIM = "libspafl_executorch.so"
COMPILERS = ("c++", "g++", "clang++")
FLAGS = ("-O2", "-s", "-std=c++17", "-fPIC", "-shared")
# as the wheel's libraries were compiled: the layout of the classes in its headers depends on them
DEFINITIONS = ("C10_USING_CUSTOM_GENERATED_MACROS", "ET_EVENT_TRACER_ENABLED", "ET_USE_THREADPOOL")
COMPILE_SECONDS = 600
"""A phone may take a hundred times the 3 s of a desktop."""


def wheel() -> Path:
    """Returns the folder of the installed executorch package.

    Raises:
        EngineError: it is not installed, of another release, or without the C++ libraries.
    """
    spec = importlib.util.find_spec("executorch")
    folders = list(spec.submodule_search_locations or ()) if spec else []
    if not folders:
        raise EngineError(f"engine executorch needs ExecuTorch {RELEASE}: {INSTALL}, then {BUILD}")
    return checked(Path(folders[0]))


def checked(package: Path) -> Path:
    """Returns `package` if it is an executorch folder that the shim can be built for.

    Raises:
        EngineError: another release, or no C++ libraries in it.
    """
    release = _release(package)
    if release != RELEASE:
        raise EngineError(
            f"engine executorch needs ExecuTorch {RELEASE}, found {release} in {package}: {INSTALL}"
        )
    missing = [name for name in (*LIBRARIES, *BACKENDS.values()) if not (package / "lib" / name).is_file()]
    if missing:
        raise EngineError(f"{package / 'lib'} lacks {', '.join(missing)}: {INSTALL} --force-reinstall")
    return package


def shim_path(package: Path) -> Path:
    """Returns where the shim for `package` is cached, whether it is there or not."""
    cache = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    key = hashlib.sha256("\n".join([_built_for(package / "lib"), _source(), platform.machine()]).encode())
    return Path(cache) / "spafl" / f"executorch-{RELEASE}-{key.hexdigest()[:16]}" / SHIM


def build(package: Path, out: Path | None = None, compiler: str | None = None) -> Path:
    """Returns the shim, compiled for the executorch folder `package`; nothing is done if it was already.

    out        a folder to write it to, with copies of the libraries it needs: 14 MB that need no wheel; default: the
               user's cache
    compiler   of C++17, and its options; default: $CXX, or the first of COMPILERS that is installed

    Raises:
        EngineError: no compiler, or it fails.
    """
    path = shim_path(package) if out is None else out / SHIM
    if out is None and path.is_file():
        return path
    import tempfile  # as elsewhere here, what only a build needs: a training process has not the memory to spare

    command = _compiler(compiler)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        if out is not None:
            for name in (*LIBRARIES, *BACKENDS.values()):
                shutil.copyfile(package / "lib" / name, out / name)
        with tempfile.TemporaryDirectory(dir=path.parent) as scratch:
            made = _compile(command, package, Path(scratch))
            made.replace(path)  # whoever builds at the same time writes the same
    except OSError as error:
        raise EngineError(f"cannot build the ExecuTorch library in {path.parent}: {error}") from error
    return path


def find() -> tuple[Path, Path]:
    """Returns the shim, and the folder of the ExecuTorch libraries it is to be loaded with.

    Raises:
        EngineError: nothing is installed or built; the message names the command that helps.
    """
    if folder := os.environ.get(FOLDER_VARIABLE):
        path = Path(folder) / SHIM
        if not path.is_file():
            raise EngineError(
                f"{FOLDER_VARIABLE}={folder} holds no {SHIM}: make it with {BUILD} --out {folder}"
            )
        return path, Path(folder)
    package = wheel()
    path = shim_path(package)
    if not path.is_file():
        raise EngineError(f"engine executorch is installed but its library is not built yet: {BUILD}")
    return path, package / "lib"


_loaded: dict[str, Path] = {}


@functools.cache
def load(path: Path, libraries: Path) -> ctypes.CDLL:
    """Returns the shim at `path`, loaded with ExecuTorch's libraries in `libraries`; once per process.

    Raises:
        EngineError: it was built for others, cannot be loaded, or the process runs the libraries of another folder.
    """
    # a second copy registers its kernels in the first one's table, which aborts the process
    held = _loaded.setdefault(RUNTIME, libraries)
    if held != libraries:
        raise EngineError(
            f"this process runs the ExecuTorch in {held} already; the one in {libraries} needs a process of its own"
        )
    try:
        # by path and in order: the shim and the libraries name each other without saying where they are
        for name in LIBRARIES:
            ctypes.CDLL(str(libraries / name))
        shim = ctypes.CDLL(str(path))
        shim.spafl_built_for.restype = ctypes.c_char_p
        built_for = shim.spafl_built_for().decode()
        found = _built_for(libraries)
    except (OSError, AttributeError) as error:
        raise EngineError(
            f"cannot load the ExecuTorch library {path}: {error}. Build it again: {BUILD}"
        ) from error
    if built_for != found:
        raise EngineError(
            f"the ExecuTorch library {path} was built for {built_for}, here is {found}: build it again with {BUILD}"
        )
    return shim


@functools.cache
def load_backend(name: str, libraries: Path) -> None:
    """Returns nothing; the backend that a program calls `name` is there if the wheel has it.

    Raises:
        EngineError: the wheel has none of that name, or it cannot be loaded.
    """
    if name not in BACKENDS:
        raise EngineError(
            f"the program needs the ExecuTorch backend {name}, which this engine does not bring"
        )
    try:
        ctypes.CDLL(str(libraries / BACKENDS[name]))
    except OSError as error:
        raise EngineError(f"cannot load the ExecuTorch backend {name}: {error}") from error


def _release(package: Path) -> str:
    # read by hand: importlib.metadata would cost a training process 2 MB
    for file in package.parent.glob("executorch-*.dist-info/METADATA"):
        for line in file.read_text(encoding="utf-8").splitlines():
            if line.startswith("Version:"):
                return line.removeprefix("Version:").strip().partition("+")[0]
    return "one of unknown version"


def _built_for(libraries: Path) -> str:
    """Returns the version and the fingerprint of the runtime: two builds of one release may differ in their classes."""
    fingerprint = hashlib.sha256((libraries / RUNTIME).read_bytes()).hexdigest()
    return f"executorch {RELEASE} ({fingerprint[:12]})"


def _source() -> str:
    return (Path(__file__).parent / "shim" / "program.cpp").read_text(encoding="utf-8")


def _compiler(given: str | None) -> list[str]:
    import shlex

    given = given or os.environ.get("CXX")
    for name in [given] if given else COMPILERS:
        command = shlex.split(name)
        if command and shutil.which(command[0]):
            return command
    raise EngineError(
        f"no C++ compiler ({given or ', '.join(COMPILERS)}): install one, for instance with apt install g++, or set "
        f"CXX; or run {BUILD} --out DIR on a machine that has one, copy DIR here and set {FOLDER_VARIABLE}=DIR"
    )


def _compile(compiler: Sequence[str], package: Path, scratch: Path) -> Path:
    import subprocess

    source, made = scratch / "program.cpp", scratch / SHIM
    source.write_text(_source(), encoding="utf-8")
    include = package / "include"
    libraries = package / "lib"
    command = [
        *compiler,
        *FLAGS,
        *(f"-D{name}" for name in DEFINITIONS),
        f'-DSPAFL_BUILT_FOR="{_built_for(libraries)}"',
        *("-isystem", str(include)),
        *("-isystem", str(include / "executorch/runtime/core/portable_type/c10")),
        str(source),
        *("-o", str(made)),
        f"-L{libraries}",
        *("-lexecutorch", "-lexecutorch_threadpool"),
    ]
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, errors="replace", timeout=COMPILE_SECONDS, check=False
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise EngineError(f"the C++ compiler {compiler[0]} does not run: {error}") from error
    if done.returncode or not made.is_file():
        lines = done.stderr.splitlines()
        wrong = next((line for line in lines if "error" in line.lower()), lines[-1] if lines else "no output")
        raise EngineError(
            f"{compiler[0]} cannot compile the ExecuTorch library: {wrong.strip()[:300]}. It needs C++17: try another "
            "one with CXX"
        )
    return made
