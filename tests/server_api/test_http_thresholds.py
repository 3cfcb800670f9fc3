"""Thresholds over HTTP: negotiation, entity tags, caching, precision."""

import numpy as np
import pytest

from spafl.wire import MEDIA_TYPE, decode_thresholds


@pytest.fixture
def started(server):
    server.start(target=1)
    return server


def test_devices_get_bytes_and_people_who_ask_get_json(started):
    answer = started.get("/runs/run/thresholds/0", Accept=MEDIA_TYPE)
    assert answer.headers["content-type"] == MEDIA_TYPE
    thresholds = decode_thresholds(started.layout, answer.content)
    json = started.get("/runs/run/thresholds/0", Accept="application/json")
    assert json.headers["content-type"] == "application/json"
    assert json.json() == {
        "layout": started.layout.id,
        "version": 0,
        "thresholds": [float(value) for value in thresholds.values],
    }
    assert json.headers["etag"] != answer.headers["etag"]
    assert answer.headers["vary"] == json.headers["vary"] == "Accept"


def test_version_0_is_the_bundles(started):
    body = started.get("/runs/run/thresholds/0").content
    expected = started.bundle.initial_thresholds()
    np.testing.assert_array_equal(decode_thresholds(started.layout, body).values, expected)


def test_what_the_client_has_is_not_sent_again(started):
    first = started.get("/runs/run/thresholds/latest")
    tag = first.headers["etag"]
    for header in (tag, f'"other", {tag}', f"W/{tag}", "*"):
        again = started.get("/runs/run/thresholds/latest", **{"If-None-Match": header})
        assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", tag)
    assert started.get("/runs/run/thresholds/latest", **{"If-None-Match": '"other"'}).status_code == 200
    device = started.enrol()
    started.lease(device)
    started.report(device, started.body(2.0))
    newer = started.get("/runs/run/thresholds/latest", **{"If-None-Match": tag})
    assert newer.status_code == 200
    assert decode_thresholds(started.layout, newer.content).version == 1


def test_a_version_never_changes_and_the_latest_may(started):
    assert "immutable" in started.get("/runs/run/thresholds/0").headers["cache-control"]
    assert started.get("/runs/run/thresholds/latest").headers["cache-control"] == "private, no-cache"


@pytest.mark.parametrize(("version", "status"), [("1", 404), ("-1", 422), ("first", 422), (str(2**53), 422)])
def test_versions_there_are_not(started, version, status):
    assert started.get(f"/runs/run/thresholds/{version}").status_code == status


def test_a_run_in_f16_sends_halves(server):
    server.start(target=1, precision="f16")
    answer = server.get("/runs/run/thresholds/0")
    assert b'"dtype":"F16"' in answer.content
    assert len(answer.content) < len(server.body())
    device = server.enrol()
    assert server.lease(device).json()["precision"] == "f16"
    assert server.report(device, server.body(1 / 3)).status_code == 204
    values = decode_thresholds(server.layout, server.get("/runs/run/thresholds/1").content).values
    np.testing.assert_array_equal(values, np.full(7, np.float16(np.float32(1 / 3)), np.float32))
