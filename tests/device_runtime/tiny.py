"""A whole run small enough for any test: a model of 14 numbers, an engine in numpy, and a server in a file.

The model: 3 inputs -> 4 masked neurons (thresholds) -> ReLU -> 2 labels, with a running mean of the inputs beside it.
"""

import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import safetensors.numpy
from numpy.typing import NDArray

from device_runtime.engines import RoundStart, StepResult
from device_runtime.examples import Examples, LocalData
from spafl import algorithm
from spafl.bundle import Bundle, write_bundle
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats, Layer, ThresholdLayout
from spafl.manifest import InputSpec, Manifest, StateTensor, TrainStep
from spafl.protocol import Lease, LeaseRequest, Metrics, Policy, RunSettings, RunView
from spafl.wire import MEDIA_TYPE, Thresholds, decode_thresholds, encode_thresholds

LAYOUT = ThresholdLayout.of([Layer("hidden", "linear", out=4, n_in=3, n_scale=3, offset=0)])
HYPERPARAMETERS = Hyperparameters(epochs=2, batch_size=4, lr=0.1, coeff=0.01)
TOKEN = "device-token-Zx81"


def tiny_bundle(path: Path) -> Bundle:
    random = np.random.default_rng(3)
    state = {
        "hidden.weight": random.normal(size=(4, 3)).astype(np.float32),
        "hidden.threshold": np.zeros(4, np.float32),
        "head.weight": random.normal(size=(2, 4)).astype(np.float32),
        "norm.mean": np.zeros(3, np.float32),
    }
    roles = {"hidden.weight": "weight", "hidden.threshold": "threshold", "norm.mean": "statistic"}
    manifest = Manifest(
        name="tiny",
        layout=LAYOUT,
        state=tuple(
            StateTensor.from_json(
                {
                    "name": name,
                    "shape": tensor.shape,
                    "role": roles.get(name, "parameter"),
                    "layer": "hidden" if name.startswith("hidden") else None,
                }
            )
            for name, tensor in state.items()
        ),
        input=InputSpec(shape=(3,), mean=(0.0,) * 3, std=(1.0,) * 3),
        labels=("no", "yes"),
        train_step=TrainStep(form="dense", reason="numpy"),
        compaction=(),
        engines={},
        files={},
        producer={"spafl": "0"},
    )
    return write_bundle(path, manifest, {"init.safetensors": safetensors.numpy.save(state)})


def tiny_data(count: int = 9, seed: int = 0) -> LocalData:
    random = np.random.default_rng(seed)
    x = random.normal(size=(count + 4, 3)).astype(np.float32)
    examples = Examples(x, (x.sum(axis=1) > 0).astype(np.int64))
    return LocalData(examples.take(np.arange(count)), examples.take(np.arange(count, count + 4)))


