"""Bundles: upload, list, download."""

from pathlib import Path as FilePath
from typing import Annotated

from fastapi import APIRouter, Header, Path, Request, Response
from fastapi.responses import FileResponse
from starlette.concurrency import run_in_threadpool

from server_api import body_limit
from server_api.byte_range import check_range
from server_api.dependencies import BundleKey, Rounds, Setting, admin, member
from server_api.errors import NotFound, WrongMediaType
from server_api.etag import etag, matches
from spafl.protocol import BundleView

router = APIRouter(prefix="/bundles", tags=["bundles"])

_ZIP = "application/zip"
_FOR_EVER = "private, max-age=31536000, immutable"
_BINARY = {"application/octet-stream": {"schema": {"type": "string", "format": "binary"}}}


@router.post(
    "",
    status_code=201,
    dependencies=admin,
    responses={200: {"model": BundleView, "description": "There already."}},
    openapi_extra={
        "requestBody": {
            "required": True,
            "description": "The bundle as `spafl export` wrote it, a .zip.",
            "content": {_ZIP: {"schema": {"type": "string", "format": "binary"}}},
        }
    },
)
async def upload_bundle(
    request: Request, coordinator: Rounds, settings: Setting, response: Response
) -> BundleView:
    """Returns the uploaded bundle, once every byte of it is checked."""
    media_type = request.headers.get("content-type", "").partition(";")[0].strip().lower()
    if media_type != _ZIP:
        raise WrongMediaType(f"a body of type {media_type[:80] or 'unknown'}, expected {_ZIP}")
    body_limit.allow(request, settings.max_bundle_bytes)
    with coordinator.files.receiving() as directory:
        upload = directory / "bundle.zip"
        await _receive(request, upload)
        bundle, new = await run_in_threadpool(coordinator.add_bundle, upload)
    if not new:
        response.status_code = 200
    return bundle


@router.get("", dependencies=admin)
def list_bundles(coordinator: Rounds) -> list[BundleView]:
    """Returns every bundle, the newest first."""
    return coordinator.store.bundles()


@router.get(
    "/{bundle}",
    dependencies=member,
    response_class=Response,
    responses={
        200: {
            "description": "The bundle's manifest.json, byte for byte: its SHA-256 is the bundle's id.",
            "content": {"application/json": {"schema": {"type": "object"}}},
        },
        304: {"description": "The client has it."},
    },
)
def show_manifest(
    bundle: BundleKey, coordinator: Rounds, if_none_match: Annotated[str | None, Header()] = None
) -> Response:
    """Returns the bundle's manifest."""
    headers = {"ETag": etag(bundle), "Cache-Control": _FOR_EVER}
    data = coordinator.store.manifest(bundle)
    if data is None:
        raise NotFound(f"there is no bundle {bundle}")
    if matches(if_none_match, etag(bundle)):
        return Response(status_code=304, headers=headers)
    return Response(data, headers=headers, media_type="application/json")


@router.get(
    "/{bundle}/files/{name:path}",
    dependencies=member,
    response_class=Response,
    responses={
        200: {"description": "The whole file.", "content": _BINARY},
        206: {"description": "The part asked for with Range.", "content": _BINARY},
        304: {"description": "The client has it."},
    },
)
def download_file(
    bundle: BundleKey,
    name: Annotated[str, Path(description="A file of the manifest.", max_length=201)],
    coordinator: Rounds,
    byte_range: Annotated[str | None, Header(alias="Range")] = None,
    if_range: Annotated[str | None, Header()] = None,
    if_none_match: Annotated[str | None, Header()] = None,
) -> Response:
    """Returns a file of the bundle, or one range of its bytes."""
    path, entry = coordinator.files.path(bundle, coordinator.manifest(bundle), name)
    tag = etag(entry.sha256)
    headers = {"ETag": tag, "Cache-Control": _FOR_EVER}
    if matches(if_none_match, tag):
        return Response(status_code=304, headers=headers)
    if byte_range is not None and if_range in (None, tag):
        check_range(byte_range, entry.bytes)
    return FileResponse(path, headers=headers, media_type="application/octet-stream")


async def _receive(request: Request, upload: FilePath) -> None:
    with upload.open("wb") as file:
        async for chunk in request.stream():
            await run_in_threadpool(file.write, chunk)
