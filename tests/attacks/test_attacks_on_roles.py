"""Tokens used for what they do not open, and tokens that are none.

01  no token, an unknown one, a malformed one
02  the admin's routes with a device's token or the enrolment key
03  the devices' routes with the admin's token or the enrolment key
04  enrolling with a device's or the admin's token
05  secrets in answers, in the database, in reprs
"""

import re
from collections.abc import Iterator

import pytest

from server_api.settings import Settings
from spafl.bundle import Bundle
from tests.server_api.local_server import ADMIN, KEY, LocalServer, local_server

ADMIN_ONLY = [
    ("POST", "/v1/bundles"),
    ("GET", "/v1/bundles"),
    ("POST", "/v1/runs"),
    ("POST", "/v1/runs/run/start"),
    ("POST", "/v1/runs/run/pause"),
    ("POST", "/v1/runs/run/resume"),
    ("POST", "/v1/runs/run/stop"),
    ("GET", "/v1/runs/run/rounds"),
    ("GET", "/v1/runs/run/rounds/1"),
    ("POST", "/v1/runs/run/rounds/1/close"),
    ("GET", "/v1/runs/run/events"),
    ("GET", "/v1/devices"),
    ("GET", "/v1/-/versions"),
]
DEVICE_ONLY = [("POST", "/v1/runs/run/leases"), ("PUT", "/v1/runs/run/rounds/1/updates/d1")]
BOTH = [
    ("GET", "/v1/runs"),
    ("GET", "/v1/runs/run"),
    ("GET", "/v1/runs/run/thresholds/latest"),
    ("GET", "/v1/bundles/" + "0" * 64),
    ("GET", "/v1/bundles/" + "0" * 64 + "/files/x"),
]
ENROLMENT = [("POST", "/v1/devices")]
EVERY = ADMIN_ONLY + DEVICE_ONLY + BOTH + ENROLMENT


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, bundle: Bundle) -> Iterator[LocalServer]:
    # one for all: what is refused changes nothing
    with local_server(tmp_path_factory.mktemp("roles") / "server", bundle) as server:
        yield server


def valid(server: LocalServer, method: str, path: str) -> dict[str, object]:
    """Returns what the route needs besides a token, so that only the token can be at fault."""
    if path == "/v1/runs" and method == "POST":
        return {"json": {"name": "other", "bundle": server.bundle.id}}
    if path == "/v1/bundles" and method == "POST":
        return {"content": b"", "headers": {"Content-Type": "application/zip"}}
    return {"json": {}} if method == "POST" else {"headers": {"Spafl-Metrics": '{"examples": 1}'}}


def ask(server: LocalServer, method: str, path: str, authorization: str | None):
    given = valid(server, method, path)
    headers = {**given.pop("headers", {})} | ({"Authorization": authorization} if authorization else {})
    return server.http.request(method, path, headers=headers, **given)


def test_every_route_is_in_one_of_the_lists(server):
    described = {
        (method.upper(), path)
        for path, operations in server.app.openapi()["paths"].items()
        for method in operations
    }
    listed = {
        (method, re.sub("0{64}", "{bundle}", path).replace("/runs/run", "/runs/{run}"))
        for method, path in EVERY
    }
    listed = {
        (
            method,
            path.replace("/rounds/1", "/rounds/{round}")
            .replace("/latest", "/{version}")
            .replace("/files/x", "/files/{name}")
            .replace("/updates/d1", "/updates/{device}"),
        )
        for method, path in listed
    }
    assert described - listed == {("GET", "/v1/-/health")}


@pytest.mark.parametrize(("method", "path"), EVERY)
@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "Bearer unknown",
        "Bearer ",
        f"Basic {ADMIN}",
        ADMIN,
        f"Bearer {ADMIN}x",
        f"Bearer {ADMIN[:-1]}",
        "Bearer ' OR 1=1 --",
        "Bearer %",
    ],
)
def test_01_no_token_that_anybody_knows(server, method, path, authorization):
    answer = ask(server, method, path, authorization)
    assert answer.status_code == 401
    assert answer.json()["type"] == "urn:spafl:problem:unauthorized"
    assert answer.headers["www-authenticate"].startswith("Bearer")


@pytest.mark.parametrize(("method", "path"), ADMIN_ONLY)
def test_02_the_admins_routes_are_the_admins(server, method, path):
    device = server.enrol().headers["Authorization"]
    for authorization in (device, f"Bearer {KEY}"):
        answer = ask(server, method, path, authorization)
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:spafl:problem:forbidden")


@pytest.mark.parametrize(("method", "path"), DEVICE_ONLY)
def test_03_the_devices_routes_are_the_devices(server, method, path):
    for token in (ADMIN, KEY):
        answer = ask(server, method, path, f"Bearer {token}")
        assert (answer.status_code, answer.json()["type"]) == (403, "urn:spafl:problem:forbidden")


@pytest.mark.parametrize(("method", "path"), BOTH)
def test_03_an_enrolment_key_only_enrols(server, method, path):
    assert ask(server, method, path, f"Bearer {KEY}").status_code == 403


def test_04_only_the_key_enrols(server):
    device = server.enrol().headers["Authorization"]
    for authorization in (device, f"Bearer {ADMIN}"):
        assert ask(server, "POST", "/v1/devices", authorization).status_code == 403
    enrolled = len(server.get("/devices").json())
    assert ask(server, "POST", "/v1/devices", f"Bearer {KEY}").status_code == 201
    assert len(server.get("/devices").json()) == enrolled + 1


def test_05_no_secret_is_stored_or_shown(server):
    server.start()
    device = server.enrol()
    server.lease(device)
    token = device.headers["Authorization"].removeprefix("Bearer ")
    stored = b"".join(
        path.read_bytes() for path in server.app.state.settings.data.rglob("*") if path.is_file()
    )
    for secret in (ADMIN, KEY, token):
        assert secret.encode() not in stored
        for path in ("/devices", "/runs", "/runs/run", "/-/versions", "/openapi.json"):
            assert secret not in server.get(path).text
        assert secret not in repr(server.app.state.settings)


def test_05_a_weak_secret_is_refused_without_repeating_it():
    with pytest.raises(Exception, match="at least 20") as caught:
        Settings.given(admin_token="short-secret")
    assert "short-secret" not in str(caught.value)
