"""Leases: a device checks in."""

from fastapi import APIRouter, Response

from server_api.dependencies import Caller, Rounds, RunName
from spafl.protocol import Lease, LeaseRequest

router = APIRouter(prefix="/runs/{run}/leases", tags=["leases"])


@router.post(
    "",
    status_code=201,
    response_model=Lease,
    responses={200: {"model": Lease, "description": "The lease this device holds already."}},
)
async def check_in(run: RunName, request: LeaseRequest, caller: Caller, coordinator: Rounds) -> Response:
    """Returns the device's lease in the open round. 409 and 503 say when to come back (Retry-After)."""
    lease, new = await coordinator.check_in(run, caller.device, request.capabilities)
    # written straight from the record: it is our own, validating it again would double the cost of a check-in
    return Response(lease.to_text(), 201 if new else 200, media_type="application/json")
