"""Updates: a device reports the thresholds it trained."""

from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response

from server_api import body_limit
from server_api.dependencies import Caller, RoundNumber, Rounds, RunName
from server_api.errors import BadMetrics, NotLeased, WrongMediaType
from spafl.protocol import METRICS_HEADER, Metrics, Name
from spafl.record import RecordError
from spafl.wire import MEDIA_TYPE, max_body_bytes

router = APIRouter(prefix="/runs/{run}/rounds/{round}/updates", tags=["updates"])


@router.put(
    "/{device}",
    status_code=204,
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The thresholds after training, of the version the lease names.",
            "content": {MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def report(
    run: RunName,
    round: RoundNumber,
    device: Annotated[Name, Path(description="The reporting device's own id.")],
    caller: Caller,
    request: Request,
    coordinator: Rounds,
    metrics: Annotated[str, Header(alias=METRICS_HEADER, description="`Metrics` as JSON.", max_length=65536)],
) -> Response:
    """Returns nothing once the update is counted and on disk. The same update again counts once."""
    if device != caller.device:
        raise NotLeased(f"device {caller.device} cannot report for {device}: report for yourself")
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != MEDIA_TYPE:
        raise WrongMediaType(f"a body of type {media_type[:80] or 'unknown'}, expected {MEDIA_TYPE}")
    figures = _metrics(metrics)
    facts = await coordinator.facts_of(run)
    body_limit.allow(request, max_body_bytes(facts.layout))
    body = await request.body()
    await coordinator.report(run, round, device, body, figures)
    return Response(status_code=204)


def _metrics(text: str) -> Metrics:
    try:
        return Metrics.from_text(text)
    except RecordError as error:
        raise BadMetrics(f"header {METRICS_HEADER}: {error}") from None
