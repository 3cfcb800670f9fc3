"""What runs here, and whether it does."""

import platform
from dataclasses import dataclass
from importlib.metadata import version
from typing import Literal

from fastapi import APIRouter

from server_api.dependencies import Rounds, admin
from spafl import __version__
from spafl.protocol import PREFIX, Versions
from spafl.record import Record

router = APIRouter(prefix="/-", tags=["introspection"])

_PACKAGES = ("fastapi", "starlette", "uvicorn", "pydantic", "sqlalchemy", "alembic", "numpy", "safetensors")


@dataclass(frozen=True, kw_only=True, slots=True)
class Health(Record):
    """The answer of a server that works, its database included."""

    status: Literal["ok"] = "ok"


@router.get("/versions", dependencies=admin)
def show_versions() -> Versions:
    """Returns the versions of this server, of the protocol, of Python and of the packages underneath."""
    return Versions(
        spafl=__version__,
        protocol=PREFIX.removeprefix("/"),
        python=platform.python_version(),
        packages={package: version(package) for package in _PACKAGES},
    )


@router.get("/health")
def show_health(coordinator: Rounds) -> Health:
    """Returns ok if the server and its database answer; needs no token."""
    coordinator.store.ping()
    return Health()
