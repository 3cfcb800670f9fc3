"""A Debian arm64 Python with the device's packages in one folder: `python -m tests.arm64.sysroot FOLDER`.

    root/        Python 3.11 for arm64 and the libraries it is linked with, unpacked from Debian's packages
    tools/       the emulator and a C++ cross compiler, for this machine
    site/        aarch64 wheels of what the device depends on
    executorch/  the aarch64 wheel of ExecuTorch, for its libraries
    app/         links to the device's two rooms in this checkout: of the others nothing can be imported
    pycache/     what the emulated Python compiles

Nothing is installed and no root is needed: apt and pip download into the folder, dpkg-deb unpacks there. What is
complete is kept; so a second call takes no time, and an interrupted one goes on with the part it was at.
"""

import hashlib
import json
import os
import platform
import shutil
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Annotated

import typer

from device_runtime.engines.executorch_library import RELEASE as EXECUTORCH
from spafl.errors import SpaflError

CHECKOUT = Path(__file__).parents[2]
ROOMS = ("spafl", "device_runtime")

RELEASE, PYTHON = "bookworm", "3.11"
KEYRING = Path("/usr/share/keyrings/debian-archive-keyring.gpg")
MIRROR = "http://deb.debian.org/debian"
GLIBC = range(17, 37)
"""Minor versions of the C libraries a wheel may be built for: the release has 2.36, manylinux began with 2.17."""

SYSTEM = (f"python{PYTHON}-minimal", f"libpython{PYTHON}-stdlib", "libstdc++6", "libgcc-s1", "zlib1g")
EMULATOR = "qemu-aarch64-static"
COMPILER = "g++-aarch64-linux-gnu"

PROCESSOR = """\
processor	: {number}
BogoMIPS	: 50.00
Features	: fp asimd evtstrm aes pmull sha1 sha2 crc32 atomics fphp asimdhp cpuid asimdrdm lrcpc dcpop asimddp
CPU implementer	: 0x41
CPU architecture: 8
CPU variant	: 0x3
CPU part	: 0xd0c
CPU revision	: 1

"""
"""A Neoverse N1 as Linux describes it. onnxruntime and XNNPACK read these files themselves, and end in a segmentation
fault where they show the processor underneath the emulator."""
PROCESSORS = 2

app = typer.Typer(add_completion=False, rich_markup_mode=None)


class SysrootError(SpaflError):
    """The sysroot cannot be built here."""


@app.command()
def build(
    folder: Annotated[Path, typer.Argument(help="Where to put it.")],
    mirror: Annotated[str, typer.Option(help="A Debian mirror.")] = MIRROR,
) -> None:
    """Build an ARM64 sysroot with everything the device needs."""
    require_host()
    folder = folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    wanted, executorch = requirements()
    parts: tuple[tuple[str, object, Callable[[Path], None]], ...] = (
        ("root", [mirror, *SYSTEM], lambda part: unpack_system(part, mirror)),
        ("tools", [mirror, EMULATOR, COMPILER], lambda part: unpack_tools(part, mirror)),
        ("site", wanted, lambda part: install_wheels(part, wanted)),
        # its libraries need none of the packages its Python part asks for
        ("executorch", executorch, lambda part: install_wheels(part, executorch, "--no-deps")),
    )
    for name, inputs, make in parts:
        began = time.monotonic()
        made = "built" if provide(folder / name, inputs, make) else "kept"
        typer.echo(f"{folder / name}: {made} in {time.monotonic() - began:.1f} s")
    link_rooms(folder / "app")


def require_host() -> None:
    """Returns nothing if this machine can build and compare.

    Raises:
        SysrootError: it is not x86-64, or has no apt.
    """
    if (machine := platform.machine()) != "x86_64":
        raise SysrootError(
            f"ARM64 is compared with x86-64 here, and this machine is {machine}: on ARM64 itself run `make test`"
        )
    missing = [name for name in ("apt-get", "apt-config", "dpkg-deb") if shutil.which(name) is None]
    if missing:
        raise SysrootError(
            f"the ARM64 sysroot is made of Debian packages, and {', '.join(missing)} is not here: run this on Debian "
            "or Ubuntu, or in a container of one"
        )
    if not KEYRING.is_file():
        raise SysrootError(f"Debian's keys are not at {KEYRING}: sudo apt-get install debian-archive-keyring")


