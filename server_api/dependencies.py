"""What routes ask for, in one place: who is calling, the coordinator, and path parameters.

They are coroutines because FastAPI would run plain functions on another thread, which costs more than they do.
"""

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer
from starlette.concurrency import run_in_threadpool

from server_api.coordinator import Coordinator
from server_api.credentials import Keyring
from server_api.errors import Forbidden, Unauthorized
from server_api.settings import Settings
from server_api.store import Principal, Role
from spafl.protocol import BundleId, Name

_Credentials = HTTPAuthorizationCredentials | None

ADMIN_TOKEN = HTTPBearer(auto_error=False, scheme_name="admin", description="Operators: the admin token.")
DEVICE_TOKEN = HTTPBearer(
    auto_error=False, scheme_name="device", description="Devices: the token got on enrolment."
)
ENROLMENT_KEY = HTTPBearer(
    auto_error=False, scheme_name="enrolment", description="Enrolling devices: the enrolment key."
)


_NEEDED: dict[tuple[Role, ...], str] = {
    ("admin",): "admin token",
    ("device",): "device's token",
    ("enrolment",): "enrolment key",
    ("admin", "device"): "admin token or a device's token",
}


async def _require(request: Request, credentials: _Credentials, *roles: Role) -> Principal:
    if credentials is None:
        raise Unauthorized(f"send the {_NEEDED[roles]} as `Authorization: Bearer ...`")
    keyring = cast(Keyring, request.app.state.keyring)
    token = credentials.credentials
    principal = keyring.remembered(token)
    if principal is None:
        principal = await run_in_threadpool(keyring.identify, token)
    if principal.role not in roles:
        raise Forbidden(f"this needs the {_NEEDED[roles]}; the one given is of role {principal.role}")
    return principal


async def _admin(request: Request, token: Annotated[_Credentials, Depends(ADMIN_TOKEN)]) -> Principal:
    return await _require(request, token, "admin")


async def _device(request: Request, token: Annotated[_Credentials, Depends(DEVICE_TOKEN)]) -> str:
    principal = await _require(request, token, "device")
    return cast(str, principal.device)


async def _enrolment(request: Request, key: Annotated[_Credentials, Depends(ENROLMENT_KEY)]) -> Principal:
    return await _require(request, key, "enrolment")


async def _member(
    request: Request,
    token: Annotated[_Credentials, Depends(ADMIN_TOKEN)],
    _: Annotated[_Credentials, Depends(DEVICE_TOKEN)],
) -> Principal:
    return await _require(request, token, "admin", "device")


async def _coordinator(request: Request) -> Coordinator:
    return cast(Coordinator, request.app.state.coordinator)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


admin = Depends(_admin)
"""For routes that only need an admin to call, not to know which."""
member = Depends(_member)
"""For routes that admins and devices may call."""
enrolment = Depends(_enrolment)
"""For the one route an enrolment key opens."""

DeviceId = Annotated[str, Depends(_device)]
"""The id of the calling device."""
Rounds = Annotated[Coordinator, Depends(_coordinator)]
Setting = Annotated[Settings, Depends(_settings)]

RunName = Annotated[Name, Path(description="The run's name.")]
RoundNumber = Annotated[int, Path(ge=1, le=2**31 - 1, description="The round's number, from 1.")]
BundleKey = Annotated[BundleId, Path(description="The bundle's id.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many to return at most.")]
