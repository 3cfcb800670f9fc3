"""The server as a real process: killed in a round, stopped, restarted, and sent more than it takes."""

import socket
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import numpy as np
import pytest

from server_api.aggregation import Contribution, mean
from spafl.bundle import Bundle
from spafl.protocol import METRICS_HEADER
from spafl.wire import MEDIA_TYPE, Thresholds, encode_thresholds
from tests.server_api.local_server import small_bundle
from tests.server_api.process import ServerProcess

DEVICES = 24


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small.zip")


class Fleet:
    """A run's admin and devices: they keep their tokens and updates while servers come and go."""

    def __init__(self, server: ServerProcess, bundle: Bundle) -> None:
        self.admin, self.layout = server.started["admin_token"], bundle.manifest.layout
        settings = {"name": "run", "bundle": bundle.id, "rounds": 2, "target": DEVICES}
        with server.client(self.admin) as http:
            zip_type = {"Content-Type": "application/zip"}
            assert (
                http.post("/bundles", content=bundle.path.read_bytes(), headers=zip_type).status_code == 201
            )
            assert http.post("/runs", json=settings).status_code == 201
            assert http.post("/runs/run/start").status_code == 200
        rng = np.random.default_rng(7)
        self.tokens, self.values, self.examples = {}, {}, {}
        with server.client(server.started["enrolment_key"]) as http:
            for number in range(DEVICES):
                enrolled = http.post("/devices", json={}).json()
                device = enrolled["device"]
                self.tokens[device] = enrolled["token"]
                self.values[device] = rng.normal(size=self.layout.size).astype(np.float32)
                self.examples[device] = 10 + number

    def lease(self, server: ServerProcess) -> None:
        for token in self.tokens.values():
            with server.client(token) as http:
                assert http.post("/runs/run/leases", json={}).status_code in (200, 201)

    def report(self, server: ServerProcess, device: str) -> int:
        """Returns the status of the answer to the device's one update, 0 if none came."""
        headers = {"Content-Type": MEDIA_TYPE, METRICS_HEADER: f'{{"examples": {self.examples[device]}}}'}
        body = encode_thresholds(self.layout, Thresholds(self.values[device], 0))
        try:
            with server.client(self.tokens[device]) as http:
                return http.put(
                    f"/runs/run/rounds/1/updates/{device}", content=body, headers=headers
                ).status_code
        except httpx2.TransportError:
            return 0

    def expected(self) -> bytes:
        """Returns version 1 as it must be, whatever happened on the way."""
        contributions = (
            Contribution(device, self.examples[device], self.values[device]) for device in sorted(self.tokens)
        )
        return encode_thresholds(self.layout, Thresholds(mean(contributions, "examples"), 1))

    def check_finished(self, server: ServerProcess) -> None:
        with server.client(self.admin) as http:
            assert http.get("/runs/run/thresholds/1").content == self.expected()
            assert http.get("/runs/run/rounds/1").json()["reported"] == DEVICES
            kinds = [event["kind"] for event in self.events(http)]
            assert kinds.count("update.accepted") == DEVICES
            assert kinds.count("round.aggregated") == 1

    @staticmethod
    def events(http: httpx2.Client) -> list[dict[str, object]]:
        text = http.get("/runs/run/events?follow=false").text
        return [
            httpx2.Response(200, content=line[5:]).json()
            for line in text.splitlines()
            if line.startswith("data:")
        ]


@pytest.fixture
def data(tmp_path: Path) -> Path:
    return tmp_path / "data"


