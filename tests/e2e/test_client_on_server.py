"""The device's client against the real server: every answer the agent acts on, and what crosses the wire."""

from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import numpy as np
import pytest

from device_runtime.client import Client
from device_runtime.download import fetch_bundle
from device_runtime.errors import Busy, NotFound, NotLeased, RoundClosed, RunOver, Unauthorised, UpdateDiffers
from spafl.bundle import Bundle
from spafl.protocol import EnrolmentRequest, Lease, LeaseRequest
from spafl.secret import Secret
from spafl.wire import Precision, Thresholds, encode_thresholds
from tests.e2e.test_operator import Serving
from tests.server_api.local_server import small_bundle as bundle_without_graphs

METRICS = '{"examples":7}'


class Recording(httpx2.HTTPTransport):
    """The real network, remembered."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[httpx2.Request, int]] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = super().handle_request(request)
        self.seen.append((request, response.status_code))
        return response


@pytest.fixture(scope="module")
def serving(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Serving]:
    serving = Serving(tmp_path_factory.mktemp("serving"))
    yield serving
    serving.end()


@pytest.fixture(scope="module")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return bundle_without_graphs(tmp_path_factory.mktemp("bundle") / "bundle.zip")


@pytest.fixture
def start(serving: Serving, bundle: Bundle, request: pytest.FixtureRequest) -> Callable[..., str]:
    """Starts a run named after the test, of two rounds of two devices."""

    def create(*options: str) -> str:
        name = request.node.name.replace("_", "-")[:60]
        serving.ok(
            "create",
            name,
            "--bundle",
            str(bundle.path),
            "--rounds",
            "2",
            "--target",
            "2",
            *options,
            "--start",
        )
        return name

    return create


@pytest.fixture
def devices(serving: Serving) -> Iterator[list[tuple[Client, str]]]:
    made = []
    for _ in range(3):
        with Client(serving.url) as client:
            identity = client.enrol(Secret(serving.key), EnrolmentRequest())
        made.append((Client(serving.url, identity.token, transport=Recording()), identity.device))
    yield made
    for client, _ in made:
        client.close()


def body(bundle: Bundle, lease: Lease, value: float = 0.25, precision: Precision = "f32") -> bytes:
    values = np.full(bundle.manifest.layout.size, value, np.float32)
    return encode_thresholds(bundle.manifest.layout, Thresholds(values, lease.version), precision)


def test_a_run_as_devices_see_it(
    start: Callable[..., str], devices: list[tuple[Client, str]], bundle: Bundle
) -> None:
    run = start()
    (one, first), (two, second), (three, _) = devices
    lease = one.lease(run, LeaseRequest())
    assert one.lease(run, LeaseRequest()) == lease  # asked again, the same one
    other = two.lease(run, LeaseRequest())
    with pytest.raises(Busy, match="round-full") as full:
        three.lease(run, LeaseRequest())
    assert full.value.retry_after
    update = body(bundle, lease)
    one.report(run, lease.round, first, update, METRICS)
    one.report(run, lease.round, first, update, METRICS)  # lost answers cost nothing
    with pytest.raises(UpdateDiffers):
        one.report(run, lease.round, first, body(bundle, lease, 0.5), METRICS)
    with pytest.raises(Busy, match="already-reported"):
        one.lease(run, LeaseRequest())
    with pytest.raises(NotLeased):
        one.report(run, lease.round, second, update, METRICS)
    two.report(run, other.round, second, body(bundle, other, 0.75), METRICS)
    one.report(run, lease.round, first, update, METRICS)  # and still nothing once the round is closed
    with pytest.raises((RoundClosed, NotLeased)):
        three.report(run, lease.round, devices[2][1], update, METRICS)
    thresholds = three.thresholds(run, 1, bundle.manifest.layout)
    assert np.array_equal(thresholds.values, np.full(bundle.manifest.layout.size, 0.5))
    with pytest.raises(NotFound):
        three.thresholds(run, 2, bundle.manifest.layout)


def test_an_update_after_its_round_closed(
    serving: Serving, start: Callable[..., str], devices: list[tuple[Client, str]], bundle: Bundle
) -> None:
    run = start()
    (one, first), (two, second), _ = devices
    lease, late = one.lease(run, LeaseRequest()), two.lease(run, LeaseRequest())
    one.report(run, lease.round, first, body(bundle, lease), METRICS)
    serving.ok("close", run, str(lease.round))
    with pytest.raises(RoundClosed, match="round-closed"):
        two.report(run, late.round, second, body(bundle, late), METRICS)
    serving.ok("stop", run)
    with pytest.raises(RunOver):
        one.lease(run, LeaseRequest())


def test_half_precision_both_ways(
    start: Callable[..., str], devices: list[tuple[Client, str]], bundle: Bundle
) -> None:
    run = start("--precision", "f16")
    for client, device in devices[:2]:
        lease = client.lease(run, LeaseRequest())
        assert lease.precision == "f16"
        client.report(run, lease.round, device, body(bundle, lease, 0.1, "f16"), METRICS)
    thresholds = devices[0][0].thresholds(run, 1, bundle.manifest.layout)
    assert np.array_equal(
        thresholds.values, np.full(bundle.manifest.layout.size, np.float16(0.1), np.float32)
    )


def test_strangers_and_unknown_names(start: Callable[..., str], serving: Serving) -> None:
    run = start()
    with Client(serving.url, Secret("nobody")) as stranger, pytest.raises(Unauthorised):
        stranger.lease(run, LeaseRequest())
    with Client(serving.url) as client, pytest.raises(Unauthorised):
        client.enrol(Secret("no such key"), EnrolmentRequest())


def test_a_bundle_resumes_by_range_on_the_real_server(
    start: Callable[..., str], devices: list[tuple[Client, str]], bundle: Bundle, tmp_path: Path
) -> None:
    start()
    client, _ = devices[0]
    part = tmp_path / f"held-{bundle.id[:12]}.part" / "graphs"
    part.mkdir(parents=True)
    (part / "step.onnx").write_bytes(bundle.read("graphs/step.onnx")[:5000])
    assert fetch_bundle(client, bundle.id, tmp_path / "held").id == bundle.id
    transport = client._http._transport
    assert isinstance(transport, Recording)
    ranged = [(r.headers["Range"], status) for r, status in transport.seen if "Range" in r.headers]
    assert ranged == [("bytes=5000-", 206)]
