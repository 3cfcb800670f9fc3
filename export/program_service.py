"""The program service: a mask in, a compact program without weights out. It never sees a weight of any device.

    POST /v1/bundles/{bundle}/programs    body: a mask; answer: a hollow program (both: `spafl.program`)

One bundle per process. Equal masks get equal bytes, most of them from memory. Every error is problem+json (RFC 9457).
"""

import hmac
import logging
import threading
from collections import OrderedDict
from collections.abc import Callable
from http import HTTPStatus

from fastapi import FastAPI, Request, Response
from fastapi.responses import JSONResponse
from starlette.concurrency import run_in_threadpool
from starlette.exceptions import HTTPException
from torch import nn

from export.compact_program import hollow_program
from export.decompositions import LoweringError
from spafl import __version__
from spafl.algorithm import Mask
from spafl.bundle import Bundle
from spafl.errors import WireError
from spafl.program import (
    MASK_MEDIA_TYPE,
    PROGRAM_MEDIA_TYPE,
    HollowProgram,
    decode_mask,
    encode_program,
    mask_bytes,
    mask_digest,
)
from spafl.protocol import PREFIX, Problem
from spafl.secret import Secret

PROBLEM_MEDIA_TYPE = "application/problem+json"
CACHE_BYTES = 64 << 20
"""Of programs kept: some thousands, for a program without weights has some 20 kB."""
MAX_WAITING = 16
"""Requests that may wait for a program to be made: one is made at a time, and takes seconds."""
RETRY_AFTER = 30.0

log = logging.getLogger(__name__)

Make = Callable[[Mask], HollowProgram]


class ServiceError(Exception):
    """A request that is not answered with a program: status, a stable word, and what to do next."""

    def __init__(self, status: int, word: str, detail: str, **headers: str) -> None:
        super().__init__(detail)
        self.status, self.word, self.headers = status, word, headers


class ProgramMaker:
    """The programs of one bundle, made one at a time and kept by mask, the latest CACHE_BYTES of them.

    make   returns the hollow program for a mask; default: of `model`, the sparsified source of `bundle`
    """

    def __init__(self, model: nn.Module, bundle: Bundle, make: Make | None = None) -> None:
        self.bundle, self.layout = bundle, bundle.manifest.layout
        self._make = make or (lambda mask: hollow_program(model, bundle.manifest, mask, bundle.id))
        self._made: OrderedDict[tuple[str, str], bytes] = OrderedDict()
        self._lock, self._one = threading.Lock(), threading.Lock()
        self._waiting = 0

    def program(self, body: bytes) -> bytes:
        """Returns the program for the mask in `body`, both as they travel.

        Raises:
            WireError: `body` is no mask of this bundle's layout.
            LoweringError: no program can be made for it.
            ServiceError: too many requests wait already.
        """
        mask = decode_mask(self.layout, body)
        key = (self.bundle.id, mask_digest(body))
        if (known := self._known(key)) is not None:
            return known
        with self._lock:
            if self._waiting >= MAX_WAITING:
                raise ServiceError(
                    503,
                    "busy",
                    f"{MAX_WAITING} devices wait for programs already: come back later",
                    **{"Retry-After": f"{RETRY_AFTER:.0f}"},
                )
            self._waiting += 1
        try:
            with self._one:
                if (known := self._known(key)) is not None:  # made for another device meanwhile
                    return known
                made = encode_program(self._make(mask))
        finally:
            with self._lock:
                self._waiting -= 1
        self._keep(key, made)
        return made

    def _known(self, key: tuple[str, str]) -> bytes | None:
        with self._lock:
            if key in self._made:
                self._made.move_to_end(key)
            return self._made.get(key)

    def _keep(self, key: tuple[str, str], program: bytes) -> None:
        with self._lock:
            self._made[key] = program
            while len(self._made) > 1 and sum(map(len, self._made.values())) > CACHE_BYTES:
                self._made.popitem(last=False)


def create_app(maker: ProgramMaker, token: Secret | None = None) -> FastAPI:
    """Returns the service of `maker`'s programs as an ASGI application.

    token   that requests must carry as their bearer; None: anybody who reaches it may ask
    """
    app = FastAPI(
        title="spafl program service",
        version=__version__,
        openapi_url=None,
        docs_url=None,
        redoc_url=None,
        redirect_slashes=False,
    )
    app.add_exception_handler(ServiceError, _refused)
    app.add_exception_handler(HTTPException, _framework)
    app.add_exception_handler(Exception, _failed)

    @app.post(f"{PREFIX}/bundles/{{bundle}}/programs")
    async def program(bundle: str, request: Request) -> Response:
        _authorise(request, token)
        if bundle != maker.bundle.id:
            raise ServiceError(
                404, "not-found", f"this service makes programs of bundle {maker.bundle.id} only"
            )
        if request.headers.get("Content-Type") != MASK_MEDIA_TYPE:
            raise ServiceError(415, "unsupported-media-type", f"expected a mask, {MASK_MEDIA_TYPE}")
        body = await _body(request, mask_bytes(maker.layout))
        try:
            made = await run_in_threadpool(maker.program, body)
        except WireError as error:
            raise ServiceError(422, "bad-request", str(error)) from error
        except LoweringError as error:
            log.error("no program for mask %s: %s", mask_digest(body)[:12], error)
            raise ServiceError(500, "no-program", str(error)) from error
        return Response(made, media_type=PROGRAM_MEDIA_TYPE, headers={"Cache-Control": "no-store"})

    return app


def _authorise(request: Request, token: Secret | None) -> None:
    if token is None:
        return
    scheme, _, given = request.headers.get("Authorization", "").partition(" ")
    # bytes: compare_digest refuses text that is not ASCII
    if scheme.lower() != "bearer" or not hmac.compare_digest(given.encode(), token.reveal().encode()):
        raise ServiceError(
            401,
            "unauthorized",
            "this service wants its token as the bearer: set SPAFL_PROGRAM_TOKEN on the device",
            **{"WWW-Authenticate": "Bearer"},
        )


async def _body(request: Request, length: int) -> bytes:
    """Returns the request's body, never read beyond `length` bytes, the only length a mask of this layout has."""
    body = bytearray()
    async for chunk in request.stream():
        body += chunk
        if len(body) > length:
            raise ServiceError(
                413,
                "too-large",
                f"a mask of this bundle has {length} bytes, the body is longer",
                Connection="close",
            )
    return bytes(body)


def _problem(status: int, word: str, detail: str, headers: dict[str, str]) -> JSONResponse:
    detail = detail.encode("utf-8", "backslashreplace").decode()  # text from a request may be no UTF-8
    problem = Problem(
        type=f"urn:spafl:problem:{word}", title=HTTPStatus(status).phrase, status=status, detail=detail
    )
    return JSONResponse(problem.present(), status, headers, PROBLEM_MEDIA_TYPE)


async def _refused(_: Request, error: Exception) -> Response:
    assert isinstance(error, ServiceError), "registered for it"
    return _problem(error.status, error.word, str(error), error.headers)


async def _framework(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException), "registered for it"
    word = HTTPStatus(error.status_code).phrase.lower().replace(" ", "-")
    return _problem(error.status_code, word, str(error.detail), dict(error.headers or {}))


async def _failed(_: Request, __: Exception) -> Response:
    return _problem(500, "internal-error", "the service failed here; its log says where", {})
