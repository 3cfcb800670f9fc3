"""A server's answer as a body or as one of our errors."""

import time

import httpx2

from device_runtime.errors import (
    BadAnswer,
    Busy,
    NotFound,
    NotLeased,
    Refused,
    RoundClosed,
    RunOver,
    ServerError,
    Unauthorised,
    Unreachable,
    UpdateDiffers,
)
from device_runtime.retry import retry_after_seconds
from spafl.protocol import Problem
from spafl.record import RecordError

MAX_JSON_BYTES = 1 << 20

_TRANSIENT = frozenset({408, 425, 429, 500, 502, 503, 504})
_PROBLEMS: dict[str, type[ServerError]] = {
    "already-reported": Busy,
    "round-full": Busy,
    "run-paused": Busy,
    "run-not-started": Busy,
    "run-over": RunOver,
    "round-closed": RoundClosed,
    "lease-expired": RoundClosed,
    "not-leased": NotLeased,
    "update-differs": UpdateDiffers,
}
_STATUSES: dict[int, type[ServerError]] = {401: Unauthorised, 403: Unauthorised, 404: NotFound}


def bounded_body(response: httpx2.Response, limit: int) -> bytes:
    """Returns the answer's body, read as it arrives and never beyond `limit` bytes.

    Raises:
        BadAnswer: it is longer, or encoded in a way that could grow.
    """
    where = f"{response.request.method} {response.request.url.path}"
    if response.headers.get("Content-Encoding", "identity") != "identity":
        raise BadAnswer(
            f"{where}: body is encoded as {response.headers['Content-Encoding']}, asked for identity"
        )
    body = bytearray()
    for chunk in response.iter_raw():
        body += chunk
        if len(body) > limit:
            raise BadAnswer(f"{where}: body of more than the {limit} bytes expected at most")
    return bytes(body)


def refusal(response: httpx2.Response) -> ServerError:
    """Returns the error for an answer of 300 or above: by its problem's word if we know it, else by its status."""
    status = response.status_code
    retry_after = retry_after_seconds(response.headers.get("Retry-After"), time.time())
    word, detail = _problem(bounded_body(response, MAX_JSON_BYTES))
    text = f"{response.request.method} {response.request.url.path}: {status} {word or response.reason_phrase}"
    text += f": {detail}" if detail else ""
    if word in _PROBLEMS:
        return _PROBLEMS[word](text, retry_after)
    if status in _TRANSIENT:
        return Unreachable(text, retry_after)
    return _STATUSES.get(status, Refused if 400 <= status < 500 else BadAnswer)(text, retry_after)


def _problem(body: bytes) -> tuple[str, str]:
    try:
        problem = Problem.from_text(body)
    except RecordError:
        return "", ""
    return problem.type.rpartition(":")[2][:64], problem.detail[:500]
