"""Settings: where they come from, what is refused, and that `spafl serve` knows every one."""

import os
from pathlib import Path

import pytest
from typer.testing import CliRunner

from server_api.app import open_store
from server_api.command import app
from server_api.credentials import digest, issue
from server_api.settings import SETTINGS, Settings
from spafl.errors import SettingsError

SECRET = "a-secret-of-enough-characters"


@pytest.fixture(autouse=True)
def _no_settings_around(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in list(os.environ):
        if name.startswith("SPAFL_"):
            monkeypatch.delenv(name)


def test_nothing_needs_to_be_set():
    settings = Settings.given()
    assert (settings.host, settings.port, settings.data) == ("127.0.0.1", 8000, Path("spafl-server"))


def test_an_option_beats_the_environment_and_the_environment_the_default(monkeypatch):
    monkeypatch.setenv("SPAFL_PORT", "9000")
    monkeypatch.setenv("SPAFL_HOST", "10.0.0.1")
    settings = Settings.given(port=9001, host=None)
    assert (settings.port, settings.host) == (9001, "10.0.0.1")


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"port": 70_000}, "setting port: "),
        ({"tls_cert": Path("x.pem")}, "tls_cert and tls_key go together"),
        ({"admin_token": "short"}, "setting admin_token: "),
        ({"admin_token": SECRET, "enrolment_key": SECRET}, "are the same"),
        ({"retry_after": 0}, "setting retry_after: "),
    ],
)
def test_what_cannot_be_used_is_named(options, reason):
    with pytest.raises(SettingsError) as caught:
        Settings.given(**options)
    assert reason in str(caught.value)
    assert SECRET not in str(caught.value)


def test_secrets_do_not_show():
    settings = Settings.given(admin_token=SECRET)
    assert SECRET not in repr(settings)
    assert SECRET not in settings.model_dump_json()


def test_help_names_every_setting():
    text = CliRunner().invoke(app, ["--help"], env={"COLUMNS": "200"}).output
    for name, meaning in SETTINGS.items():
        assert meaning, f"setting {name} needs a description"
        assert f"--{name.replace('_', '-')}" in text or f"SPAFL_{name.upper()}" in text


@pytest.mark.parametrize(
    "url",
    [
        "nonsense",
        "postgresql://user:hidden@host/db",
        "sqlite://",
        "sqlite:///:memory:",
        "sqlite:////nowhere/at/all.db",
    ],
)
def test_databases_that_cannot_be_used(tmp_path, url):
    with pytest.raises(SettingsError, match="database") as caught:
        open_store(Settings.given(data=tmp_path, database=url))
    assert "hidden" not in str(caught.value)


def test_a_data_directory_of_any_name(tmp_path):
    odd = tmp_path / "50% done? yes #1"
    open_store(Settings.given(data=odd)).close()
    assert (odd / "server.db").is_file()


def test_a_data_directory_that_is_a_file(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(SettingsError, match=r"cannot use .*file as the data directory"):
        open_store(Settings.given(data=tmp_path / "file"))


def test_a_port_in_use_makes_no_secrets(tmp_path):
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        result = CliRunner().invoke(app, ["--data", str(tmp_path / "new"), "--port", str(port)])
    assert isinstance(result.exception, SettingsError)
    assert "choose another --port" in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_a_certificate_that_is_none(tmp_path):
    for name in ("cert.pem", "key.pem"):
        (tmp_path / name).write_text("not a certificate")
    options = ["--tls-cert", str(tmp_path / "cert.pem"), "--tls-key", str(tmp_path / "key.pem")]
    result = CliRunner().invoke(app, ["--data", str(tmp_path / "new"), "--port", "0", *options])
    assert isinstance(result.exception, SettingsError)
    assert "certificate" in str(result.exception)
    assert not (tmp_path / "new").exists()


def test_secrets_are_made_on_the_first_start_and_not_again(tmp_path):
    settings = Settings.given(data=tmp_path)
    store = open_store(settings)
    first, second = issue(store, settings), issue(store, settings)
    assert first.admin_token is not None
    assert store.principal(digest(first.admin_token)) is not None
    assert (second.admin_token, second.enrolment_key) == (None, None)
    third = issue(store, settings, new_admin=True)
    assert third.admin_token not in (None, first.admin_token)
    assert store.principal(digest(first.admin_token)) is None
    assert third.enrolment_key is None
    with pytest.raises(SettingsError, match="SPAFL_"):
        issue(store, Settings.given(data=tmp_path, admin_token=SECRET), new_admin=True)
    store.close()
