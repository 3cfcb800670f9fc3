"""A client written from PROTOCOL.md's pseudo-code and nothing else ends a round with the engine's very numbers."""

import json
import zipfile
from typing import Any

import numpy as np
import onnxruntime as ort
import safetensors.numpy
from numpy.typing import NDArray

from device_runtime.engines import open_engine
from spafl.bundle import Bundle
from spafl.hyperparameters import Hyperparameters

Arrays = dict[str, NDArray[Any]]
LEASE = Hyperparameters(epochs=2, lr=0.05, coeff=0.5, clip=1.0).at(0, 1)


class DocumentClient:
    """One round, word for word."""

    def __init__(self, archive: zipfile.ZipFile) -> None:
        self.archive = archive
        manifest = json.loads(archive.read("manifest.json"))
        self.files = manifest["engines"]["onnx"]["files"]
        self.tensors = manifest["state"]

    def run(self, graph: str, available: Arrays) -> Arrays:
        session = ort.InferenceSession(self.archive.read(self.files[graph]))
        names = [output.name for output in session.get_outputs()]
        # "Feed each graph what its inputs name."
        feeds = {value.name: available[value.name] for value in session.get_inputs()}
        return dict(zip(names, session.run(names, feeds), strict=True))

    def round(
        self, state: Arrays, base: NDArray[Any], target: NDArray[Any], batches: list[Any]
    ) -> tuple[Arrays, Arrays]:
        """The state after the round, and the last answer of end_round."""
        rows = {tensor["name"] for tensor in self.tensors if tensor["rows"]}

        def step_name(name: str) -> str:
            return f"rows.{name}" if name in rows else name

        out = self.run("begin_round", {**state, "base": base, "target": target})
        whole = {name: out.get(f"next.{name}", value) for name, value in state.items()}
        active = {name: value for name, value in out.items() if name.startswith("active.")}
        now = {name: out[f"rows.{name}"] if name in rows else whole[name] for name in state}
        trained = [tensor["name"] for tensor in self.tensors if tensor["role"] != "statistic"]
        mom = {name: np.zeros_like(now[name]) for name in trained}
        scalars = {
            "lr": LEASE.lr,
            "threshold_lr": LEASE.threshold_lr,
            "coeff": LEASE.coeff,
            "momentum": LEASE.momentum,
            "clip": LEASE.clip,
        }
        for _ in range(LEASE.epochs):
            for x, y in batches:
                feeds = {name: np.float32(value) for name, value in scalars.items()}
                feeds |= {"x": x, "y": y, **active}
                feeds |= {step_name(name): value for name, value in now.items()}
                feeds |= {f"momentum.{name}": value for name, value in mom.items()}
                out = self.run("train_step", {name: np.asarray(value) for name, value in feeds.items()})
                now = {name: out[f"next.{step_name(name)}"] for name in now}
                mom = {name: out[f"next.momentum.{name}"] for name in mom}
        feeds = {name: whole[name] if name in rows else now[name] for name in state}
        feeds |= {f"rows.{name}": now[name] for name in rows} | active
        out = self.run("end_round", feeds)
        return {name: out[f"next.{name}"] if name in rows else now[name] for name in state}, out


def test_the_document_is_enough_to_train(small_bundle: Bundle) -> None:
    bundle, manifest, layout = small_bundle, small_bundle.manifest, small_bundle.manifest.layout
    assert manifest.train_step.form == "rows"
    random = np.random.default_rng(1)
    state = bundle.initial_state()
    base = layout.join(state)
    # thresholds at the scale of the scores: some filters are pruned from the start
    target = random.uniform(0.0, 0.2, layout.size).astype(np.float32)
    batches = [
        (random.normal(size=(n, 1, 8, 8)).astype(np.float32), random.integers(0, 3, n)) for n in (16, 16, 5)
    ]
    engine = open_engine("onnx", bundle)
    start = engine.begin_round(state, base, target)
    assert 0 < min(start.density.values()) < 1, "the round must leave something out to test anything"
    for _ in range(LEASE.epochs):
        for x, y in batches:
            engine.step(x, y, LEASE)
    expected = engine.end_round()

    with zipfile.ZipFile(bundle.path) as archive:
        initial = safetensors.numpy.load(archive.read("init.safetensors"))
        got, out = DocumentClient(archive).round(initial, base, target, batches)
    assert set(got) == set(expected)
    for name, value in expected.items():
        np.testing.assert_array_equal(got[name], value, err_msg=name)  # the same graphs: the same bits
    np.testing.assert_array_equal(out["thresholds"], layout.join(expected))
    assert out["density"].shape == (len(layout.layers),)
    for layer in layout.layers:
        assert not np.array_equal(initial[layer.weight], got[layer.weight])
        assert not np.array_equal(target[layer.span], got[layer.threshold])
