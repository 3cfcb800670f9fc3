"""The protocol's device half over HTTP: one method per request, typed answers, typed errors.

Every request has timeouts and a bound on the answer's size, is repeated with backoff while that can help, and keeps
secrets out of URLs, logs, errors and reprs.
"""

import random
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from types import TracebackType
from typing import Self, TypeVar
from urllib.parse import quote

import httpx2

from device_runtime.errors import BadAnswer, Unreachable
from device_runtime.journal import Identity
from device_runtime.problems import MAX_JSON_BYTES, bounded_body, refusal
from device_runtime.retry import Backoff
from spafl import __version__
from spafl.errors import SettingsError, WireError
from spafl.layout import ThresholdLayout
from spafl.protocol import (
    METRICS_HEADER,
    PREFIX,
    Enrolment,
    EnrolmentRequest,
    Lease,
    LeaseRequest,
    RunView,
)
from spafl.record import Record, RecordError
from spafl.secret import Secret
from spafl.wire import MEDIA_TYPE, Thresholds, decode_thresholds, max_body_bytes

TIMEOUT = httpx2.Timeout(connect=10.0, read=30.0, write=30.0, pool=10.0)
MAX_WAIT = 60.0
"""Seconds a request waits for a server that names a time; a later one is the caller's to plan."""

_Answer = TypeVar("_Answer", bound=Record)


