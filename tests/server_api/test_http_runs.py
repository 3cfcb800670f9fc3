"""Runs, rounds, leases and events over HTTP, in the times of a clock that the test moves."""

import json

import pytest

from server_api.app import create_app
from server_api.settings import Settings
from spafl.protocol import Event, Lease, RoundView, RunView


def settle(server) -> None:
    server.app.state.coordinator.settle()


def events(server, after: int = 0) -> list[Event]:
    answer = server.get("/runs/run/events?follow=false", **{"Last-Event-ID": str(after)})
    assert answer.headers["content-type"].startswith("text/event-stream")
    found = []
    for block in answer.text.strip().split("\n\n"):
        lines = dict(line.split(": ", 1) for line in block.splitlines() if line)
        if lines:
            found.append(Event.from_text(lines["data"]))
            assert (lines["id"], lines["event"]) == (str(found[-1].id), found[-1].kind)
    return found


def test_the_same_settings_again_are_the_same_run_and_others_are_refused(server):
    server.upload()
    first = server.create(target=3)
    again = server.create(target=3)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()
    other = server.create(target=4)
    assert (other.status_code, other.json()["type"]) == (409, "urn:spafl:problem:name-taken")
    RunView.from_json(first.json())


@pytest.mark.parametrize(
    ("settings", "reason"),
    [
        ({"target": 2, "minimum": 3}, "minimum 3 is more than target 2"),
        ({"target": 0}, "body.target"),
        ({"target": "5"}, "body.target"),
        ({"rounds": True}, "body.rounds"),
        ({"deadline": 0}, "body.deadline"),
        ({"weighting": "median"}, "body.weighting"),
        ({"tarjet": 5}, "body.tarjet"),
        ({"hyperparameters": {"lr": -1}}, "body.hyperparameters.lr"),
    ],
)
def test_settings_that_make_no_sense(server, settings, reason):
    server.upload()
    answer = server.create(**settings)
    assert answer.status_code == 422
    assert reason in answer.json()["detail"]
    assert server.get("/runs").json() == []


def test_a_run_is_steered_and_says_where_it_is(server):
    server.upload()
    server.create()
    assert server.steer("pause").json()["type"] == "urn:spafl:problem:wrong-state"
    for action, state, round in (
        ("start", "running", 1),
        ("start", "running", 1),
        ("pause", "paused", 1),
        ("resume", "running", 1),
        ("stop", "stopped", None),
    ):
        answer = server.steer(action)
        assert (answer.status_code, answer.json()["state"], answer.json()["round"]) == (200, state, round)
    assert server.steer("resume").status_code == 409
    assert server.steer("start", "nothing").status_code == 404


def test_a_lease_says_all_a_device_needs(server):
    schedule = {"epochs": 2, "lr": 0.1, "lr_decay": 0.5, "coeff": 0.01, "ramp": "fmnist"}
    server.start(rounds=4, target=1, lease=30, deadline=100, hyperparameters=schedule)
    device = server.enrol()
    server.lease(device)
    server.report(device, server.body())
    lease = Lease.from_json(server.lease(device).json())
    now = server.clock.now
    assert (lease.round, lease.version, lease.rounds) == (2, 1, 4)
    assert (lease.expires, lease.deadline) == (now + 30, now + 100)
    assert (lease.bundle, lease.layout) == (server.bundle.id, server.layout.id)
    # the second of four rounds: the schedule is worked in
    assert lease.hyperparameters.lr == pytest.approx(0.05)
    assert lease.hyperparameters.lr_decay == 1
    assert lease.hyperparameters.coeff == pytest.approx(0.01 / (1 + 2.718281828459045**2.5))


def test_a_device_that_asks_again_gets_the_lease_it_has(server):
    server.start()
    device = server.enrol()
    first = server.lease(device)
    server.clock.now += 10
    again = server.lease(device)
    assert (first.status_code, again.status_code) == (201, 200)
    assert first.json() == again.json()


@pytest.mark.parametrize(
    ("prepare", "status", "word"),
    [
        (lambda server, device: None, 503, "run-not-started"),
        (lambda server, device: [server.steer("start"), server.steer("pause")], 503, "run-paused"),
        (lambda server, device: [server.steer("start"), server.lease(server.enrol())], 503, "round-full"),
    ],
)
def test_devices_that_must_wait_are_told_when_to_come_back(server, prepare, status, word):
    server.upload()
    server.create(target=1)
    device = server.enrol()
    prepare(server, device)
    delays = set()
    for _ in range(5):
        answer = server.lease(device)
        assert (answer.status_code, answer.json()["type"]) == (status, f"urn:spafl:problem:{word}")
        delay = answer.json()["retry_after"]
        # the setting's 5 seconds, give or take half
        assert 2.5 <= delay <= 7.5
        assert delay <= int(answer.headers["retry-after"]) < delay + 1
        delays.add(delay)
    assert len(delays) > 1, "everybody would come back at once"


def test_a_device_that_reported_waits_for_the_next_round(server):
    server.start(target=2)
    device = server.enrol()
    server.lease(device)
    server.report(device, server.body())
    answer = server.lease(device)
    assert (answer.status_code, answer.json()["type"]) == (409, "urn:spafl:problem:already-reported")
    assert "retry-after" in answer.headers


