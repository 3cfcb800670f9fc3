"""The operator's client where a server is slow, away, rude or another thing altogether."""

import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest

from server_api.operator.client import (
    ATTEMPTS,
    LONGEST_WAIT,
    MAX_ANSWER_BYTES,
    RECONNECTIONS,
    OperatorClient,
    Refused,
    Unreachable,
)
from spafl.bundle import write_bundle
from spafl.errors import BundleError, SettingsError
from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import InputSpec, Manifest, StateTensor, TrainStep
from spafl.protocol import RunSettings
from spafl.secret import Secret

TOKEN = "spafl-admin-very-secret-token"
RUN = {
    "run": "demo",
    "settings": {"name": "demo", "bundle": "0" * 64},
    "state": "running",
    "layout": "0" * 16,
    "round": 1,
    "version": 0,
    "created": 1.0,
    "rounds_done": 0,
    "rounds_failed": 0,
}
Handler = Callable[[httpx2.Request], httpx2.Response]


class Server:
    """Answers from a script, one entry per request; an exception is raised instead of answering."""

    def __init__(self, *answers: httpx2.Response | Exception) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.waits: list[float] = []

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        answer = self.answers.pop(0)
        if isinstance(answer, Exception):
            raise answer
        return answer

    def client(self) -> OperatorClient:
        return OperatorClient(
            "http://server:8000/",
            Secret(TOKEN),
            transport=httpx2.MockTransport(self),
            sleep=self.waits.append,
        )


def ok(body: Any = RUN) -> httpx2.Response:
    return httpx2.Response(200, json=body)


def problem(status: int, word: str, detail: str = "do this", **more: Any) -> httpx2.Response:
    body = {"type": f"urn:spafl:problem:{word}", "title": "No", "status": status, "detail": detail, **more}
    return httpx2.Response(status, json=body, headers={"Content-Type": "application/problem+json"})


def event(id: int, kind: str, **more: Any) -> str:
    data = json.dumps({"id": id, "time": 1.0, "run": "demo", "kind": kind, **more})
    return f"id: {id}\nevent: {kind}\ndata: {data}\n\n"


def stream(*pieces: str | Exception) -> httpx2.Response:
    class Pieces(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            for piece in pieces:
                if isinstance(piece, Exception):
                    raise piece
                yield piece.encode()

    return httpx2.Response(200, headers={"Content-Type": "text/event-stream"}, stream=Pieces())


def test_the_token_travels_in_its_header_and_nowhere_else() -> None:
    server = Server(ok(), ok())
    with server.client() as client:
        client.run("demo")
        client.steer("demo", "start")
        assert TOKEN not in repr(client)
    for request in server.requests:
        assert request.headers["Authorization"] == f"Bearer {TOKEN}"
        assert TOKEN not in str(request.url)
    assert [f"{request.method} {request.url.path}" for request in server.requests] == [
        "GET /v1/runs/demo",
        "POST /v1/runs/demo/start",
    ]


def test_a_name_cannot_reach_another_path() -> None:
    server = Server(ok())
    server.client().run("../devices?x=1#")
    assert server.requests[0].url.raw_path == b"/v1/runs/..%2Fdevices%3Fx%3D1%23"


def test_a_problem_is_one_clear_sentence() -> None:
    with pytest.raises(Refused) as caught:
        Server(problem(409, "wrong-state", "run demo is finished")).client().steer("demo", "start")
    assert str(caught.value) == "No: run demo is finished (409 wrong-state)"


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        (
            httpx2.Response(404, text="<html>nginx</html>"),
            "GET /v1/runs/demo: 404 Not Found.*is this a spafl server",
        ),
        (httpx2.Response(302, headers={"Location": "http://evil/"}), "302 Found"),
        (httpx2.Response(500, text="oops"), "500 Internal Server Error"),
        (ok({"hello": "world"}), "not an answer of a spafl server of this version: run"),
        (httpx2.Response(200, text="hello"), "not an answer"),
        (httpx2.Response(200, stream=httpx2.ByteStream(b" " * (MAX_ANSWER_BYTES + 1))), "more than"),
    ],
)
def test_what_no_spafl_server_says_is_refused_at_once(answer: httpx2.Response, text: str) -> None:
    server = Server(answer)
    with pytest.raises(Refused, match=text):
        server.client().run("demo")
    assert len(server.requests) == 1