class NumpyEngine:
    """Masked training of the tiny model: straight-through thresholds, momentum SGD, as spafl's equations say."""

    name = "numpy"

    def __init__(self, bundle: Bundle) -> None:
        self.manifest = bundle.manifest
        self.state: dict[str, Floats] = {}
        self.momentum: dict[str, Floats] = {}
        self.active: NDArray[np.int64] = np.empty(0, np.int64)
        self.steps = 0

    def begin_round(self, state: Mapping[str, Floats], base: Floats, target: Floats) -> RoundStart:
        caught_up = algorithm.apply_global(LAYOUT, state, base, target)
        self.state, collapsed = algorithm.reset_collapsed(LAYOUT, caught_up)
        self.momentum = {n: np.zeros_like(t) for n, t in self.state.items() if n != "norm.mean"}
        self.active = np.flatnonzero(algorithm.mask(LAYOUT.layers[0], self.state))
        return RoundStart(algorithm.densities(LAYOUT, self.state), tuple(collapsed))

    def step(self, x: Floats, y: NDArray[np.int64], hyperparameters: Hyperparameters) -> StepResult:
        assert len(x) > 1, "one example has no variance"
        weight, head = self.state["hidden.weight"], self.state["head.weight"]
        mask = algorithm.mask(LAYOUT.layers[0], self.state).astype(np.float32)
        hidden = np.maximum(x @ (weight * mask[:, None]).T, 0)
        odds = np.exp(hidden @ head.T)
        odds /= odds.sum(axis=1, keepdims=True)
        loss = float(-np.log(odds[np.arange(len(y)), y]).mean())
        correct = int((odds.argmax(axis=1) == y).sum())
        error = (odds - np.eye(2, dtype=np.float32)[y]) / len(y)
        masked = ((error @ head) * (hidden > 0)).T @ x
        threshold = self.state["hidden.threshold"]
        gradients = {
            "hidden.weight": masked * mask[:, None],
            "hidden.threshold": -(masked * weight).sum(axis=1) - hyperparameters.coeff * np.exp(-threshold),
            "head.weight": error.T @ hidden,
        }
        for name, gradient in gradients.items():
            self.momentum[name] = (hyperparameters.momentum * self.momentum[name] + gradient).astype(
                np.float32
            )
            self.state[name] = self.state[name] - np.float32(hyperparameters.lr) * self.momentum[name]
        self.state["norm.mean"] = (0.9 * self.state["norm.mean"] + 0.1 * x.mean(axis=0)).astype(np.float32)
        self.steps += 1
        return StepResult(loss, correct)

    def checkpoint(self) -> dict[str, NDArray[Any]]:
        momenta = {f"momentum.{name}": tensor for name, tensor in self.momentum.items()}
        return {**self.state, **momenta, "active.hidden": self.active}

    def resume(self, checkpoint: Mapping[str, NDArray[Any]]) -> None:
        self.state = {tensor.name: checkpoint[tensor.name] for tensor in self.manifest.state}
        self.momentum = {n: checkpoint[f"momentum.{n}"] for n in self.state if n != "norm.mean"}
        self.active = checkpoint["active.hidden"]

    def end_round(self) -> dict[str, Floats]:
        return dict(self.state)

    def predict(self, state: Mapping[str, Floats], x: Floats) -> Floats:
        mask = algorithm.mask(LAYOUT.layers[0], state).astype(np.float32)
        hidden = np.maximum(x @ (state["hidden.weight"] * mask[:, None]).T, 0)
        return np.asarray(hidden @ state["head.weight"].T, np.float32)


