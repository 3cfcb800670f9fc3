"""The protocol's operator half over HTTP: typed answers, one clear sentence for every refusal."""

import random
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from types import TracebackType
from typing import Any, Literal, Self, TypeAlias, TypeVar
from urllib.parse import quote

import httpx2

from spafl import __version__
from spafl.bundle import Bundle, write_bundle
from spafl.errors import SettingsError, SpaflError
from spafl.protocol import PREFIX, BundleView, Event, Problem, RoundView, RunSettings, RunView
from spafl.record import Record, RecordError, parsed_json
from spafl.secret import Secret

Action: TypeAlias = Literal["start", "pause", "resume", "stop"]

TIMEOUT = httpx2.Timeout(10.0, read=60.0)
ATTEMPTS = 5
RECONNECTIONS = 30
"""Attempts to take up a broken stream of events: some two minutes, in which a server is updated and restarted."""
FIRST_WAIT, LONGEST_WAIT = 0.5, 10.0
"""Seconds before the second attempt, doubled by each, drawn uniformly from 0 to that (full jitter); at most so many."""

MAX_ANSWER_BYTES = 64 << 20
_PIECE = 1 << 20
_PASSING = frozenset({408, 425, 429, 502, 503, 504})
_Answer = TypeVar("_Answer", bound=Record)


class Refused(SpaflError):  # noqa: N818 - an answer, not a fault
    """The server answered, and the answer is no."""


class Unreachable(SpaflError):  # noqa: N818
    """The server did not answer, or only that it cannot now. Worth asking again.

    after   seconds the server asks to wait, None if it named none
    """

    def __init__(self, message: str, after: float | None = None) -> None:
        super().__init__(message)
        self.after = after


class OperatorClient:
    """An operator's connection to one server; close it, or use it in a `with`.

    Every request here may be repeated without harm (PROTOCOL.md, retries), and is while that can help.

    server      base URL, http or https
    token       the admin token
    transport   where requests go instead of the network, for tests
    sleep       waits that many seconds
    """

    def __init__(
        self,
        server: str,
        token: Secret,
        *,
        transport: httpx2.BaseTransport | None = None,
        sleep: Callable[[float], None] = time.sleep,
    ) -> None:
        self.server = _checked(server)
        self._token = token
        self._sleep = sleep
        self._http = httpx2.Client(
            base_url=self.server + PREFIX,
            headers={"User-Agent": f"spafl/{__version__}", "Accept-Encoding": "identity"},
            timeout=TIMEOUT,
            transport=transport,
        )

    def __repr__(self) -> str:
        return f"OperatorClient({self.server!r})"

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._http.close()

    def upload(self, path: Path) -> BundleView:
        """Returns the bundle at `path`, a .zip or a directory, as the server now holds it.

        Raises:
            BundleError: it is damaged; found before anything is sent.
        """
        bundle = Bundle.open(path)
        if not path.is_dir():
            return self._upload(path)
        with TemporaryDirectory(prefix="spafl-") as folder:
            packed = Path(folder) / "bundle.zip"
            write_bundle(packed, bundle.manifest, {name: bundle.read(name) for name in bundle.manifest.files})
            return self._upload(packed)

    def create(self, settings: RunSettings) -> RunView:
        """Returns the run of `settings`: new, or the one that already is exactly so."""
        headers = {"Content-Type": "application/json"}
        return self._one(RunView, "POST", "/runs", content=settings.to_text().encode(), headers=headers)

    def runs(self) -> list[RunView]:
        """Returns every run."""
        return self._many(RunView, "/runs")

    def run(self, run: str) -> RunView:
        """Returns the run of that name."""
        return self._one(RunView, "GET", f"/runs/{_segment(run)}")

    def steer(self, run: str, action: Action) -> RunView:
        """Returns the run after `action`; a run that is already there stays as it is."""
        return self._one(RunView, "POST", f"/runs/{_segment(run)}/{action}")

    def rounds(self, run: str) -> list[RoundView]:
        """Returns every round of the run, the oldest first; asked for page by page."""
        rounds: list[RoundView] = []
        while True:
            after = rounds[-1].round if rounds else 0
            page = self._many(RoundView, f"/runs/{_segment(run)}/rounds?after={after}")
            if not page or page[-1].round <= after:  # the latter only from a server that pages wrongly
                return rounds
            rounds += page

    def round(self, run: str, round: int) -> RoundView:
        """Returns one round of the run."""
        return self._one(RoundView, "GET", f"/runs/{_segment(run)}/rounds/{round}")

    def close_round(self, run: str, round: int) -> RoundView:
        """Returns the round, closed now: aggregated if anyone reported, else failed."""
        return self._one(RoundView, "POST", f"/runs/{_segment(run)}/rounds/{round}/close")

    def events(self, run: str, after: int = 0) -> Iterator[Event]:
        """Yields the run's events with ids above `after`, then those to come; ends with the run.

        A broken stream is taken up again after the last event seen: none is lost, none comes twice.

        Raises:
            Unreachable: `ATTEMPTS` times in a row nothing came, `RECONNECTIONS` times after the first event.
        """
        failures, attempts = 0, ATTEMPTS
        while True:
            try:
                for event in self._stream(run, after):
                    if event.id > after:
                        after, failures, attempts = event.id, 0, RECONNECTIONS
                        yield event
                        if event.kind in ("run.finished", "run.stopped"):
                            return
                failures = 0
            except Unreachable as error:
                failures += 1
                self._pause(failures, error, attempts)

    def _stream(self, run: str, after: int) -> Iterator[Event]:
        """Yields events until the connection has been silent for a while: then it may be dead without a sign."""
        headers = self._bearer() | {"Accept": "text/event-stream", "Last-Event-ID": str(after)}
        path = f"/runs/{_segment(run)}/events"
        try:
            with self._http.stream("GET", path, headers=headers) as response:
                _check(response)
                try:
                    for message in httpx2.EventSource(response):
                        if message.data:
                            yield _parsed(Event, message.data.encode(), path)
                except httpx2.ReadTimeout:
                    return
            raise Unreachable(f"the events of run {run} ended before the run did")
        except httpx2.TransportError as error:
            raise self._unreachable("GET", path, error) from error

    def _upload(self, path: Path) -> BundleView:
        size = str(path.stat().st_size)
        return self._one(
            BundleView,
            "POST",
            "/bundles",
            content=lambda: _pieces(path),
            headers={"Content-Type": "application/zip", "Content-Length": size},
        )

    def _one(self, kind: type[_Answer], method: str, path: str, **request: Any) -> _Answer:
        return _parsed(kind, self._request(method, path, **request), path)

    def _many(self, kind: type[_Answer], path: str) -> list[_Answer]:
        return _parsed_list(kind, self._request("GET", path), path)

    def _request(
        self,
        method: str,
        path: str,
        content: bytes | Callable[[], Iterator[bytes]] | None = None,
        headers: dict[str, str] | None = None,
    ) -> bytes:
        headers = {**self._bearer(), **(headers or {})}
        failures = 0
        while True:
            body = content() if callable(content) else content  # a stream is read afresh by every attempt
            try:
                with self._http.stream(method, path, content=body, headers=headers) as response:
                    _check(response)
                    return _bounded(response)
            except (httpx2.TransportError, Unreachable) as error:
                failures += 1
                unreachable = (
                    error if isinstance(error, Unreachable) else self._unreachable(method, path, error)
                )
                self._pause(failures, unreachable)

    def _pause(self, failures: int, error: Unreachable, attempts: int = ATTEMPTS) -> None:
        if failures >= attempts:
            raise error
        wait = random.uniform(0, min(LONGEST_WAIT, FIRST_WAIT * 2 ** (failures - 1)))
        self._sleep(max(wait, min(error.after or 0, LONGEST_WAIT)))

    def _bearer(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self._token.reveal()}"}

    def _unreachable(self, method: str, path: str, error: Exception) -> Unreachable:
        return Unreachable(
            f"no answer from {self.server} to {method} {PREFIX}{path} ({type(error).__name__}: {error}): "
            "is the server running, and is --server right?"
        )


