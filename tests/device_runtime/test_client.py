import logging
from collections.abc import Callable, Iterator

import httpx2
import numpy as np
import pytest

from device_runtime import errors
from device_runtime.client import Client
from device_runtime.retry import Backoff
from spafl.bundle import Bundle
from spafl.errors import SettingsError
from spafl.protocol import EnrolmentRequest, LeaseRequest
from spafl.secret import Secret
from spafl.wire import Thresholds, encode_thresholds, max_body_bytes
from tests.device_runtime.tiny import LAYOUT, TOKEN, FileServer, json_answer, make_lease, problem, reply

KEY = "enrolment-key-Qx7"


class Wire:
    """A transport that answers from a list, the last answer for ever, and remembers requests and waits."""

    def __init__(self, *answers: httpx2.Response | Exception | Callable[[], httpx2.Response]) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.waits: list[float] = []

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        return answer if isinstance(answer, httpx2.Response) else answer()

    def client(self, attempts: int = 4) -> Client:
        backoff = Backoff(first=1.0, cap=8.0, attempts=attempts)
        return Client(
            "http://server/",
            Secret(TOKEN),
            transport=httpx2.MockTransport(self.handle),
            backoff=backoff,
            wait=lambda seconds: self.waits.append(seconds) if seconds else None,
        )


def test_a_lease_request_is_as_the_protocol_says(bundle: Bundle) -> None:
    wire = Wire(json_answer(201, make_lease(bundle)))
    lease = wire.client().lease("r", LeaseRequest(version=3))
    assert lease == make_lease(bundle)
    (request,) = wire.requests
    assert (request.method, request.url.path) == ("POST", "/v1/runs/r/leases")
    assert request.headers["Authorization"] == f"Bearer {TOKEN}"
    assert request.headers["Content-Type"] == "application/json"
    assert LeaseRequest.from_text(request.content) == LeaseRequest(version=3)


def test_enrolment_sends_the_key_and_keeps_the_token_masked() -> None:
    wire = Wire(lambda: reply(201, f'{{"device": "d7", "token": "{TOKEN}"}}'.encode()))
    identity = wire.client().enrol(Secret(KEY), EnrolmentRequest(name="kitchen"))
    assert wire.requests[0].headers["Authorization"] == f"Bearer {KEY}"
    assert (identity.device, identity.server) == ("d7", "http://server")
    assert identity.token.reveal() == TOKEN


@pytest.mark.parametrize(
    ("status", "word", "error"),
    [
        (409, "already-reported", errors.Busy),
        (503, "round-full", errors.Busy),
        (503, "run-paused", errors.Busy),
        (503, "run-not-started", errors.Busy),
        (410, "run-over", errors.RunOver),
        (410, "round-closed", errors.RoundClosed),
        (410, "lease-expired", errors.RoundClosed),
        (403, "not-leased", errors.NotLeased),
        (409, "update-differs", errors.UpdateDiffers),
        (422, "bad-thresholds", errors.Refused),
        (413, "too-large", errors.Refused),
        (401, "unauthorised", errors.Unauthorised),
        (403, "forbidden", errors.Unauthorised),
        (404, "unknown-run", errors.NotFound),
        (418, "a-word-of-tomorrow", errors.Refused),
    ],
)
def test_each_problem_is_its_error_at_once(status: int, word: str, error: type[errors.ServerError]) -> None:
    wire = Wire(problem(status, word))
    with pytest.raises(error, match=f"{status} {word}: about {word}") as caught:
        wire.client().report("r", 1, "d1", b"body", "{}")
    assert type(caught.value) is error
    assert len(wire.requests) == 1


@pytest.mark.parametrize("seconds", ["12", "Fri, 01 Jan 2100 00:00:00 GMT"])
def test_busy_says_when_to_come_back(seconds: str) -> None:
    wire = Wire(problem(503, "round-full", {"Retry-After": seconds}))
    with pytest.raises(errors.Busy) as caught:
        wire.client().lease("r", LeaseRequest())
    assert caught.value.retry_after == (12 if seconds == "12" else 86_400)


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("cut"),
        lambda: reply(502, b"<html>bad gateway"),
        lambda: problem(503, "overloaded"),
        lambda: reply(429),
    ],
)
def test_what_may_pass_is_tried_again_with_backoff(failure: Exception, bundle: Bundle) -> None:
    wire = Wire(failure, failure, json_answer(201, make_lease(bundle)))
    wire.client().lease("r", LeaseRequest())
    assert len(wire.requests) == 3
    assert len(wire.waits) == 2
    assert all(0 <= wait <= bound for wait, bound in zip(wire.waits, (1, 2), strict=True))


def test_retries_end() -> None:
    wire = Wire(httpx2.ConnectError("refused"))
    with pytest.raises(
        errors.Unreachable, match=r"POST http://server/v1/runs/r/leases: ConnectError: refused"
    ):
        wire.client(attempts=3).lease("r", LeaseRequest())
    assert len(wire.requests) == 3


def test_a_near_retry_after_is_waited_for_and_a_far_one_left_to_the_caller(bundle: Bundle) -> None:
    near = Wire(reply(503, headers={"Retry-After": "20"}), json_answer(201, make_lease(bundle)))
    near.client().lease("r", LeaseRequest())
    assert near.waits == [20]
    far = Wire(reply(503, headers={"Retry-After": "600"}))
    with pytest.raises(errors.Unreachable) as caught:
        far.client().lease("r", LeaseRequest())
    assert caught.value.retry_after == 600
    assert far.waits == []


