"""Devices: enrol one, list them."""

import secrets
from typing import Annotated

from fastapi import APIRouter, Query

from server_api.credentials import digest, new_token
from server_api.dependencies import Limit, Rounds, admin, enrolment
from spafl.protocol import DeviceView, Enrolment, EnrolmentRequest

router = APIRouter(prefix="/devices", tags=["devices"])


@router.post("", status_code=201, dependencies=enrolment)
def enrol(request: EnrolmentRequest, coordinator: Rounds) -> Enrolment:
    """Returns a new device's id and its token, which is shown this once."""
    device, token = f"d{secrets.token_hex(8)}", new_token("device")
    coordinator.store.add_device(
        device, request.name, request.capabilities, digest(token), coordinator.clock()
    )
    return Enrolment(device=device, token=token)


@router.get("", dependencies=admin)
def list_devices(
    coordinator: Rounds,
    limit: Limit = 1000,
    after: Annotated[str, Query(max_length=64, description="List from above this id.")] = "",
) -> list[DeviceView]:
    """Returns the devices by id, a page at a time."""
    return coordinator.store.devices(after, limit)