def _checked(server: str) -> str:
    try:
        url = httpx2.URL(server)
    except httpx2.InvalidURL as error:
        raise SettingsError(f"server {server!r} is not a usable URL: {error}") from error
    if url.scheme not in ("http", "https") or not url.host:
        raise SettingsError(f"server {server!r} is not a URL: expected http://host:port or https://host")
    if url.userinfo or url.query or url.fragment:
        raise SettingsError(
            "the server's URL may hold no user, query or fragment: the token is given apart from it"
        )
    return server.rstrip("/")


def _segment(name: str) -> str:
    return quote(name, safe="")


def _pieces(path: Path) -> Iterator[bytes]:
    with path.open("rb") as stream:
        while piece := stream.read(_PIECE):
            yield piece


def _bounded(response: httpx2.Response) -> bytes:
    body = bytearray()
    for piece in response.iter_bytes():
        body += piece
        if len(body) > MAX_ANSWER_BYTES:
            raise Refused(f"{response.request.url.path}: an answer of more than {MAX_ANSWER_BYTES} bytes")
    return bytes(body)


def _check(response: httpx2.Response) -> None:
    if response.status_code < 300:
        return
    body, status = _bounded(response), response.status_code
    where = f"{response.request.method} {response.request.url.path}"
    try:
        problem = Problem.from_text(body)
    except RecordError:
        text, after = (
            f"{where}: {status} {response.reason_phrase}, and no word why: is this a spafl server?",
            None,
        )
    else:
        text, after = (
            f"{problem.title}: {problem.detail} ({status} {problem.type.rpartition(':')[2]})",
            problem.retry_after,
        )
    raise Unreachable(text, after) if status in _PASSING else Refused(text)


def _parsed(kind: type[_Answer], body: bytes, path: str) -> _Answer:
    try:
        return kind.from_text(body)
    except RecordError as error:
        raise _not_understood(error, path) from error


def _parsed_list(kind: type[_Answer], body: bytes, path: str) -> list[_Answer]:
    try:
        parsed = parsed_json(body)
        if not isinstance(parsed, list):
            raise RecordError("expected a list")
        return [kind.from_json(value) for value in parsed]
    except RecordError as error:
        raise _not_understood(error, path) from error


def _not_understood(error: RecordError, path: str) -> Refused:
    return Refused(f"{PREFIX}{path}: not an answer of a spafl server of this version: {error}")
