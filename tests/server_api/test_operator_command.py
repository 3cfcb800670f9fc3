"""`spafl run` before it reaches a server: options, tokens, and what it may import."""

import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import pytest

from server_api.operator import command
from server_api.operator.creation import settings_of
from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.protocol import Policy, RunSettings

FIELDS = [*fields(RunSettings), *fields(Hyperparameters), *fields(Policy)]

GIVEN = {"name": "demo", "bundle": "0" * 64}


def spafl(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-c", "from spafl.cli import main; main()", "run", *arguments],
        capture_output=True,
        text=True,
        timeout=60,
        env={"PATH": "/usr/bin:/bin", **environment},
    )


def test_it_loads_nothing_of_the_servers_code() -> None:
    program = "import sys, server_api.operator; print(*sorted(m.partition('.')[0] for m in sys.modules))"
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    loaded = set(done.stdout.split())
    assert "httpx2" in loaded
    assert not loaded & {"fastapi", "starlette", "uvicorn", "sqlalchemy", "alembic", "torch", "onnxruntime"}


def test_every_setting_of_a_run_is_an_option() -> None:
    options = set(inspect.signature(command.create).parameters)
    named = {field.name for field in FIELDS}
    assert named - {"hyperparameters", "policy"} <= options


def test_no_setting_has_two_meanings() -> None:
    """Options are matched by name alone, so the three tables of settings may share none."""
    names = [field.name for field in FIELDS]
    assert len(names) == len(set(names))


def test_what_is_not_given_is_the_protocols_default() -> None:
    nothing = dict.fromkeys(field.name for field in FIELDS)
    assert settings_of({**nothing, **GIVEN}) == RunSettings.from_json(GIVEN)


def test_what_is_given_arrives_where_it_belongs() -> None:
    settings = settings_of(
        {**GIVEN, "rounds": 3, "lr": 0.5, "coeff": 0.0, "require_idle": True, "start": True}
    )
    assert settings == RunSettings(
        **GIVEN,
        rounds=3,
        hyperparameters=Hyperparameters(lr=0.5, coeff=0.0),
        policy=Policy(require_idle=True),
    )


@pytest.mark.parametrize(
    ("wrong", "text"),
    [
        ({"rounds": 0}, r"^--rounds: .* got 0$"),
        ({"threshold_lr": -1.0}, r"^--threshold-lr: .* got -1\.0$"),
        ({"min_battery_percent": 101.0}, "^--min-battery-percent: "),
        ({"name": "no/slash"}, "^--name: "),
        ({"minimum": 9, "target": 5}, "minimum 9 is more than target 5"),
    ],
)
def test_a_wrong_option_is_named(wrong: dict[str, Any], text: str) -> None:
    with pytest.raises(SettingsError, match=text):
        settings_of({**GIVEN, **wrong})


def test_without_a_token_it_says_where_one_comes_from() -> None:
    done = spafl("list")
    assert done.returncode == 2
    assert done.stderr.startswith("spafl: no admin token: set SPAFL_ADMIN_TOKEN or give --token-file")
    assert done.stderr.count("\n") == 1


@pytest.mark.parametrize("content", [b"", b" \n", b"two\nlines", b"two words", b"\xff\xfe", b"a\x07b"])
def test_a_token_file_that_holds_no_token_is_refused_unseen(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "token").write_bytes(content)
    done = spafl("list", "--token-file", str(tmp_path / "token"))
    assert done.returncode == 2
    assert done.stderr.startswith("spafl: ")
    assert "Traceback" not in done.stderr
    assert "two" not in done.stderr


def test_a_missing_token_file_is_named(tmp_path: Path) -> None:
    done = spafl("list", "--token-file", str(tmp_path / "absent"))
    assert "absent" in done.stderr
    assert done.returncode == 2


def test_the_token_is_no_argument() -> None:
    """An argument is seen by every user of the machine (ps) and kept in the shell's history."""
    for name in ("create", "start", "status", "watch", "bundle"):
        options = spafl(name, "--help").stdout.split()
        assert "--token" not in options
        assert "--token-file" in options


def test_errors_name_the_server_and_never_the_token() -> None:
    done = spafl("status", "demo", "--server", "ftp://host", SPAFL_ADMIN_TOKEN="very-secret")
    assert done.returncode == 2
    assert "ftp://host" in done.stderr
    assert "very-secret" not in done.stderr + done.stdout
