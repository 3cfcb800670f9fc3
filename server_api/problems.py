"""Every error as one shape: application/problem+json (RFC 9457)."""

import math
import random
import re
from http import HTTPStatus

from fastapi import FastAPI, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import JSONResponse
from starlette.exceptions import HTTPException

from server_api.body_limit import BodyTooLarge
from server_api.errors import Refusal, TooLarge
from spafl.protocol import Problem

MEDIA_TYPE = "application/problem+json"
URN = "urn:spafl:problem:"

RESPONSES: dict[int | str, dict[str, object]] = {
    "default": {
        "description": "A problem (RFC 9457). `type` ends in a stable word; `detail` says what to do next.",
        "content": {MEDIA_TYPE: {"schema": {"$ref": "#/components/schemas/Problem"}}},
    }
}
"""What every route may answer besides its own answers, for OpenAPI."""


def problem_response(
    word: str,
    status: int,
    title: str,
    detail: str,
    *,
    retry_after: float | None = None,
    headers: dict[str, str] | None = None,
) -> JSONResponse:
    """Returns the answer for one problem; retry_after is in seconds."""
    # text from a request may hold what UTF-8 cannot say
    detail = detail.encode("utf-8", "backslashreplace").decode()
    problem = Problem(type=URN + word, title=title, status=status, detail=detail, retry_after=retry_after)
    headers = dict(headers or {})
    if retry_after is not None:
        headers["Retry-After"] = str(math.ceil(retry_after))
    return JSONResponse(problem.present(), status, headers, MEDIA_TYPE)


def refusal_response(refusal: Refusal, retry_after: float = 0.0) -> JSONResponse:
    """Returns the answer for a refusal; if it says to come back, after `retry_after` seconds give or take half."""
    # devices refused together must not come back together
    delay = round(retry_after * random.uniform(0.5, 1.5), 3) if refusal.again_later else None
    return problem_response(
        refusal.word,
        refusal.status,
        refusal.title,
        str(refusal),
        retry_after=delay,
        headers=refusal.headers,
    )


def install(app: FastAPI, retry_after: float) -> None:
    """Returns nothing; every error of `app`, the framework's own among them, is answered as a problem."""

    async def refused(_: Request, error: Exception) -> JSONResponse:
        assert isinstance(error, Refusal), "registered for it"
        return refusal_response(error, retry_after)

    app.add_exception_handler(Refusal, refused)
    app.add_exception_handler(BodyTooLarge, _too_large)
    app.add_exception_handler(RequestValidationError, _invalid)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(Exception, _failed)


async def _invalid(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, RequestValidationError), "registered for it"
    found = [
        f"{'.'.join(str(part) for part in item['loc'])}: {item['msg']}"[:300] for item in error.errors()[:5]
    ]
    return problem_response("bad-request", 422, "Not what this resource takes", "; ".join(found))


async def _too_large(_: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, BodyTooLarge), "registered for it"
    return refusal_response(TooLarge(error.detail))


async def _framework(request: Request, error: Exception) -> JSONResponse:
    assert isinstance(error, HTTPException), "registered for it"
    title = HTTPStatus(error.status_code).phrase
    word = title.lower().replace(" ", "-")
    headers = dict(error.headers or {})
    if error.status_code == 405 and (methods := _methods(request)):
        headers["Allow"] = ", ".join(sorted(methods))
    return problem_response(word, error.status_code, title, str(error.detail), headers=headers)


async def _failed(_: Request, __: Exception) -> JSONResponse:
    return problem_response(
        "internal-error", 500, "Internal error", "the server failed here; its log says where"
    )


def _methods(request: Request) -> set[str]:
    # the framework names only the methods of the first route of this path, a 405 must name all (RFC 9110, 15.5.6)
    paths = request.app.openapi()["paths"]
    matching = (path for path in paths if re.fullmatch(re.sub(r"{\w+}", "[^/]+", path), request.url.path))
    return {method.upper() for path in matching for method in paths[path]}
