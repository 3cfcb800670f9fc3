"""Global thresholds, by version."""

import json
from typing import Annotated, Literal

from fastapi import APIRouter, Header, Path, Response
from starlette.concurrency import run_in_threadpool

from server_api.coordinator import Coordinator
from server_api.dependencies import Rounds, RunName, member
from server_api.etag import etag, matches
from spafl.canonical import sha256_hex
from spafl.wire import MAX_VERSION, MEDIA_TYPE, decode_thresholds

router = APIRouter(prefix="/runs/{run}/thresholds", tags=["thresholds"], dependencies=member)

_Version = Literal["latest"] | Annotated[int, Path(ge=0, le=MAX_VERSION)]


@router.get(
    "/{version}",
    response_class=Response,
    responses={
        200: {
            "description": "The thresholds: bytes for devices, JSON for people who ask for it.",
            "content": {
                MEDIA_TYPE: {"schema": {"type": "string", "format": "binary"}},
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["layout", "version", "thresholds"],
                        "properties": {
                            "layout": {"type": "string"},
                            "version": {"type": "integer"},
                            "thresholds": {"type": "array", "items": {"type": "number"}},
                        },
                    }
                },
            },
        },
        304: {"description": "The version behind If-None-Match is the one asked for."},
    },
)
async def show_thresholds(
    run: RunName,
    version: _Version,
    coordinator: Rounds,
    accept: Annotated[str, Header()] = "*/*",
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Returns the global thresholds of a version, or of the latest."""
    if version == "latest":
        version = (await run_in_threadpool(coordinator.record, run)).run.version
        freshness = "no-cache"
    else:
        freshness = "max-age=31536000, immutable"
    body = await run_in_threadpool(coordinator.thresholds, run, version)
    media_type = MEDIA_TYPE
    if "application/json" in accept.lower() and MEDIA_TYPE not in accept.lower():
        body, media_type = await run_in_threadpool(_as_json, coordinator, run, body), "application/json"
    tag = etag(sha256_hex(body))
    headers = {"ETag": tag, "Cache-Control": f"private, {freshness}", "Vary": "Accept"}
    if matches(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    return Response(body, headers=headers, media_type=media_type)


def _as_json(coordinator: Coordinator, run: str, body: bytes) -> bytes:
    layout = coordinator.facts(run).layout
    thresholds = decode_thresholds(layout, body)
    values = [float(value) for value in thresholds.values]
    return json.dumps({"layout": layout.id, "version": thresholds.version, "thresholds": values}).encode()