@pytest.mark.parametrize(
    "failure",
    [
        httpx2.ConnectError("refused"),
        httpx2.ReadTimeout("slow"),
        httpx2.RemoteProtocolError("closed"),
        problem(503, "store-busy"),
        httpx2.Response(502, text="bad gateway"),
        httpx2.Response(429, text="slow down"),
    ],
)
def test_what_may_pass_is_asked_again(failure: httpx2.Response | Exception) -> None:
    server = Server(failure, failure, ok())
    assert server.client().run("demo").run == "demo"
    assert len(server.waits) == 2


def test_it_gives_up_with_the_reason_and_the_next_step() -> None:
    server = Server(*[httpx2.ConnectError("refused")] * ATTEMPTS)
    with pytest.raises(
        Unreachable, match=r"http://server:8000 to GET /v1/runs/demo \(ConnectError: refused\).*--server"
    ):
        server.client().run("demo")
    assert len(server.requests) == ATTEMPTS
    assert len(server.waits) == ATTEMPTS - 1
    assert all(0 <= wait <= LONGEST_WAIT for wait in server.waits)


def test_it_waits_as_long_as_the_server_asks_within_reason() -> None:
    server = Server(problem(503, "x", retry_after=7.5), problem(503, "x", retry_after=1e9), ok())
    server.client().run("demo")
    assert server.waits[0] >= 7.5
    assert server.waits[1] == LONGEST_WAIT


@pytest.mark.parametrize(
    "url",
    [
        "",
        "server",
        "server:8000",
        "ftp://server",
        "http://",
        "http://user:pass@server",
        "http://server?x=1",
        "http://server:port",
    ],
)
def test_a_url_that_cannot_be_used_is_refused(url: str) -> None:
    with pytest.raises(SettingsError) as caught:
        OperatorClient(url, Secret(TOKEN))
    assert "pass" not in str(caught.value)


def test_create_sends_every_setting() -> None:
    server, settings = Server(ok()), RunSettings(name="demo", bundle="0" * 64, rounds=3, precision="f16")
    server.client().create(settings)
    assert RunSettings.from_text(server.requests[0].content) == settings


def test_rounds_are_asked_for_page_by_page() -> None:
    def page(*numbers: int) -> httpx2.Response:
        fixed = {"run": "demo", "state": "aggregated", "version": 0, "opened": 0, "deadline": 1, "leased": 1}
        return ok(
            [{**fixed, "round": number, "reported": 1, "target": 1, "minimum": 1} for number in numbers]
        )

    server = Server(page(1, 2), page(3), page())
    assert [view.round for view in server.client().rounds("demo")] == [1, 2, 3]
    assert [request.url.params["after"] for request in server.requests] == ["0", "2", "3"]
    stuck = Server(page(1, 2), page(1, 2))
    assert len(stuck.client().rounds("demo")) == 2


# ---- bundles


@pytest.fixture
def manifest() -> Manifest:
    layout = ThresholdLayout.of([Layer("fc", "linear", out=2, n_in=3, n_scale=3, offset=0)])
    return Manifest(
        name="tiny",
        layout=layout,
        state=(
            StateTensor(name="fc.weight", shape=(2, 3), role="weight", layer="fc"),
            StateTensor(name="fc.threshold", shape=(2,), role="threshold", layer="fc"),
        ),
        input=InputSpec(shape=(1, 1, 3), mean=(0.0,), std=(1.0,)),
        labels=("a", "b"),
        train_step=TrainStep(form="dense", reason="test"),
        compaction=(),
        engines={},
        files={},
        producer={},
    )


