"""A small real bundle, and the real application in this process."""

import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import safetensors.numpy
from fastapi import FastAPI
from starlette.testclient import TestClient

from server_api.app import create_app, open_store
from server_api.credentials import issue
from server_api.settings import Settings
from server_api.store import Store
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import InputSpec, Manifest, StateTensor, TrainStep
from spafl.protocol import METRICS_HEADER
from spafl.wire import MEDIA_TYPE, Thresholds, encode_thresholds

ADMIN = "admin-token-of-the-tests"
KEY = "enrolment-key-of-the-tests"


def small_bundle(path: Path, seed: int = 0) -> Bundle:
    """Returns a whole bundle of a two-layer model with 7 thresholds, without graphs: the server needs none."""
    layout = ThresholdLayout.of(
        [
            Layer("first", "conv", out=4, n_in=9, n_scale=9, offset=0),
            Layer("second", "linear", out=3, n_in=4, n_scale=4, offset=4),
        ]
    )
    shapes = {"first.weight": (4, 1, 3, 3), "second.weight": (3, 4)}
    rng = np.random.default_rng(seed)
    state = {name: rng.normal(size=shape).astype(np.float32) for name, shape in shapes.items()}
    state |= {layer.threshold: np.full(layer.out, 0.01, np.float32) for layer in layout.layers}
    roles = {"weight": "weight", "threshold": "threshold"}
    manifest = Manifest(
        name="small",
        layout=layout,
        state=tuple(
            StateTensor(
                name=name,
                shape=tensor.shape,
                role=roles[name.rpartition(".")[2]],
                layer=name.partition(".")[0],
                rows=True,
            )
            for name, tensor in state.items()
        ),
        input=InputSpec(shape=(1, 5, 5), mean=(0.5,), std=(0.5,)),
        labels=("no", "yes", "maybe"),
        train_step=TrainStep(form="rows", reason="no graph in this bundle"),
        compaction=(),
        engines={},
        files={},
        producer={"tests": "1"},
    )
    files = {INITIAL_STATE: safetensors.numpy.save(state), "graphs/step.onnx": bytes(range(256)) * 40}
    return write_bundle(path, manifest, files)


@dataclass
class Clock:
    """A clock that stands until it is moved."""

    now: float = 1_800_000_000.0

    def __call__(self) -> float:
        return self.now


@dataclass
class Device:
    """A device as the server knows it."""

    id: str
    headers: dict[str, str]


@dataclass
class LocalServer:
    """The real application in this process: `http` speaks to it, `clock` is its time."""

    http: TestClient
    app: FastAPI
    clock: Clock
    bundle: Bundle
    admin: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {ADMIN}"})
    key: dict[str, str] = field(default_factory=lambda: {"Authorization": f"Bearer {KEY}"})

    @property
    def layout(self) -> ThresholdLayout:
        return self.bundle.manifest.layout

    @property
    def store(self) -> Store:
        store: Store = self.app.state.coordinator.store
        return store

    def upload(self) -> Any:
        headers = {**self.admin, "Content-Type": "application/zip"}
        return self.http.post("/v1/bundles", content=self.bundle.path.read_bytes(), headers=headers)

    def create(self, name: str = "run", **settings: Any) -> Any:
        body = {"name": name, "bundle": self.bundle.id, **settings}
        return self.http.post("/v1/runs", json=body, headers=self.admin)

    def start(self, name: str = "run", **settings: Any) -> None:
        assert self.upload().status_code in (200, 201)
        assert self.create(name, **settings).status_code == 201
        assert self.steer("start", name).status_code == 200

    def steer(self, action: str, name: str = "run") -> Any:
        return self.http.post(f"/v1/runs/{name}/{action}", headers=self.admin)

    def enrol(self) -> Device:
        answer = self.http.post("/v1/devices", json={}, headers=self.key)
        assert answer.status_code == 201, answer.text
        token = answer.json()["token"]
        return Device(answer.json()["device"], {"Authorization": f"Bearer {token}"})

    def lease(self, device: Device, name: str = "run") -> Any:
        return self.http.post(f"/v1/runs/{name}/leases", json={}, headers=device.headers)

    def body(self, values: Any = 0.5, version: int = 0) -> bytes:
        values = np.broadcast_to(np.asarray(values, np.float32), (self.layout.size,))
        return encode_thresholds(self.layout, Thresholds(values, version))

    def report(
        self,
        device: Device,
        body: bytes,
        round: int = 1,
        *,
        name: str = "run",
        path_device: str | None = None,
        media_type: str = MEDIA_TYPE,
        **metrics: Any,
    ) -> Any:
        headers = {
            **device.headers,
            "Content-Type": media_type,
            METRICS_HEADER: json.dumps({"examples": 10, **metrics}),
        }
        path = f"/v1/runs/{name}/rounds/{round}/updates/{path_device or device.id}"
        return self.http.put(path, content=body, headers=headers)

    def get(self, path: str, **headers: str) -> Any:
        return self.http.get(f"/v1{path}", headers={**self.admin, **headers})

    def round(self, number: int = 1, name: str = "run") -> Any:
        return self.get(f"/runs/{name}/rounds/{number}").json()


@contextmanager
def local_server(directory: Path, bundle: Bundle) -> Iterator[LocalServer]:
    """Yields a started server with its data in `directory` and its clock standing; nothing is uploaded yet."""
    settings = Settings.given(data=directory, admin_token=ADMIN, enrolment_key=KEY)
    store = open_store(settings)
    issue(store, settings)
    clock = Clock()
    app = create_app(settings, store, clock)
    with TestClient(app, raise_server_exceptions=False) as http:
        yield LocalServer(http, app, clock, bundle)
