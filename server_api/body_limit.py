"""No body is read further than its route allows."""

from starlette.datastructures import Headers
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.types import ASGIApp, Message, Receive, Scope, Send

MAX_JSON_BYTES = 64 * 1024
"""The limit where a route sets no other: more than any of the protocol's JSON messages needs."""

_LIMIT = "spafl.body_limit"


class BodyTooLarge(HTTPException):
    """A body that turned out too long: an HTTPException, for FastAPI lets no other out of its body reading."""

    def __init__(self, limit: int) -> None:
        super().__init__(413, f"the body is longer than {limit} bytes, the most this resource takes")


def allow(request: Request, limit: int) -> None:
    """Returns nothing; the body of `request` may have up to `limit` bytes.

    Raises:
        BodyTooLarge: it says itself that it has more.
    """
    request.scope[_LIMIT] = limit
    _check_declared(request.scope)


class BodyLimit:
    """ASGI middleware: raises `BodyTooLarge` in the handler that reads past the limit, declared length or chunked."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Returns when the request is answered."""
        if scope["type"] != "http":
            await self.app(scope, receive, send)
            return
        scope[_LIMIT] = MAX_JSON_BYTES
        read = 0

        async def bounded() -> Message:
            nonlocal read
            if read == 0:
                _check_declared(scope)
            message = await receive()
            read += len(message.get("body", b""))
            if read > scope[_LIMIT]:
                raise BodyTooLarge(scope[_LIMIT])
            return message

        await self.app(scope, bounded, send)


def _check_declared(scope: Scope) -> None:
    declared = Headers(scope=scope).get("content-length", "")
    if declared.isdecimal() and int(declared) > scope[_LIMIT]:
        raise BodyTooLarge(scope[_LIMIT])