@pytest.mark.parametrize("name", ["bundle.zip", "bundle"])
def test_a_bundle_is_uploaded_whole_by_every_attempt(tmp_path: Path, manifest: Manifest, name: str) -> None:
    write_bundle(tmp_path / name, manifest, {"a.bin": bytes(3 << 20)})
    packed = write_bundle(tmp_path / "packed.zip", manifest, {"a.bin": bytes(3 << 20)})
    view = {"id": packed.id, "name": "tiny", "layout": "0" * 16, "thresholds": 2, "bytes": 1, "created": 0}
    server = Server(httpx2.ConnectError("refused"), httpx2.Response(201, json=view))
    assert server.client().upload(tmp_path / name).id == packed.id
    for request in server.requests:
        assert request.content == packed.path.read_bytes()
        assert request.headers["Content-Type"] == "application/zip"
        assert request.headers["Content-Length"] == str(len(request.content))


def test_a_damaged_bundle_is_not_sent(tmp_path: Path) -> None:
    (tmp_path / "a.zip").write_bytes(b"not a zip")
    server = Server()
    with pytest.raises(BundleError):
        server.client().upload(tmp_path / "a.zip")
    assert not server.requests


# ---- events


def test_events_end_with_the_run() -> None:
    server = Server(stream(event(1, "run.created"), event(2, "run.finished"), event(3, "run.created")))
    assert [event.id for event in server.client().events("demo")] == [1, 2]
    assert server.requests[0].headers["Last-Event-ID"] == "0"


def test_a_broken_stream_is_taken_up_where_it_broke() -> None:
    first = event(1, "run.created") + event(2, "run.started")
    server = Server(
        stream(first[:-40]),  # torn within the second event
        stream(event(2, "run.started"), httpx2.ReadError("reset")),
        httpx2.ConnectError("restarting"),
        stream(event(2, "run.started"), event(3, "run.stopped")),  # and one repeated by a careless server
    )
    assert [event.id for event in server.client().events("demo")] == [1, 2, 3]
    assert [request.headers["Last-Event-ID"] for request in server.requests] == ["0", "1", "2", "2"]


def test_a_silent_stream_is_not_a_failure() -> None:
    quiet = [stream(": ping\n\n", httpx2.ReadTimeout("quiet")) for _ in range(3 * ATTEMPTS)]
    server = Server(*quiet, stream(event(1, "run.finished")))
    assert [event.id for event in server.client().events("demo")] == [1]
    assert server.waits == []


def test_a_server_that_stays_away_ends_the_stream() -> None:
    never = Server(*[httpx2.ConnectError("refused")] * ATTEMPTS)
    with pytest.raises(Unreachable):
        list(never.client().events("demo"))
    assert len(never.requests) == ATTEMPTS
    known = Server(stream(event(1, "run.created")), *[httpx2.ConnectError("refused")] * RECONNECTIONS)
    with pytest.raises(Unreachable):
        list(known.client().events("demo"))
    assert len(known.requests) == RECONNECTIONS
    assert 60 < sum(known.waits) < 300  # a server that restarts has come back by then


def test_streams_that_end_at_once_are_not_asked_for_ever() -> None:
    server = Server(*[stream() for _ in range(ATTEMPTS)])
    with pytest.raises(Unreachable, match="ended before the run did"):
        list(server.client().events("demo"))


@pytest.mark.parametrize(
    "answer", [stream("data: {}\n\n"), stream("data: not json\n\n"), stream(event(1, "run.exploded"))]
)
def test_events_that_are_none_are_refused(answer: httpx2.Response) -> None:
    with pytest.raises(Refused, match="not an answer of a spafl server"):
        list(Server(answer).client().events("demo"))


def test_an_unknown_run_has_no_events() -> None:
    with pytest.raises(Refused, match="404 not-found"):
        list(Server(problem(404, "not-found")).client().events("demo"))


def test_a_page_instead_of_events_is_not_read_for_ever() -> None:
    pages = [httpx2.Response(200, html="<html>hello</html>") for _ in range(ATTEMPTS)]
    with pytest.raises(Unreachable, match="text/event-stream"):
        list(Server(*pages).client().events("demo"))
