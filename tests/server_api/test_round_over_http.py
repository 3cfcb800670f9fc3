"""A run from the first upload to the last version, as devices and operators see it."""

import numpy as np

from spafl.wire import MEDIA_TYPE, decode_thresholds


def test_two_rounds_of_two_devices_finish_the_run(server):
    server.start(rounds=2, target=2)
    devices = [server.enrol(), server.enrol()]
    for round in (1, 2):
        for value, device in enumerate(devices):
            lease = server.lease(device)
            assert lease.status_code == 201
            assert (lease.json()["round"], lease.json()["version"]) == (round, round - 1)
            body = server.body(value + round, version=round - 1)
            assert server.report(device, body, round, examples=10 + 10 * value).status_code == 204
    run = server.get("/runs/run").json()
    assert (run["state"], run["version"], run["rounds_done"], run["round"]) == ("finished", 2, 2, None)
    latest = server.get("/runs/run/thresholds/latest")
    assert latest.headers["content-type"] == MEDIA_TYPE
    thresholds = decode_thresholds(server.layout, latest.content)
    assert thresholds.version == 2
    # (10 * 2 + 20 * 3) / 30 in float64, rounded once
    np.testing.assert_array_equal(thresholds.values, np.full(7, 80 / 30, np.float32))
    assert server.lease(devices[0]).json()["type"] == "urn:spafl:problem:run-over"
