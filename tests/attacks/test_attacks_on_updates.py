"""Updates no honest device sends. Each is refused with a problem that says why, and leaves nothing behind.

01  not thresholds: other layout, dtype, shape, name, NaN, infinite, truncated, padded, empty, a header that lies
02  longer than any thresholds of this run: by declared length, and chunked without one
03  another media type, metrics that are missing, lying or huge
04  counted already: again, or other bytes, or other metrics
05  not in the round: no lease, lease run out, round closed, run over, round or run that never was
06  another device's name, or another device's token
07  the version of another round
08  values a run in f16 could never send on
"""

import json
import struct

import numpy as np
import pytest
import safetensors.numpy

from spafl.layout import Layer, ThresholdLayout
from spafl.protocol import METRICS_HEADER
from spafl.wire import MEDIA_TYPE, Thresholds, encode_thresholds, max_body_bytes
from tests.server_api.local_server import Device, LocalServer

OTHER = ThresholdLayout.of([Layer("first", "conv", out=7, n_in=9, n_scale=9, offset=0)])


@pytest.fixture
def device(server: LocalServer) -> Device:
    server.start(target=3)
    device = server.enrol()
    assert server.lease(device).status_code == 201
    return device


def stored(server: LocalServer) -> object:
    """Returns everything a request about the run could have changed."""
    store = server.store
    return store.run("run"), store.events("run", 0, 1000), list(store.updates("run", 1))


def assert_refused(
    server: LocalServer, before: object, answer, status: int, word: str, reason: str = ""
) -> None:
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    problem = answer.json()
    assert problem["type"] == f"urn:spafl:problem:{word}"
    assert problem["status"] == status
    assert reason in problem["detail"]
    assert stored(server) == before


def tensor(values, layout: str, version: str = "0", name: str = "thresholds") -> bytes:
    return safetensors.numpy.save({name: values}, {"layout": layout, "version": version})


SEVEN = np.zeros(7, np.float32)
BODIES = {
    "other layout": (
        lambda good, id: encode_thresholds(OTHER, Thresholds(SEVEN, 0)),
        "thresholds are for layout",
    ),
    "no layout": (
        lambda good, id: safetensors.numpy.save({"thresholds": SEVEN}),
        "thresholds are for layout None",
    ),
    "float64": (lambda good, id: tensor(SEVEN.astype(np.float64), id), "expected dtype F32 or F16"),
    "int32": (lambda good, id: tensor(SEVEN.astype(np.int32), id), "expected dtype F32 or F16, got 'I32'"),
    "a column": (lambda good, id: tensor(SEVEN.reshape(7, 1), id), "expected shape [7]"),
    "too few": (lambda good, id: tensor(SEVEN[:6], id), "expected shape [7]"),
    "too many": (lambda good, id: tensor(np.zeros(8, np.float32), id), "expected shape [7]"),
    "another name": (lambda good, id: tensor(SEVEN, id, name="weights"), "exactly one tensor 'thresholds'"),
    "a weight too": (
        lambda good, id: safetensors.numpy.save({"thresholds": SEVEN, "weight": SEVEN}, {"layout": id}),
        "exactly one tensor",
    ),
    "a NaN": (lambda good, id: good[:-4] + struct.pack("<f", float("nan")), "1 of 7 thresholds are NaN"),
    "infinity": (lambda good, id: good[:-4] + struct.pack("<f", float("inf")), "NaN or infinite"),
    "truncated": (lambda good, id: good[:-1], "bytes of values"),
    "padded": (lambda good, id: good + b"\0", "bytes of values"),
    "empty": (lambda good, id: b"", "truncated"),
    "a header that never ends": (lambda good, id: struct.pack("<Q", 2**63) + good[8:], "header of"),
    "a pickle": (lambda good, id: b"\x80\x04\x95" + b"\0" * 40, "header"),
    "negative version": (lambda good, id: tensor(SEVEN, id, "-1"), "expected a version"),
    "version in words": (lambda good, id: tensor(SEVEN, id, "latest"), "expected a version"),
}


@pytest.mark.parametrize("case", BODIES)
def test_01_bytes_that_are_not_thresholds_of_this_run(server, device, case):
    make, reason = BODIES[case]
    before = stored(server)
    answer = server.report(device, make(server.body(), server.layout.id))
    assert_refused(server, before, answer, 422, "bad-thresholds", reason)


def test_02_a_body_longer_than_any_thresholds_by_its_own_word(server, device):
    before = stored(server)
    answer = server.report(device, b"x" * (max_body_bytes(server.layout) + 1))
    assert_refused(server, before, answer, 413, "too-large", str(max_body_bytes(server.layout)))


def test_02_a_body_that_does_not_say_how_long_it_is_is_bounded_as_well(server, device):
    before = stored(server)

    def chunks():
        for _ in range(1000):
            yield b"x" * 1000

    headers = {**device.headers, "Content-Type": MEDIA_TYPE, METRICS_HEADER: '{"examples": 1}'}
    answer = server.http.put(f"/v1/runs/run/rounds/1/updates/{device.id}", content=chunks(), headers=headers)
    assert_refused(server, before, answer, 413, "too-large")


def test_02_json_bodies_are_bounded_too(server, device):
    before = stored(server)
    answer = server.http.post(
        "/v1/runs/run/leases", content=b'{"x":"' + b"x" * 70_000 + b'"}', headers=device.headers
    )
    assert_refused(server, before, answer, 413, "too-large")
    deep = b"[" * 60_000
    answer = server.http.post(
        "/v1/runs/run/leases", content=deep, headers={**device.headers, "Content-Type": "application/json"}
    )
    assert answer.status_code in (400, 422)
    assert answer.headers["content-type"] == "application/problem+json"