def test_an_enrolment_that_may_have_arrived_is_not_repeated() -> None:
    wire = Wire(httpx2.ReadTimeout("slow"))
    with pytest.raises(errors.Unreachable):
        wire.client().enrol(Secret(KEY), EnrolmentRequest())
    assert len(wire.requests) == 1
    wire = Wire(httpx2.ConnectError("refused"))
    with pytest.raises(errors.Unreachable):
        wire.client(attempts=3).enrol(Secret(KEY), EnrolmentRequest())
    assert len(wire.requests) == 3


def test_waiting_can_be_abandoned() -> None:
    def stop(seconds: float) -> None:
        raise errors.Stopped("now")

    wire = Wire(httpx2.ConnectError("refused"))
    client = wire.client()
    client.wait = stop
    with pytest.raises(errors.Stopped):
        client.lease("r", LeaseRequest())


class Endless(httpx2.SyncByteStream):
    """A body without an end; `given` counts its bytes."""

    def __init__(self) -> None:
        self.given = 0

    def __iter__(self) -> Iterator[bytes]:
        while True:
            self.given += 1024
            yield b"\0" * 1024


def test_a_body_without_end_is_read_to_its_bound_only() -> None:
    body = Endless()
    wire = Wire(httpx2.Response(200, stream=body))
    with pytest.raises(errors.BadAnswer, match=f"more than the {max_body_bytes(LAYOUT)} bytes"):
        wire.client().thresholds("r", 1, LAYOUT)
    assert body.given <= max_body_bytes(LAYOUT) + 1024


def test_a_problem_without_end_is_bounded_too() -> None:
    body = Endless()
    with pytest.raises(errors.BadAnswer):
        Wire(httpx2.Response(400, stream=body)).client().lease("r", LeaseRequest())
    assert body.given <= (1 << 20) + 1024


def test_nothing_inflates_after_its_bound() -> None:
    wire = Wire(reply(200, b"\x1f\x8b...", {"Content-Encoding": "gzip"}))
    with pytest.raises(errors.BadAnswer, match="encoded as gzip"):
        wire.client().thresholds("r", 1, LAYOUT)
    assert wire.requests[0].headers["Accept-Encoding"] == "identity"


@pytest.mark.parametrize(
    "body", [b"", b"<html>log in to this network", b"{}", b'{"run": "r", "round": -1}', b"\xff"]
)
def test_answers_that_are_not_the_protocol_are_refused(body: bytes) -> None:
    with pytest.raises(errors.BadAnswer, match="not the Lease expected"):
        Wire(reply(200, body)).client().lease("r", LeaseRequest())


def test_redirects_are_not_followed_with_a_token() -> None:
    wire = Wire(reply(302, headers={"Location": "http://elsewhere/"}))
    with pytest.raises(errors.BadAnswer, match="302"):
        wire.client().lease("r", LeaseRequest())
    assert len(wire.requests) == 1


def test_thresholds_of_another_version_or_layout_are_refused() -> None:
    values = np.zeros(4, np.float32)
    body = encode_thresholds(LAYOUT, Thresholds(values, 6))
    assert np.array_equal(Wire(reply(200, body)).client().thresholds("r", 6, LAYOUT).values, values)
    with pytest.raises(errors.BadAnswer, match="version 6"):
        Wire(reply(200, body)).client().thresholds("r", 7, LAYOUT)
    with pytest.raises(errors.BadAnswer, match="thresholds"):
        Wire(reply(200, body[:-1])).client().thresholds("r", 6, LAYOUT)


def test_names_are_quoted_into_one_segment() -> None:
    wire = Wire(problem(404, "unknown-run"))
    with pytest.raises(errors.NotFound):
        wire.client().run("../devices?x=1#")
    assert wire.requests[0].url.raw_path == b"/v1/runs/..%2Fdevices%3Fx%3D1%23"


@pytest.mark.parametrize(
    "server",
    ["", "server:80", "ftp://server", "file:///etc/passwd", "http://[::1", "http://", "https:///path"],
)
def test_a_server_that_is_no_url_is_refused_in_words(server: str) -> None:
    with pytest.raises(SettingsError, match="URL"):
        Client(server)


def test_a_url_with_a_password_is_refused_without_showing_it() -> None:
    with pytest.raises(SettingsError, match="leave it out") as caught:
        Client("http://me:hunter2@server")
    assert "hunter2" not in str(caught.value)


@pytest.mark.parametrize("token", ["", "two\nlines", "naïve", "null\0"])
def test_a_token_no_header_can_carry_is_refused_unseen(token: str) -> None:
    client = Client("http://server", Secret(token), transport=httpx2.MockTransport(lambda _: reply(200)))
    with pytest.raises(SettingsError) as caught:
        client.run("r")
    assert not token or token not in str(caught.value)


def test_secrets_stay_out_of_reprs_urls_logs_and_errors(
    server: FileServer, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG)
    told = []
    for answer in (
        lambda: problem(401, "unauthorised"),
        lambda: reply(200, TOKEN.encode()),
        lambda: reply(500),
    ):
        wire = Wire(answer)
        client = wire.client(attempts=1)
        told += [repr(client), str(client)]
        for call in (
            lambda c=client: c.lease("r", LeaseRequest()),
            lambda c=client: c.enrol(Secret(KEY), EnrolmentRequest()),
        ):
            with pytest.raises(errors.ServerError) as caught:
                call()
            told += [
                repr(caught.value),
                str(caught.value),
                str(wire.requests[-1].url),
                repr(wire.requests[-1].headers),
            ]
    told.append(caplog.text)
    assert "HTTP Request" in caplog.text  # the library does log
    assert not [text for text in told if TOKEN in text or KEY in text]


def test_every_request_has_timeouts(bundle: Bundle) -> None:
    wire = Wire(json_answer(201, make_lease(bundle)))
    wire.client().lease("r", LeaseRequest())
    assert all(0 < seconds <= 30 for seconds in wire.requests[0].extensions["timeout"].values())