class Client:
    """One device's connection to one server; close it, or use it in a `with`.

    server      base URL, http or https
    token       the device's token; only `enrol` works without
    transport   where requests go instead of the network, for tests
    wait        sleeps that many seconds; it may raise to abandon the request, and is asked with 0 between the pieces
                of a long download
    """

    def __init__(
        self,
        server: str,
        token: Secret | None = None,
        *,
        transport: httpx2.BaseTransport | None = None,
        timeout: httpx2.Timeout = TIMEOUT,
        backoff: Backoff | None = None,
        wait: Callable[[float], None] = time.sleep,
    ) -> None:
        self.server = server.rstrip("/")
        self._token = token
        self._backoff = backoff or Backoff()
        self.wait = wait
        try:
            self._http = httpx2.Client(
                base_url=self.server + PREFIX,
                timeout=timeout,
                transport=transport,
                # bodies are bounded as they arrive, so nothing may inflate them afterwards
                headers={"User-Agent": f"spafl/{__version__}", "Accept-Encoding": "identity"},
            )
        except httpx2.InvalidURL as error:
            raise SettingsError(f"server {server!r} is not a usable URL: {error}") from error
        if self._http.base_url.userinfo:
            raise SettingsError(
                "the server's URL holds a name or password, which would show up in logs: leave it out"
            )
        if self._http.base_url.scheme not in ("http", "https") or not self._http.base_url.host:
            raise SettingsError(f"server {server!r} is not a URL: expected http://host:port or https://host")

    def __repr__(self) -> str:
        return f"Client({self.server!r})"

    def close(self) -> None:
        """Returns nothing; connections are closed."""
        self._http.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def enrol(self, key: Secret, request: EnrolmentRequest) -> Identity:
        """Returns the new device and its token, got with an enrolment key.

        Raises:
            Unauthorised: the key is unknown or used up.
        """
        # a repeated enrolment is another device: only repeat what surely did not arrive
        answer = self._json("POST", "/devices", request, Enrolment, token=key, repeatable=False)
        return Identity(server=self.server, device=answer.device, token=Secret(answer.token))

    def run(self, run: str) -> RunView:
        """Returns what the server says about `run`.

        Raises:
            NotFound: there is no such run.
        """
        return self._json("GET", f"/runs/{_segment(run)}", None, RunView)

    def lease(self, run: str, request: LeaseRequest) -> Lease:
        """Returns this device's lease of the open round of `run`: a new one, or the one it already has.

        Raises:
            Busy: no slot now; come back after its `retry_after`.
            RunOver: there will be no more rounds.
            NotFound: there is no such run.
        """
        return self._json("POST", f"/runs/{_segment(run)}/leases", request, Lease)

    def thresholds(self, run: str, version: int, layout: ThresholdLayout) -> Thresholds:
        """Returns the run's global thresholds of `version`.

        Raises:
            NotFound: the run has no such version.
            BadAnswer: the body is not thresholds of that version for `layout`.
        """
        path = f"/runs/{_segment(run)}/thresholds/{version}"
        body = self.request("GET", path, limit=max_body_bytes(layout), headers={"Accept": MEDIA_TYPE})
        try:
            thresholds = decode_thresholds(layout, body)
        except WireError as error:
            raise BadAnswer(f"GET {path}: {error}") from error
        if thresholds.version != version:
            raise BadAnswer(f"GET {path}: got thresholds of version {thresholds.version}")
        return thresholds

    def report(self, run: str, round: int, device: str, body: bytes, metrics: str) -> None:
        """Returns nothing once the server counts the update; the same bytes again count once.

        body      local thresholds as `spafl.wire` bytes, of the round's version
        metrics   `spafl.protocol.Metrics` as one line of JSON

        Raises:
            RoundClosed: too late, the round or the lease is over.
            NotLeased: this device holds no lease of that round.
            UpdateDiffers: the round counted another update of this device.
            Refused: the server finds the update itself wrong.
        """
        path = f"/runs/{_segment(run)}/rounds/{round}/updates/{_segment(device)}"
        headers = {"Content-Type": MEDIA_TYPE, METRICS_HEADER: metrics}
        self.request("PUT", path, content=body, headers=headers)

    def request(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        limit: int = MAX_JSON_BYTES,
        token: Secret | None = None,
        repeatable: bool = True,
    ) -> bytes:
        """Returns the body of the successful answer to a request, repeated with backoff while that can help.

        limit        most bytes the body may have
        token        sent instead of the device's
        repeatable   False: repeat only if the server surely did nothing

        Raises:
            ServerError: the branch that fits the last answer, or `Unreachable`.
        """
        for attempt in range(self._backoff.attempts):
            try:
                with self.stream(method, path, content=content, headers=headers, token=token) as response:
                    return bounded_body(response, limit)
            except Unreachable as error:
                last = error
                if not repeatable and not isinstance(
                    error.__cause__, httpx2.ConnectError | httpx2.ConnectTimeout
                ):
                    break
            self.pause(attempt, last)
        raise last

    def pause(self, attempt: int, error: Unreachable) -> None:
        """Returns after the wait that `error` asks for following 0-based `attempt`.

        Raises:
            Unreachable: `error`, if this was the last attempt or the server names a time too far away.
        """
        if attempt + 1 >= self._backoff.attempts or (error.retry_after or 0) > MAX_WAIT:
            raise error
        self.wait(self._backoff.delay(attempt, random.random(), error.retry_after))

    @contextmanager
    def stream(
        self,
        method: str,
        path: str,
        *,
        content: bytes | None = None,
        headers: Mapping[str, str] | None = None,
        token: Secret | None = None,
    ) -> Iterator[httpx2.Response]:
        """Yields one answer below 400, its body unread; asks once.

        Raises:
            Unreachable: no connection, a timeout, or a status that may pass (408, 425, 429, 5xx).
            ServerError: the branch that fits any other status.
        """
        self.wait(0)
        headers = {**_bearer(token or self._token), **(headers or {})}
        try:
            with self._http.stream(method, path, content=content, headers=headers) as response:
                if response.status_code >= 300:
                    raise refusal(response)
                yield response
        except httpx2.TransportError as error:
            where = f"{method} {self.server}{PREFIX}{path}"
            raise Unreachable(f"{where}: {type(error).__name__}: {error}") from error

    def _json(
        self,
        method: str,
        path: str,
        message: Record | None,
        answer: type[_Answer],
        *,
        token: Secret | None = None,
        repeatable: bool = True,
    ) -> _Answer:
        content = None if message is None else message.to_text().encode()
        headers = {"Accept": "application/json"}
        if content is not None:
            headers["Content-Type"] = "application/json"
        body = self.request(
            method, path, content=content, headers=headers, token=token, repeatable=repeatable
        )
        try:
            return answer.from_text(body)
        except RecordError as error:
            raise BadAnswer(
                f"{method} {path}: not the {answer.__name__} expected ({error}): is {self.server} a "
                "spafl server of this version?"
            ) from None


def _bearer(secret: Secret | None) -> dict[str, str]:
    if secret is None:
        return {}
    value = secret.reveal()
    if not (
        value.isascii() and value.isprintable() and value
    ):  # else the HTTP library would quote it in its error
        raise SettingsError(
            "the token or enrolment key is empty or holds characters that no header can carry"
        )
    return {"Authorization": f"Bearer {value}"}


def _segment(text: str) -> str:
    return quote(text, safe="")