def requirements() -> tuple[list[str], list[str]]:
    """Returns what the device needs as pyproject.toml has it, and what the executorch engine."""
    project = tomllib.loads((CHECKOUT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    wanted = [*project["dependencies"], *project["optional-dependencies"]["device"]]
    return wanted, [f"executorch=={EXECUTORCH}"]


def provide(folder: Path, inputs: object, make: Callable[[Path], None]) -> bool:
    """Returns whether `folder` had to be made: it is kept if it was made whole, from the same inputs and by this file.

    make   fills an empty folder, which becomes `folder` only afterwards
    """
    stamp = folder.with_name(f"{folder.name}.made-of")
    source = Path(__file__).read_bytes() + json.dumps(inputs, sort_keys=True).encode()
    fingerprint = hashlib.sha256(source).hexdigest()
    if folder.is_dir() and stamp.is_file() and stamp.read_text() == fingerprint:
        return False
    part = folder.with_name(f"{folder.name}.part")
    for old in (part, folder):
        shutil.rmtree(old, ignore_errors=True)
    part.mkdir()
    make(part)
    part.rename(folder)
    stamp.write_text(fingerprint)
    return True


def unpack_system(root: Path, mirror: str) -> None:
    """Returns nothing; `root` holds Python for arm64, and files that describe its processors."""
    for package in download(SYSTEM, "arm64", mirror, root / "packages"):
        extract(package, root)
    shutil.rmtree(root / "packages")
    (root / "proc").mkdir()
    described = (PROCESSOR.format(number=number) for number in range(PROCESSORS))
    (root / "proc" / "cpuinfo").write_text("".join(described))
    cpus = root / "sys" / "devices" / "system" / "cpu"
    cpus.mkdir(parents=True)
    for name in ("possible", "present", "online"):
        (cpus / name).write_text(f"0-{PROCESSORS - 1}\n")


def unpack_tools(tools: Path, mirror: str) -> None:
    """Returns nothing; `tools` holds the emulator, and a compiler as `tools`/c++."""
    for package in download(("qemu-user-static", COMPILER), "amd64", mirror, tools / "packages"):
        name = package.name.partition("_")[0]
        if name == "qemu-user-static":
            extract(package, tools, f"./usr/bin/{EMULATOR}")
        elif name != "libc6":  # this machine's own goes with its loader
            extract(package, tools)
    shutil.rmtree(tools / "packages")
    # it is not where it was configured to be: its own libraries and those it links with are to be looked for here
    script = """\
#!/bin/sh
tools=$(dirname "$0")
LD_LIBRARY_PATH=$tools/usr/lib/x86_64-linux-gnu:$tools/lib/x86_64-linux-gnu
export LD_LIBRARY_PATH
exec "$tools/usr/bin/aarch64-linux-gnu-g++" --sysroot="$tools" "$@"
"""
    compiler = tools / "c++"
    compiler.write_text(script)
    compiler.chmod(0o755)


def install_wheels(site: Path, wanted: Sequence[str], *options: str) -> None:
    """Returns nothing; `site` holds the wheels of `wanted` for the sysroot's Python, whichever Python runs this."""
    glibcs = [f"manylinux_2_{minor}_aarch64" for minor in GLIBC]
    run(
        [
            *(sys.executable, "-m", "pip", "install", "--quiet", "--disable-pip-version-check"),
            *("--target", str(site), "--upgrade", "--no-compile", "--only-binary=:all:"),
            *("--python-version", PYTHON, "--implementation", "cp"),
            *(f"--platform={tag}" for tag in (*glibcs, "manylinux2014_aarch64")),
            *options,
            *wanted,
        ],
        "pip cannot fetch the device's aarch64 wheels",
    )


def download(packages: Iterable[str], architecture: str, mirror: str, folder: Path) -> list[Path]:
    """Returns the .deb files of `packages` and of all they depend on, downloaded into `folder`.

    Raises:
        SysrootError: apt fails; its own words follow.
    """
    for name in ("lists/partial", "archives/partial", "etc/apt.conf.d", "etc/preferences.d"):
        (folder / name).mkdir(parents=True)
    (folder / "status").touch()  # nothing is installed: so everything needed is downloaded
    sources = folder / "sources.list"
    sources.write_text(f"deb [signed-by={KEYRING}] {mirror} {RELEASE} main\n")
    settings = {
        "Dir::Etc": folder / "etc",
        "Dir::Etc::sourcelist": sources,
        "Dir::State": folder,
        "Dir::State::lists": folder / "lists",
        "Dir::State::status": folder / "status",
        "Dir::Cache": folder,
        "Dir::Cache::archives": folder / "archives",
        "APT::Architecture": architecture,
        "APT::Architectures::": architecture,
        "APT::Sandbox::User": "root",  # another user could not write to a folder of ours
        "APT::Install-Recommends": "false",
        "APT::Update::Error-Mode": "any",  # else a mirror that does not answer is a warning
        "Acquire::Languages": "none",
    }
    lines = [*acquisition(), *(f'{name} "{value}";' for name, value in settings.items())]
    configuration = folder / "apt.conf"
    configuration.write_text("\n".join(lines) + "\n")
    environment = {**os.environ, "APT_CONFIG": str(configuration), "LC_ALL": "C"}
    trouble = f"apt cannot fetch Debian packages for {architecture} from {mirror}"
    run(["apt-get", "-q", "update"], trouble, environment)
    run(["apt-get", "-q", "-y", "--download-only", "install", *packages], trouble, environment)
    return sorted((folder / "archives").glob("*.deb"))


def acquisition() -> list[str]:
    """Returns this machine's own settings of how apt downloads, such as its proxy; of its other settings none."""
    dump = subprocess.run(
        ["apt-config", "dump", "Acquire"], capture_output=True, text=True, check=True
    ).stdout
    return [
        line
        for line in dump.splitlines()
        if not line.startswith(("Acquire::IndexTargets", "Acquire::Languages"))
    ]


def extract(package: Path, into: Path, *members: str) -> None:
    """Returns nothing; the files of a .deb lie in `into`: those named, or all."""
    with subprocess.Popen(["dpkg-deb", "--fsys-tarfile", str(package)], stdout=subprocess.PIPE) as unpacking:
        done = subprocess.run(["tar", "-x", "-C", str(into), *members], stdin=unpacking.stdout, check=False)
    if done.returncode or unpacking.returncode:
        raise SysrootError(f"cannot unpack {package.name} into {into}")


def link_rooms(folder: Path) -> None:
    """Returns nothing; `folder` holds links to the device's rooms."""
    folder.mkdir(exist_ok=True)
    for name in ROOMS:
        link = folder / name
        link.unlink(missing_ok=True)
        link.symlink_to(CHECKOUT / name)


def run(command: Sequence[str], trouble: str, environment: Mapping[str, str] | None = None) -> None:
    """Returns nothing once `command` succeeded.

    Raises:
        SysrootError: it failed: `trouble`, and the last it said.
    """
    done = subprocess.run(
        command, capture_output=True, text=True, errors="replace", env=environment, check=False
    )
    if done.returncode:
        said = [line for line in (done.stdout + done.stderr).splitlines() if line.strip()]
        raise SysrootError("\n    ".join([f"{trouble}:", *said[-5:]]))


if __name__ == "__main__":
    try:
        app()
    except SpaflError as error:
        typer.secho(f"sysroot: {error}", fg=typer.colors.RED, err=True)
        raise SystemExit(2) from None