def test_the_clock_alone_closes_rounds(server):
    server.start(target=4, minimum=2, deadline=100, lease=1000)
    devices = [server.enrol() for _ in range(3)]
    for device in devices:
        server.lease(device)
    server.report(devices[0], server.body(1.0))
    server.clock.now += 101
    settle(server)
    assert server.round()["extended"] is True
    server.report(devices[1], server.body(3.0))
    server.clock.now += 101
    settle(server)
    view = RoundView.from_json(server.round())
    assert (view.state, view.reported, view.leased) == ("aggregated", 2, 3)
    assert server.report(devices[2], server.body()).json()["type"] == "urn:spafl:problem:round-closed"


def test_rounds_nobody_reports_in_pause_the_run(server):
    server.start(target=1, deadline=10)
    for _ in range(6):
        server.clock.now += 11
        settle(server)
    run = server.get("/runs/run").json()
    assert (run["state"], run["rounds_failed"], run["version"]) == ("paused", 3, 0)
    assert "3 rounds failed in a row" in str(events(server)[-1].data["reason"])


def test_rounds_are_listed_with_their_figures(server):
    server.start(target=2, rounds=3)
    for round in (1, 2):
        for loss in (1.0, 3.0):
            device = server.enrol()
            server.lease(device)
            body = server.body(version=round - 1)
            server.report(device, body, round, loss=loss, accuracy=0.5, density=[1.0, 0.5])
            if (round, loss) == (2, 1.0):
                break
    first, second = (RoundView.from_json(view) for view in server.get("/runs/run/rounds").json())
    assert (first.state, first.loss, first.accuracy, first.density) == ("aggregated", 2.0, 0.5, (1.0, 0.5))
    assert (second.state, second.loss, second.reported, second.leased) == ("open", 1.0, 1, 1)
    assert second.closed is None
    assert server.get("/runs/run/rounds?after=1").json() == [second.to_json()]
    assert server.get("/runs/run/rounds?limit=1").json() == [first.to_json()]
    assert server.get("/runs/run/rounds/2").json() == second.to_json()
    assert server.get("/runs/run/rounds/3").status_code == 404


def test_close_now(server):
    server.start(target=3)
    device = server.enrol()
    server.lease(device)
    server.report(device, server.body())
    closed = server.http.post("/v1/runs/run/rounds/1/close", headers=server.admin).json()
    assert (closed["state"], closed["reported"]) == ("aggregated", 1)
    again = server.http.post("/v1/runs/run/rounds/1/close", headers=server.admin)
    assert (again.status_code, again.json()) == (200, closed)
    failed = server.http.post("/v1/runs/run/rounds/2/close", headers=server.admin).json()
    assert (failed["state"], failed["reason"]) == ("failed", "closed without any update")


def test_events_tell_the_story_and_resume_where_they_were_left(server):
    server.start(target=1, rounds=1)
    device = server.enrol()
    server.lease(device)
    server.report(device, server.body(), examples=12)
    told = events(server)
    assert [event.kind for event in told] == [
        "run.created",
        "run.started",
        "round.opened",
        "lease.granted",
        "update.accepted",
        "round.aggregated",
        "run.finished",
    ]
    assert [event.id for event in told] == list(range(1, 8))
    assert (told[4].device, told[4].round, told[4].data) == (device.id, 1, {"examples": 12})
    assert events(server, after=5) == told[5:]
    assert events(server, after=7) == []


def test_more_events_than_a_page(server, monkeypatch):
    monkeypatch.setattr("server_api.routes.events.PAGE", 3)
    server.start()
    for _ in range(4):
        server.lease(server.enrol())
    assert [event.id for event in events(server)] == list(range(1, 8))


def test_events_of_no_run(server):
    answer = server.get("/runs/none/events")
    assert (answer.status_code, answer.headers["content-type"]) == (404, "application/problem+json")


def test_devices_are_listed_by_page(server):
    ids = sorted(server.enrol().id for _ in range(3))
    assert [view["device"] for view in server.get("/devices").json()] == ids
    assert [view["device"] for view in server.get(f"/devices?after={ids[0]}&limit=1").json()] == [ids[1]]
    assert all("token" not in json.dumps(view) for view in server.get("/devices").json())


def test_health_needs_no_token_and_versions_name_what_runs(server):
    assert server.http.get("/v1/-/health").json() == {"status": "ok"}
    versions = server.get("/-/versions").json()
    assert versions["protocol"] == "v1"
    assert versions["packages"].keys() >= {"fastapi", "sqlalchemy"}


def test_a_defect_is_a_problem_that_tells_nothing_of_the_inside(server, monkeypatch):
    def broken(*_: object) -> None:
        raise RuntimeError("secret detail")

    monkeypatch.setattr(server.store, "ping", broken)
    answer = server.http.get("/v1/-/health")
    assert (answer.status_code, answer.headers["content-type"]) == (500, "application/problem+json")
    assert "secret detail" not in answer.text


@pytest.mark.parametrize(
    ("method", "path", "status"),
    [("GET", "/", 404), ("GET", "/v1/nothing", 404), ("GET", "/v1/runs/", 404), ("DELETE", "/v1/runs", 405)],
)
def test_the_frameworks_own_errors_are_problems_too(server, method, path, status):
    answer = server.http.request(method, path)
    assert (answer.status_code, answer.json()["status"]) == (status, status)
    assert answer.headers["content-type"] == "application/problem+json"
    if status == 405:
        assert answer.headers["allow"] == "GET, POST"


def test_an_app_made_of_settings_alone_opens_its_own_store(tmp_path):
    from starlette.testclient import TestClient

    with TestClient(create_app(Settings.given(data=tmp_path / "new"))) as http:
        assert http.get("/v1/-/health").status_code == 200
    assert (tmp_path / "new" / "server.db").is_file()
