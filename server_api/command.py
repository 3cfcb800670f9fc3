"""`spafl serve`: the server as a process."""

import json
import logging
import signal
import socket
import ssl
import sys
from collections.abc import Callable
from dataclasses import asdict
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Annotated

import typer
import uvicorn
from fastapi import FastAPI

from server_api.app import create_app, open_store
from server_api.credentials import Issued, issue
from server_api.settings import ENV_PREFIX, SETTINGS, Settings
from spafl.errors import SettingsError

app = typer.Typer(add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False)

log = logging.getLogger(__name__)

_GRACE_SECONDS = 10
"""How long requests under way may take after SIGTERM."""


def _help(name: str) -> str:
    default = Settings.model_fields[name].default
    shown = "" if default is None else f" Default: {default}."
    return f"{SETTINGS[name]}{shown}"


_OPTIONS = ("data", "host", "port", "database", "tls_cert", "tls_key")
_EPILOG = "Every setting may come from the environment. Only there:\n\n" + "\n\n".join(
    f"{ENV_PREFIX}{name.upper()}: {_help(name)}" for name in SETTINGS if name not in _OPTIONS
)


@app.command(epilog=_EPILOG)
def serve(
    data: Annotated[Path | None, typer.Option(help=_help("data"))] = None,
    host: Annotated[str | None, typer.Option(help=_help("host"))] = None,
    port: Annotated[int | None, typer.Option(help=_help("port"))] = None,
    database: Annotated[str | None, typer.Option(help=_help("database"))] = None,
    tls_cert: Annotated[Path | None, typer.Option(help=_help("tls_cert"))] = None,
    tls_key: Annotated[Path | None, typer.Option(help=_help("tls_key"))] = None,
    new_admin_token: Annotated[
        bool, typer.Option("--new-admin-token", help="Make a new admin token; the old one stops working.")
    ] = False,
    new_enrolment_key: Annotated[
        bool, typer.Option("--new-enrolment-key", help="Make a new enrolment key; the old one stops working.")
    ] = False,
    as_json: Annotated[
        bool,
        typer.Option("--json", help="Print one line of JSON when the server is up: url and new secrets."),
    ] = False,
) -> None:
    """Run the aggregation server until it is interrupted.

    It starts with no configuration: the database and the bundles live in one directory. The admin token and the
    enrolment key are printed once, on the first start.
    """
    settings = Settings.given(
        data=data, host=host, port=port, database=database, tls_cert=tls_cert, tls_key=tls_key
    )
    _log_to_stderr()
    if settings.tls_cert is None and settings.host not in ("127.0.0.1", "::1", "localhost"):
        log.warning("tokens travel unencrypted to %s: give --tls-cert, or a proxy that does", settings.host)
    # what can fail comes before any secret is made: it would never be shown
    _check_certificate(settings)
    with _listen(settings) as listener:
        store = open_store(settings)
        issued = issue(store, settings, new_admin=new_admin_token, new_enrolment=new_enrolment_key)
        url = _url(settings, listener)
        announce = partial(_announce, url, issued, as_json=as_json)
        server = _Server(create_app(settings, store), settings, announce)
        for number in (signal.SIGINT, signal.SIGTERM):
            signal.signal(number, _exit)
        server.run(sockets=[listener])


class _Server(uvicorn.Server):
    """Uvicorn that says when it is up, and ends event streams when it is to stop."""

    def __init__(self, application: FastAPI, settings: Settings, announce: Callable[[], None]) -> None:
        config = uvicorn.Config(
            application,
            log_config=None,
            access_log=False,  # requests are many, and paths may hold what somebody mistook for a place for secrets
            lifespan="on",
            ws="none",
            timeout_graceful_shutdown=_GRACE_SECONDS,
            ssl_certfile=settings.tls_cert,
            ssl_keyfile=settings.tls_key,
        )
        super().__init__(config)
        self._stopping = application.state.stopping
        self._announce = announce

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Returns once requests are answered."""
        await super().startup(sockets)
        if self.started:
            self._announce()

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """Returns nothing; called for SIGINT and SIGTERM."""
        self._stopping.set()
        super().handle_exit(sig, frame)


def _exit(*_: object) -> None:
    # before uvicorn takes these signals over, and after it has finished its work on them and raises them again
    raise SystemExit(0)


def _log_to_stderr() -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(levelname)s %(message)s", stream=sys.stderr)
    for chatty in ("alembic", "uvicorn"):
        logging.getLogger(chatty).setLevel(logging.WARNING)


def _check_certificate(settings: Settings) -> None:
    if settings.tls_cert is None:
        return
    try:
        ssl.create_default_context(ssl.Purpose.CLIENT_AUTH).load_cert_chain(
            settings.tls_cert, settings.tls_key
        )
    except OSError as error:  # ssl.SSLError among them
        raise SettingsError(f"cannot use certificate {settings.tls_cert} and its key: {error}") from error


def _listen(settings: Settings) -> socket.socket:
    family = socket.AF_INET6 if ":" in settings.host else socket.AF_INET
    try:
        return socket.create_server((settings.host, settings.port), family=family, backlog=2048)
    except OSError as error:
        raise SettingsError(
            f"cannot listen on {settings.host} port {settings.port}: {error.strerror}; choose another --port or --host"
        ) from error


def _url(settings: Settings, listener: socket.socket) -> str:
    scheme = "https" if settings.tls_cert else "http"
    host = f"[{settings.host}]" if ":" in settings.host else settings.host
    return f"{scheme}://{host}:{listener.getsockname()[1]}"


def _announce(url: str, issued: Issued, *, as_json: bool) -> None:
    if as_json:
        shown = {key: value for key, value in {"url": url, **asdict(issued)}.items() if value is not None}
        typer.echo(json.dumps(shown))
        return
    typer.echo(f"spafl server at {url}")
    if issued.admin_token:
        typer.echo(f"  admin token    {issued.admin_token}")
    if issued.enrolment_key:
        typer.echo(f"  enrolment key  {issued.enrolment_key}")
    if issued.admin_token or issued.enrolment_key:
        typer.echo("  Shown this once: keep them. --new-admin-token and --new-enrolment-key make new ones.")
