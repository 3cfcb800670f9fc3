"""What routes ask for, in one place: who is calling, the coordinator, and path parameters.

They are coroutines because FastAPI would run plain functions on another thread, which costs more than they do.
"""

from typing import Annotated, cast

from fastapi import Depends, Path, Query, Request
from fastapi.openapi.models import HTTPBearer as HTTPBearerModel
from fastapi.security.base import SecurityBase
from starlette.concurrency import run_in_threadpool

from server_api.coordinator import Coordinator
from server_api.credentials import Keyring
from server_api.errors import Forbidden, Unauthorized
from server_api.settings import Settings
from server_api.store import Principal, Role
from spafl.protocol import BundleId, Name

_WHOSE: dict[Role, tuple[str, str]] = {
    "admin": ("admin token", "Operators: the admin token."),
    "device": ("device's token", "Devices: the token got on enrolment."),
    "enrolment": ("enrolment key", "Enrolling devices: the enrolment key."),
}


class Token(SecurityBase):
    """A dependency: the bearer token of someone in one of the roles `accepted`, shown in OpenAPI as the first one's."""

    def __init__(self, *accepted: Role) -> None:
        self.accepted = accepted
        self.scheme_name = accepted[0]
        self.model = HTTPBearerModel(description=_WHOSE[accepted[0]][1])

    async def __call__(self, request: Request) -> Principal:
        """Returns who is calling.

        Raises:
            Unauthorized: no token, or one nobody knows.
            Forbidden: the token of another role.
        """
        needed = " or ".join(_WHOSE[role][0] for role in sorted(self.accepted))
        scheme, _, token = request.headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not token:
            raise Unauthorized(f"send the {needed} as `Authorization: Bearer ...`")
        keyring = cast(Keyring, request.app.state.keyring)
        principal = keyring.remembered(token)
        if principal is None:
            principal = await run_in_threadpool(keyring.identify, token)
        if principal.role not in self.accepted:
            raise Forbidden(f"this needs the {needed}; the one given is of role {principal.role}")
        return principal


async def coordinator_of(request: Request) -> Coordinator:
    """Returns the application's coordinator."""
    return cast(Coordinator, request.app.state.coordinator)


async def _settings(request: Request) -> Settings:
    return cast(Settings, request.app.state.settings)


admin = [Depends(Token("admin"))]
"""For routes that an admin may call."""
member = [Depends(Token("admin", "device")), Depends(Token("device", "admin"))]
"""For routes that admins and devices may call: two schemes in OpenAPI, each accepting both."""
enrolment = [Depends(Token("enrolment"))]
"""For the one route an enrolment key opens."""

Caller = Annotated[Principal, Depends(Token("device"))]
"""The calling device."""
Rounds = Annotated[Coordinator, Depends(coordinator_of)]
Setting = Annotated[Settings, Depends(_settings)]

RunName = Annotated[Name, Path(description="The run's name.")]
RoundNumber = Annotated[int, Path(ge=1, le=2**31 - 1, description="The round's number, from 1.")]
BundleKey = Annotated[BundleId, Path(description="The bundle's id.")]
Limit = Annotated[int, Query(ge=1, le=1000, description="How many to return at most.")]
