"""README.md: its example runs as it stands, its commands and options exist, its links lead somewhere."""

import os
import re
import socket
import subprocess
import sys
from pathlib import Path

import pytest
from typer.main import get_command

from spafl.cli import app

ROOT = Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def block(language: str) -> str:
    (text,) = re.findall(rf"```{language}\n(.*?)```", README, re.DOTALL)
    return str(text)


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return int(probe.getsockname()[1])


def test_your_own_model_from_export_to_prediction(tmp_path: Path) -> None:
    """The example, to the letter but for the port, which somebody may have, and the pace of waiting devices."""
    (tmp_path / "network.py").write_text(block("python"))
    port = free_port()
    script = block("sh")
    assert ":8000" in script
    done = subprocess.run(
        ["bash", "-euc", script.replace(":8000", f":{port}")],
        cwd=tmp_path,
        env=os.environ
        | {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "SPAFL_PORT": str(port),
            "SPAFL_SERVER": f"http://127.0.0.1:{port}",
            "SPAFL_RETRY_AFTER": "0.5",
        },
        capture_output=True,
        text=True,
        timeout=280,
        check=False,
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "run.finished" in done.stdout
    assert re.search(r"equal +True", done.stdout)
    assert re.search(r"accuracy +0\.\d", done.stdout)
    assert (tmp_path / "phone-0" / "compact" / "model.onnx").is_file()


@pytest.mark.parametrize("target", sorted(set(re.findall(r"\]\((?!http)([^)]+)\)", README))))
def test_links_lead_somewhere(target: str) -> None:
    path, _, anchor = target.partition("#")
    assert (ROOT / path).exists()
    if anchor:
        headings = re.findall(r"^#+ (.+)$", (ROOT / path).read_text(encoding="utf-8"), re.MULTILINE)
        assert anchor in {heading.lower().replace(" ", "-") for heading in headings}


def options() -> list[tuple[str, str]]:
    """(command, option) of the table of options."""
    rows = re.findall(r"^\| (`--.*?) \| `([a-z ]+)` \|", README, re.MULTILINE)
    return [(command, option) for named, command in rows for option in re.findall(r"--[a-z0-9-]+", named)]


def test_the_table_of_options_is_found() -> None:
    assert len(options()) > 10


@pytest.mark.parametrize(("command", "option"), options())
def test_options_exist(command: str, option: str) -> None:
    found = get_command(app)
    for name in command.split():
        context = found.make_context(name, [], resilient_parsing=True)
        found = found.get_command(context, name)  # type: ignore[attr-defined]
    known = {text for parameter in found.params for text in (*parameter.opts, *parameter.secondary_opts)}
    assert option in known


@pytest.mark.parametrize("target", re.findall(r"^ *make ([a-z]+)", README, re.MULTILINE))
def test_make_targets_exist(target: str) -> None:
    assert re.search(rf"^{target}:", (ROOT / "Makefile").read_text(), re.MULTILINE)


def test_every_room_is_in_the_table() -> None:
    rooms = {path.parent.name for path in ROOT.glob("*/__init__.py")}
    assert rooms | {"tests", "benchmarks", "docs"} == set(
        re.findall(r"^\| \[`(\w+)/`\]", README, re.MULTILINE)
    )
