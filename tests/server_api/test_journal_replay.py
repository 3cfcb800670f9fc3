"""The journal of counted updates makes every version again, byte for byte, whoever came first."""

import itertools

import numpy as np
import pytest

from server_api.coordinator import replay


@pytest.mark.parametrize(
    ("weighting", "precision"), [("examples", "f32"), ("plain", "f32"), ("examples", "f16")]
)
def test_every_version_can_be_computed_again_from_the_journal(server, weighting, precision):
    server.start(rounds=3, target=3, over_selection=2, weighting=weighting, precision=precision)
    devices = [server.enrol() for _ in range(4)]
    rng = np.random.default_rng(5)
    for round in (1, 2, 3):
        for device in devices[: 2 + round // 3]:
            server.lease(device)
        reporting = devices[: 2 + round // 3]
        rng.shuffle(reporting)
        for device in reporting:
            body = server.body(rng.normal(size=7), version=round - 1)
            assert server.report(device, body, round, examples=int(rng.integers(1, 10**6))).status_code == 204
        if round < 3:
            # a round closed by hand is in the journal like any other
            server.http.post(f"/v1/runs/run/rounds/{round}/close", headers=server.admin)
    facts = server.app.state.coordinator.facts("run")
    again = dict(replay(server.store, facts))
    assert again.keys() == {1, 2, 3}
    for version, body in again.items():
        assert server.get(f"/runs/run/thresholds/{version}").content == body


def test_a_failed_round_makes_no_version(server):
    server.start(rounds=2, target=1)
    server.http.post("/v1/runs/run/rounds/1/close", headers=server.admin)
    assert dict(replay(server.store, server.app.state.coordinator.facts("run"))) == {}
    assert server.get("/runs/run/thresholds/1").status_code == 404


def test_arrival_order_does_not_show_in_the_bytes(server):
    server.upload()
    devices = [server.enrol() for _ in range(3)]
    # float addition of these depends on the order, and so must not be left to chance
    values = [np.float32(1e8), np.float32(-1e8), np.float32(1e-8)]
    versions = set()
    for number, order in enumerate(itertools.permutations(range(3))):
        name = f"run-{number}"
        server.create(name, target=3, rounds=1, weighting="plain")
        server.steer("start", name)
        for device in devices:
            server.lease(device, name)
        for index in order:
            server.report(devices[index], server.body(values[index]), name=name)
        versions.add(server.get(f"/runs/{name}/thresholds/1").content)
    assert len(versions) == 1
