"""The server as an ASGI application."""

import asyncio
import logging
import threading
import time
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager

from fastapi import FastAPI
from pydantic import TypeAdapter
from sqlalchemy import URL
from starlette.concurrency import run_in_threadpool

from server_api import problems
from server_api.body_limit import BodyLimit
from server_api.bundle_files import BundleFiles
from server_api.coordinator import Coordinator
from server_api.credentials import Keyring
from server_api.routes import (
    bundles,
    devices,
    events,
    leases,
    rounds,
    runs,
    thresholds,
    updates,
    versions,
)
from server_api.settings import Settings
from server_api.sql_store import SqlStore
from server_api.store import Store
from spafl import __version__
from spafl.errors import SettingsError
from spafl.protocol import PREFIX, Problem

TICK_SECONDS = 0.5
"""How late a deadline may be noticed when no request comes; a request notices at once."""

log = logging.getLogger(__name__)


def open_store(settings: Settings) -> Store:
    """Returns the store the settings name, its directory made and its schema up to date.

    Raises:
        SettingsError: it cannot be opened.
    """
    try:
        settings.data.mkdir(mode=0o700, parents=True, exist_ok=True)
    except OSError as error:
        raise SettingsError(f"cannot use {settings.data} as the data directory: {error.strerror}") from error
    file = settings.data.absolute() / "server.db"
    return SqlStore(settings.database or URL.create("sqlite", database=str(file)))


def create_app(
    settings: Settings, store: Store | None = None, clock: Callable[[], float] = time.time
) -> FastAPI:
    """Returns the application; it closes its store when it is shut down.

    store   instead of the one the settings name
    clock   returns the time, seconds since the epoch
    """
    store = store or open_store(settings)
    app = FastAPI(
        title="spafl aggregation server",
        version=__version__,
        description="Federated training that exchanges only thresholds. Devices check in, train and report; "
        "the server averages. Weights never arrive here.",
        openapi_url=f"{PREFIX}/openapi.json",
        docs_url=None,  # their pages load scripts from elsewhere
        redoc_url=None,
        redirect_slashes=False,
        lifespan=_lifespan,
    )
    app.state.settings = settings
    app.state.coordinator = Coordinator(store, BundleFiles(settings.data / "bundles"), clock)
    app.state.keyring = Keyring(store, clock)
    # set when the process is asked to stop: streams end, so that the server can
    app.state.stopping = threading.Event()
    app.add_middleware(BodyLimit)
    problems.install(app, settings.retry_after)
    # routes are tried one after the other: those that devices use come first
    for noun in (updates, leases, thresholds, bundles, devices, runs, rounds, events, versions):
        app.include_router(noun.router, prefix=PREFIX, responses=problems.RESPONSES)
    _describe_problems(app)
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    ticker = asyncio.create_task(_tick(app.state.coordinator))
    try:
        yield
    finally:
        ticker.cancel()
        await asyncio.gather(ticker, return_exceptions=True)
        app.state.coordinator.store.close()


async def _tick(coordinator: Coordinator) -> None:
    while True:
        try:
            await run_in_threadpool(coordinator.settle)
        except Exception:  # the next tick may do better, and without ticks every run would stand still
            log.exception("could not settle the runs")
        await asyncio.sleep(TICK_SECONDS)


def _describe_problems(app: FastAPI) -> None:
    """Returns nothing; the OpenAPI description of `app` defines Problem, and 422 is one like any other error."""
    generate = app.openapi

    def described() -> dict[str, object]:
        if app.openapi_schema is None:
            schema = generate()
            components = schema["components"]["schemas"]
            components["Problem"] = TypeAdapter(Problem).json_schema()
            for path in schema["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            for unused in ("HTTPValidationError", "ValidationError"):
                components.pop(unused, None)
        return app.openapi_schema or {}

    app.openapi = described  # type: ignore[method-assign]