class FileServer:
    """A server for one device, in one JSON file: each update closes its round and becomes the next version.

    `before` is called with each request and may answer it instead; `requests` lists what was asked for.
    """

    def __init__(self, file: Path, bundle: Bundle, rounds: int, policy: Policy | None = None) -> None:
        self.file, self.bundle, self.rounds = file, bundle, rounds
        self.policy, self.layout = policy or Policy(), bundle.manifest.layout
        self.requests: list[httpx2.Request] = []
        self.before: Callable[[httpx2.Request], httpx2.Response | None] = lambda request: None
        if not file.exists():
            initial = bundle.initial_thresholds().tolist()
            self.save({"round": 1, "versions": [initial], "updates": {}, "puts": []})

    def load(self) -> dict[str, Any]:
        return json.loads(self.file.read_text())

    def save(self, data: dict[str, Any]) -> None:
        self.file.write_text(json.dumps(data))

    @property
    def transport(self) -> httpx2.MockTransport:
        return httpx2.MockTransport(self.answer)

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if (instead := self.before(request)) is not None:
            return instead
        if request.headers.get("Authorization") != f"Bearer {TOKEN}":
            return problem(401, "unauthorised")
        parts = request.url.path.removeprefix("/v1/").split("/")
        if parts[0] == "bundles":
            return self.give_bundle(request, parts[1:])
        if len(parts) == 2:
            return json_answer(200, self.view())
        return {"leases": self.lease, "thresholds": self.thresholds, "rounds": self.update}[parts[2]](
            request, parts[3:]
        )

    def view(self) -> RunView:
        data = self.load()
        settings = RunSettings(
            name="r", bundle=self.bundle.id, rounds=self.rounds, target=1, policy=self.policy
        )
        done = len(data["updates"])
        state = "finished" if done >= self.rounds else "running"
        return RunView(
            run="r",
            settings=settings,
            state=state,
            layout=self.layout.id,
            round=data["round"],
            version=done,
            created=0,
            rounds_done=done,
            rounds_failed=0,
        )

    def lease(self, request: httpx2.Request, parts: list[str]) -> httpx2.Response:
        LeaseRequest.from_text(request.content)
        data = self.load()
        if len(data["updates"]) >= self.rounds:
            return problem(410, "run-over")
        return json_answer(
            201, make_lease(self.bundle, data["round"], len(data["versions"]) - 1, self.rounds, self.policy)
        )

    def thresholds(self, request: httpx2.Request, parts: list[str]) -> httpx2.Response:
        version = int(parts[0])
        values = np.array(self.load()["versions"][version], np.float32)
        body = encode_thresholds(self.layout, Thresholds(values, version))
        return reply(200, body, {"Content-Type": MEDIA_TYPE})

    def update(self, request: httpx2.Request, parts: list[str]) -> httpx2.Response:
        number, device = parts[0], parts[2]
        assert device == "d1"
        metrics = request.headers["Spafl-Metrics"]
        Metrics.from_text(metrics)
        data = self.load()
        data["puts"].append(number)
        self.save(data)
        told = [request.content.hex(), metrics]
        if number in data["updates"]:
            return reply(204) if data["updates"][number] == told else problem(409, "update-differs")
        if int(number) != data["round"]:
            return problem(410, "round-closed")
        received = decode_thresholds(self.layout, request.content)
        assert received.version == len(data["versions"]) - 1
        data["updates"][number] = told
        data["versions"].append(received.values.tolist())
        data["round"] += 1
        self.save(data)
        return reply(204)

    def give_bundle(self, request: httpx2.Request, parts: list[str]) -> httpx2.Response:
        assert parts[0] == self.bundle.id
        if len(parts) == 1:
            return reply(200, (self.bundle.path / "manifest.json").read_bytes())
        name = "/".join(parts[2:])
        content, tag = self.bundle.read(name), f'"{self.bundle.manifest.files[name].sha256}"'
        asked = request.headers.get("Range", "")
        if asked and request.headers.get("If-Range") == tag:
            start = int(asked.removeprefix("bytes=").removesuffix("-"))
            headers = {"Content-Range": f"bytes {start}-{len(content) - 1}/{len(content)}", "ETag": tag}
            return reply(206, content[start:], headers)
        return reply(200, content, {"ETag": tag})


def make_lease(
    bundle: Bundle, number: int = 1, version: int = 0, rounds: int = 3, policy: Policy | None = None
) -> Lease:
    return Lease(
        run="r",
        round=number,
        version=version,
        bundle=bundle.id,
        layout=bundle.manifest.layout.id,
        expires=1e12,
        deadline=1e12,
        rounds=rounds,
        precision="f32",
        hyperparameters=HYPERPARAMETERS,
        policy=policy or Policy(),
    )


def reply(status: int, content: bytes = b"", headers: Mapping[str, str] | None = None) -> httpx2.Response:
    """A response still to be read, as it comes off a socket."""
    return httpx2.Response(status, stream=httpx2.ByteStream(content), headers=headers)


def json_answer(status: int, message: Any) -> httpx2.Response:
    return reply(status, message.to_text().encode(), {"Content-Type": "application/json"})


def problem(status: int, word: str, headers: Mapping[str, str] | None = None) -> httpx2.Response:
    body = {"type": f"urn:spafl:problem:{word}", "title": word, "status": status, "detail": f"about {word}"}
    kind = {"Content-Type": "application/problem+json"}
    return reply(status, json.dumps(body).encode(), {**kind, **(headers or {})})
