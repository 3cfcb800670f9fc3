"""The `spafl` command as a user meets it: real processes, one line per error, no room loaded that was not asked for."""

import json
import subprocess
import sys
import time
import tomllib
from pathlib import Path

from spafl import __version__, cli

ROOMS = ("trainer", "export", "server_api", "device_runtime")
HEAVY = (
    "torch",
    "onnx",
    "onnxruntime",
    "fastapi",
    "sqlalchemy",
    "uvicorn",
    "matplotlib",
    "numpy",
    "pydantic",
)


def spafl(*arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from spafl.cli import main; main()", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_version() -> None:
    done = spafl("--version")
    assert (done.returncode, done.stdout, done.stderr) == (0, f"spafl {__version__}\n", "")


def test_help_lists_every_command_with_its_line() -> None:
    done = spafl("--help")
    assert done.returncode == 0
    for name, (_, line, _) in cli.COMMANDS.items():
        assert any(name in row and line in row for row in done.stdout.splitlines())


def test_help_imports_no_room_and_nothing_heavy() -> None:
    program = (
        "import sys, json\n"
        "from spafl.cli import main\n"
        "try: main()\n"
        "except SystemExit: print(json.dumps(sorted(sys.modules)), file=sys.stderr)"
    )
    done = subprocess.run(
        [sys.executable, "-c", program, "--help"], capture_output=True, text=True, check=True
    )
    loaded = {module.partition(".")[0] for module in json.loads(done.stderr)}
    assert "typer" in loaded
    assert not loaded & {*ROOMS, *HEAVY}


def test_help_is_fast() -> None:
    """0.1 s alone; the bound leaves room for a busy machine and still fails if a room (torch: 2 s) is imported."""
    times = []
    for _ in range(3):
        start = time.perf_counter()
        spafl("--help")
        times.append(time.perf_counter() - start)
    assert min(times) < 1.0


def test_no_arguments_is_help() -> None:
    done = spafl()
    assert "Usage: " in done.stdout + done.stderr


def test_an_unknown_command_is_a_usage_error() -> None:
    done = spafl("exprot")
    assert done.returncode == 2
    assert "No such command 'exprot'" in done.stderr
    assert "Traceback" not in done.stderr


def with_room(folder: Path, source: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """`spafl serve` where the room behind it is the module `source`, in a process of its own."""
    (folder / "standin.py").write_text(source)
    program = (
        "import sys; from spafl import cli; sys.path.insert(0, sys.argv.pop(1));"
        "cli.COMMANDS['serve'] = ('standin', 'Serve.', 'server'); cli.main()"
    )
    return subprocess.run(
        [sys.executable, "-c", program, str(folder), "serve", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
    )


def test_a_missing_package_is_one_line_that_names_the_extra(tmp_path: Path) -> None:
    done = with_room(tmp_path, "import absent.package")
    assert done.returncode == 2
    assert (
        done.stderr
        == "spafl: `spafl serve` needs absent, which is not installed: pip install 'spafl[server]'\n"
    )


def test_a_room_missing_from_the_installation_is_our_defect_not_the_users(tmp_path: Path) -> None:
    done = with_room(tmp_path, "import server_api.absent")
    assert "Traceback" in done.stderr
    assert "pip install" not in done.stderr


APP = """
import typer
from spafl.errors import BundleError
app = typer.Typer()
@app.command()
def serve(fail: bool = False) -> None:
    "Serves in this test."
    if fail:
        raise BundleError("got this, expected that: do so")
    print("served")
"""


def test_an_error_of_ours_is_one_line_and_exit_status_2(tmp_path: Path) -> None:
    done = with_room(tmp_path, APP, "--fail")
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "spafl: got this, expected that: do so\n"


def test_a_room_runs_and_shows_its_own_help(tmp_path: Path) -> None:
    assert with_room(tmp_path, APP).stdout == "served\n"
    assert "Serves in this test." in with_room(tmp_path, APP, "--help").stdout


def test_every_command_names_an_extra_that_exists() -> None:
    extras = tomllib.loads((Path(__file__).parents[2] / "pyproject.toml").read_text())["project"][
        "optional-dependencies"
    ]
    assert {extra for _, _, extra in cli.COMMANDS.values()} <= set(extras)