@pytest.mark.parametrize("media_type", ["application/json", "application/octet-stream", "", "text/html"])
def test_03_another_media_type(server, device, media_type):
    before = stored(server)
    answer = server.report(device, server.body(), media_type=media_type)
    assert_refused(server, before, answer, 415, "wrong-media-type", MEDIA_TYPE)


METRICS = {
    "missing": (None, 422, "bad-request"),
    "not JSON": ("examples=1", 422, "bad-metrics"),
    "no examples": ("{}", 422, "bad-metrics"),
    "none at all": ('{"examples": 0}', 422, "bad-metrics"),
    "less than none": ('{"examples": -5}', 422, "bad-metrics"),
    "all the weight": ('{"examples": 1000000000000000000}', 422, "bad-metrics"),
    "NaN loss": ('{"examples": 1, "loss": NaN}', 422, "bad-metrics"),
    "infinite loss": ('{"examples": 1, "loss": 1e999}', 422, "bad-metrics"),
    "accuracy of two": ('{"examples": 1, "accuracy": 2}', 422, "bad-metrics"),
    "unknown field": ('{"examples": 1, "weights": [1, 2]}', 422, "bad-metrics"),
    "another number of layers": ('{"examples": 1, "density": [0.5]}', 422, "bad-metrics"),
    "a truth value": ('{"examples": true}', 422, "bad-metrics"),
}


@pytest.mark.parametrize("case", METRICS)
def test_03_metrics_that_lie(server, device, case):
    text, status, word = METRICS[case]
    before = stored(server)
    headers = {**device.headers, "Content-Type": MEDIA_TYPE} | ({METRICS_HEADER: text} if text else {})
    path = f"/v1/runs/run/rounds/1/updates/{device.id}"
    answer = server.http.put(path, content=server.body(), headers=headers)
    assert_refused(server, before, answer, status, word)


def test_04_the_same_update_many_times_counts_once(server, device):
    for _ in range(5):
        assert server.report(device, server.body(0.25)).status_code == 204
    assert server.round()["reported"] == 1
    assert len(list(server.store.updates("run", 1))) == 1
    kinds = [event.kind for event in server.store.events("run", 0, 1000)]
    assert kinds.count("update.accepted") == 1


def test_04_other_bytes_or_other_metrics_after_that_are_refused(server, device):
    assert server.report(device, server.body(0.25)).status_code == 204
    before = stored(server)
    assert_refused(server, before, server.report(device, server.body(0.5)), 409, "update-differs")
    again = server.report(device, server.body(0.25), examples=10**9)
    assert_refused(server, before, again, 409, "update-differs")


def test_04_after_the_round_too_the_same_update_is_known_and_another_refused(server):
    server.start(target=1)
    device = server.enrol()
    server.lease(device)
    assert server.report(device, server.body(0.25)).status_code == 204
    version = server.get("/runs/run/thresholds/1").content
    assert server.report(device, server.body(0.25)).status_code == 204
    before = stored(server)
    assert_refused(server, before, server.report(device, server.body(0.5)), 409, "update-differs")
    assert server.get("/runs/run/thresholds/1").content == version


def test_05_a_device_that_is_not_in_the_round(server, device):
    before = stored(server)
    assert_refused(
        server, before, server.report(server.enrol(), server.body()), 403, "not-leased", "check in"
    )


def test_05_a_lease_that_ran_out(server, device):
    before = stored(server)
    server.clock.now += 301
    assert_refused(
        server, before, server.report(device, server.body()), 410, "lease-expired", "check in again"
    )


def test_05_a_round_that_is_closed(server, device):
    server.http.post("/v1/runs/run/rounds/1/close", headers=server.admin)
    before = stored(server)
    assert_refused(server, before, server.report(device, server.body()), 410, "round-closed")


def test_05_a_run_that_is_over(server, device):
    server.steer("stop")
    before = stored(server)
    assert_refused(server, before, server.report(device, server.body()), 410, "round-closed")
    assert_refused(server, before, server.lease(device), 410, "run-over", "stopped")


@pytest.mark.parametrize(("round", "status"), [(2, 404), (99999999, 404), (0, 422), (-1, 422), (2**40, 422)])
def test_05_a_round_that_never_was(server, device, round, status):
    before = stored(server)
    word = "not-found" if status == 404 else "bad-request"
    assert_refused(server, before, server.report(device, server.body(), round), status, word)


def test_05_a_run_that_never_was(server, device):
    before = stored(server)
    assert_refused(server, before, server.report(device, server.body(), name="other"), 404, "not-found")


def test_06_a_device_that_reports_as_another(server, device):
    other = server.enrol()
    server.lease(other)
    before = stored(server)
    answer = server.report(other, server.body(), path_device=device.id)
    assert_refused(server, before, answer, 403, "not-leased", "report for yourself")


def test_07_thresholds_of_another_version(server, device):
    before = stored(server)
    answer = server.report(device, server.body(version=1))
    assert_refused(server, before, answer, 422, "bad-thresholds", "version 1, expected 0")


def test_08_values_a_run_in_f16_could_never_send_on(server):
    server.start(target=3, precision="f16")
    device = server.enrol()
    server.lease(device)
    before = stored(server)
    # 65,504 is the largest half; the mean of larger ones would stop the run for everybody
    assert_refused(server, before, server.report(device, server.body(65_505)), 422, "bad-thresholds", "f16")
    assert server.report(device, server.body(65_504)).status_code == 204


def test_a_good_update_is_still_taken_after_all_that(server, device):
    for make, _ in BODIES.values():
        server.report(device, make(server.body(), server.layout.id))
    assert server.report(device, server.body(), **json.loads('{"loss": 0.5}')).status_code == 204