def test_killed_between_two_updates_the_round_ends_with_the_same_thresholds(data, bundle):
    server = ServerProcess.start(data)
    fleet = Fleet(server, bundle)
    fleet.lease(server)
    devices = list(fleet.tokens)
    for device in devices[: DEVICES // 2]:
        assert fleet.report(server, device) == 204
    server.kill()
    server = ServerProcess.start(data)
    assert server.started.keys() == {"url"}, "secrets are shown on the first start only"
    # leases survived too: nobody checks in again; the last of the first half missed its answer and repeats
    for device in devices[DEVICES // 2 - 1 :]:
        assert fleet.report(server, device) == 204
    fleet.check_finished(server)
    server.kill()


@pytest.mark.parametrize("answers", [1, 10])
def test_killed_under_fire_nothing_acknowledged_is_lost_and_nothing_counts_twice(data, bundle, answers):
    server = ServerProcess.start(data)
    fleet = Fleet(server, bundle)
    fleet.lease(server)
    gate = threading.Semaphore(answers)

    def report(device: str) -> int:
        status = fleet.report(server, device)
        if status == 204 and not gate.acquire(blocking=False):
            server.process.kill()
        return status

    with ThreadPoolExecutor(8) as pool:
        statuses = list(pool.map(report, fleet.tokens))
    server.kill()
    assert 0 in statuses, "the server outlived the fire: nothing was tested"
    server = ServerProcess.start(data)
    acknowledged = [device for device, status in zip(fleet.tokens, statuses, strict=True) if status == 204]
    with server.client(fleet.admin) as http:
        counted = {event["device"] for event in fleet.events(http) if event["kind"] == "update.accepted"}
    assert counted >= set(acknowledged)
    for device in fleet.tokens:
        assert fleet.report(server, device) == 204
    fleet.check_finished(server)
    server.kill()


@pytest.fixture
def server(data: Path) -> Iterator[ServerProcess]:
    server = ServerProcess.start(data)
    yield server
    if server.process.poll() is None:
        server.kill()


def test_sigterm_ends_streams_and_exits_clean(server, bundle):
    fleet = Fleet(server, bundle)
    with server.client(fleet.admin) as http, http.stream("GET", "/runs/run/events") as stream:
        lines = stream.iter_lines()
        assert next(line for line in lines if line.startswith("event:")) == "event: run.created"
        begun = time.monotonic()
        assert server.stop() == 0
        # well under the ten seconds granted to requests under way
        assert time.monotonic() - begun < 5
        list(lines)
    log = server.errors.read_text()
    assert "Traceback" not in log
    assert "round.opened" in log


def test_logs_hold_no_secrets(server, bundle):
    fleet = Fleet(server, bundle)
    fleet.lease(server)
    with server.client(fleet.admin) as http:
        http.get(f"/runs/run?token={fleet.admin}")
    server.stop()
    log = server.errors.read_text()
    for secret in (*server.started.values(), *fleet.tokens.values()):
        assert secret.removeprefix(server.started["url"]) == "" or secret not in log


def test_new_secrets_replace_the_old(server, data, bundle):
    old = server.started
    server.stop()
    server = ServerProcess.start(data, "--new-admin-token", "--new-enrolment-key")
    try:
        for secret, path in (("admin_token", "/devices"), ("enrolment_key", "/devices")):
            assert server.started[secret] != old[secret]
            method = "GET" if secret == "admin_token" else "POST"
            for token, expected in (
                (old[secret], 401),
                (server.started[secret], 200 if method == "GET" else 201),
            ):
                with server.client(token) as http:
                    body = {} if method == "POST" else None
                    assert http.request(method, path, json=body).status_code == expected
    finally:
        server.kill()


def test_secrets_from_the_environment_are_used_and_not_shown(data):
    env = {
        "SPAFL_ADMIN_TOKEN": "admin-from-the-environment",
        "SPAFL_ENROLMENT_KEY": "key-from-the-environment",
    }
    server = ServerProcess.start(data, env=env)
    try:
        assert server.started.keys() == {"url"}
        with server.client(env["SPAFL_ADMIN_TOKEN"]) as http:
            assert http.get("/devices").json() == []
        with server.client(env["SPAFL_ENROLMENT_KEY"]) as http:
            assert http.post("/devices", json={}).status_code == 201
    finally:
        server.kill()


def test_a_body_too_long_is_answered_before_it_ends(server, bundle):
    fleet = Fleet(server, bundle)
    fleet.lease(server)
    device, token = next(iter(fleet.tokens.items()))
    address = urlsplit(server.started["url"])
    for length in ("Transfer-Encoding: chunked", "Content-Length: 4000000000"):
        with socket.create_connection((address.hostname, address.port), 30) as wire:
            head = (
                f"PUT /v1/runs/run/rounds/1/updates/{device} HTTP/1.1\r\nHost: x\r\n"
                f"Authorization: Bearer {token}\r\nContent-Type: {MEDIA_TYPE}\r\n"
                f'{METRICS_HEADER}: {{"examples": 1}}\r\n{length}\r\n\r\n'
            )
            wire.sendall(head.encode() + b"1000\r\n" + b"x" * 0x1000 + b"\r\n")
            answer = wire.recv(4000)
        assert b" 413 " in answer.splitlines()[0]
        assert b"application/problem+json" in answer
    assert fleet.report(server, device) == 204
