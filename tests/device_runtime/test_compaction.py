"""Compact models: what is left in the file, that it computes the same, and what the proof says of it."""

import copy
import functools
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from device_runtime import compaction
from device_runtime.compaction import MODEL, compact, predict
from device_runtime.engines.engine import EngineError
from device_runtime.engines.onnx import options, session
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.errors import BundleError
from spafl.layout import Floats
from spafl.proof import PROOF, Proof
from tests.export.bundles import bundle_of, state_of
from tests.export.models import LABELS, MODELS, Exported, Graphs
from trainer.sparsify import layout_of, sparsify

RELATIVE = 1e-5
"""Of the largest logit: sums of some hundred float32 terms in another order."""


class Constants(nn.Module):
    """Where a pruned channel is not 0 but a constant, and its readers pad, pool and flatten it."""

    shape = (2, 10, 10)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 6, 3, padding=1), nn.BatchNorm2d(6)
        self.conv2 = nn.Conv2d(6, 7, 3, padding=2, stride=2)
        self.conv3 = nn.Conv2d(7, 5, 1)
        self.head = nn.Linear(5 * 9, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.avg_pool2d(torch.sigmoid(self.norm1(self.conv1(x))), 2)  # 5
        x = F.max_pool2d(F.softplus(self.conv2(x)), 3, 1, 1)  # 4
        return self.head(F.avg_pool2d(F.gelu(self.conv3(x)), 2, 1).flatten(1))


@functools.cache
def made(name: str, gate: bool) -> Exported:
    torch.manual_seed(6)
    model = sparsify({**MODELS, "constants": Constants}[name](), gate=gate)
    draw = np.random.default_rng(6)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.add_(torch.from_numpy(draw.normal(0, 0.4, tensor.shape).astype(np.float32)))
    layout = layout_of(model)
    return Exported(model, layout, Graphs(model, layout, model.shape))


class Case:
    def __init__(self, name: str, gate: bool, path: Path) -> None:
        self.made = made(name, gate)
        self.bundle = bundle_of(self.made, path, ("infer", "masked"))
        self.x = np.random.default_rng(0).normal(size=(20, *self.made.input.shape)).astype(np.float32)

    def state(self, density: float, seed: int = 1) -> dict[str, Floats]:
        """A state with a random share `density` of each layer active; 0: one layer has no filter left."""
        state, layout = state_of(self.made), self.made.layout
        thresholds = algorithm.thresholds_at(layout, state, density or 0.5, np.random.default_rng(seed))
        if density == 0.0:
            thresholds[layout.layers[1].span] = 99.0
        return {**state, **layout.split(thresholds)}

    def eager(self, state: dict[str, Floats]) -> Floats:
        model = copy.deepcopy(self.made.model).eval()
        model.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in state.items()}, strict=False)
        with torch.no_grad():
            return np.asarray(model(torch.from_numpy(self.x)).numpy())


@pytest.fixture(
    scope="module",
    params=[("normed", False), ("constants", True), ("constants", False)],
    ids=["norms, no gate", "constants", "constants, no gate"],
)
def case(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case(*request.param, tmp_path_factory.mktemp("bundle") / "b")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Case:
    return Case("plain", True, tmp_path_factory.mktemp("bundle") / "b")


def shapes(path: Path) -> list[tuple[int, ...]]:
    tensors = onnx.load(path, load_external_data=False).graph.initializer
    assert all(tensor.data_location == onnx.TensorProto.DEFAULT for tensor in tensors), "not self-contained"
    return [tuple(tensor.dims) for tensor in tensors]


@pytest.mark.parametrize("density", [1.0, 0.5, 0.3, 0.1, 0.0])
def test_the_compact_model_is_eager_pytorchs(case: Case, density: float, tmp_path: Path) -> None:
    state = case.state(density)
    proof = compact(case.bundle, state, tmp_path, case.x, runs=1)
    expected = case.eager(state)
    got = predict(tmp_path / MODEL, case.x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())
    assert proof.equal
    assert proof.argmax_agreement == 1.0
    assert sorted(path.name for path in tmp_path.iterdir()) == [MODEL, PROOF]


def test_the_file_holds_standard_operators_and_no_leftovers(case: Case, tmp_path: Path) -> None:
    compact(case.bundle, case.state(0.5), tmp_path, case.x, runs=1)
    graph = onnx.load(tmp_path / MODEL).graph
    assert {node.domain for node in graph.node} <= {"", "ai.onnx"}
    folded = {"Abs", "TopK", "ReduceMean", "ReduceSum", "Gather"}
    assert not folded & {node.op_type for node in graph.node}
    constants = {tensor.name for tensor in graph.initializer}
    assert all(set(node.input) - constants for node in graph.node), "constants are left to fold"
    onnx.checker.check_model(onnx.load(tmp_path / MODEL), full_check=True)
    alone = tmp_path / "elsewhere"
    alone.mkdir()
    moved = (tmp_path / MODEL).rename(alone / MODEL)
    assert predict(moved, case.x).shape == (20, LABELS)


def test_what_is_left_and_what_the_proof_says(plain: Case, tmp_path: Path) -> None:
    state = plain.state(0.5)
    proof = compact(plain.bundle, state, tmp_path, plain.x, runs=2)
    assert Proof.from_text((tmp_path / PROOF).read_text()) == proof
    # conv1 1->6 of 13 x 13, conv2 6->8 of 4 x 4, fc1 32->14, fc2 14->5: half of each kept but of the head
    assert [(layer.layer, layer.kept, layer.total) for layer in proof.layers] == [
        ("conv1", 3, 6), ("conv2", 4, 8), ("fc1", 7, 14), ("fc2", 5, 5)
    ]  # fmt: skip
    reasons = {layer.layer: layer.reason for layer in proof.layers}
    assert reasons["conv1"] == "pruned channels are left out"
    assert reasons["fc2"] == "not masked"
    assert proof.density == {"conv1": 0.5, "conv2": 0.5, "fc1": 0.5}
    assert {(3, 1, 3, 3), (4, 3, 3, 3)} <= set(shapes(tmp_path / MODEL))
    small = 3 * 9 + 4 * 3 * 9 + 7 * 16 + 5 * 7
    assert (proof.masked.weights, proof.compact.weights) == (54 + 432 + 448 + 70, small)
    assert proof.masked.flops == 2 * (54 * 169 + 432 * 16 + 448 + 70)
    assert proof.compact.flops == 2 * (27 * 169 + 108 * 16 + 112 + 35)
    assert proof.compact.bytes == (tmp_path / MODEL).stat().st_size < proof.masked.bytes
    assert sum(int(np.prod(shape)) for shape in shapes(tmp_path / MODEL) if len(shape) > 1) == small
    assert (proof.bundle, proof.examples, proof.threads) == (plain.bundle.id, 20, 1)
    assert proof.relative_difference <= RELATIVE
    assert 0 < proof.compact.latency_median_ms <= proof.compact.latency_p95_ms


def test_a_layer_without_active_filters_keeps_one_and_says_so(plain: Case, tmp_path: Path) -> None:
    proof = compact(plain.bundle, plain.state(0.0), tmp_path, plain.x, runs=1)
    layer = proof.layers[1]
    assert (layer.kept, proof.density[layer.layer]) == (1, 0.0)
    assert "no filter is needed: one is kept, because runtimes" in layer.reason


def test_the_weights_are_the_ones_given(plain: Case, tmp_path: Path) -> None:
    """add_initializer would fold the weights of the first load and keep them, without a word."""
    for factor in (1.0, 2.0):
        state = plain.state(0.5)
        state["fc2.weight"] = state["fc2.weight"] * np.float32(factor)
        compact(plain.bundle, state, tmp_path, plain.x, runs=1)
        expected = plain.eager(state)
        np.testing.assert_allclose(
            predict(tmp_path / MODEL, plain.x), expected, rtol=0, atol=RELATIVE * np.abs(expected).max()
        )
    other = plain.state(0.3, seed=9)
    before = shapes(tmp_path / MODEL)
    compact(plain.bundle, other, tmp_path, plain.x, runs=1)
    assert shapes(tmp_path / MODEL) != before


def test_a_graph_without_its_state_does_not_load(plain: Case) -> None:
    """Its initialisers hold no data: a runtime that is given none must fail, not compute with something."""
    with pytest.raises(EngineError, match="cannot load this graph"):
        session(plain.bundle.read("infer.onnx"), options(1, spinning=False))


def test_a_state_of_another_model_writes_nothing(plain: Case, tmp_path: Path) -> None:
    good = plain.state(0.5)
    nan = good["conv1.weight"].copy()
    nan[0, 0, 0, 0] = np.nan
    wrong = {
        "missing or unknown": {name: value for name, value in good.items() if name != "fc1.weight"},
        "unknown": {**good, "other": np.zeros(1, np.float32)},
        "NaN": {**good, "conv1.weight": nan},
        "expected float32": {**good, "fc2.weight": good["fc2.weight"][:, :-1]},
    }
    for words, state in wrong.items():
        with pytest.raises(BundleError, match=words):
            compact(plain.bundle, state, tmp_path / "out", plain.x)
    assert not (tmp_path / "out").exists()


def test_no_examples_no_proof(plain: Case, tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="at least one real example, got none: give --data"):
        compact(plain.bundle, plain.state(0.5), tmp_path / "out", plain.x[:0])
    assert not (tmp_path / "out").exists()


def test_a_difference_is_told_and_nothing_written(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    saved = compaction._save

    def wrong(graph: bytes, supplied: dict[str, Floats], path: Path, threads: int) -> None:
        other = supplied
        if not path.name.startswith("masked"):
            other = {**supplied, "fc2.weight": supplied["fc2.weight"] * np.float32(1.001)}
        saved(graph, other, path, threads)

    monkeypatch.setattr(compaction, "_save", wrong)
    with pytest.raises(EngineError, match=r"differs from the masked one by 1\.0e-03 .* not written"):
        compact(plain.bundle, plain.state(0.5), tmp_path, plain.x)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("moment", ["latencies", "_figures"])
def test_an_interruption_leaves_nothing(
    plain: Case, tmp_path: Path, moment: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*arguments: object) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr("spafl.proof." + moment, interrupted)
    with pytest.raises(KeyboardInterrupt):
        compact(plain.bundle, plain.state(0.5), tmp_path, plain.x)
    assert not list(tmp_path.iterdir())


def test_a_model_never_stands_beside_another_ones_proof(
    plain: Case, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A full disk while the proof is written: what was there stays, the new model does not come."""
    compact(plain.bundle, plain.state(0.5), tmp_path, plain.x, runs=1)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}

    def full(*arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    monkeypatch.setattr(Path, "write_text", full)
    with pytest.raises(OSError, match="No space left"):
        compact(plain.bundle, plain.state(0.3), tmp_path, plain.x, runs=1)
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == before


def test_a_bundle_of_the_exporter(small_bundle: Bundle, tmp_path: Path) -> None:
    state = small_bundle.initial_state()
    draw = np.random.default_rng(2)
    layout = small_bundle.manifest.layout
    state |= layout.split(algorithm.thresholds_at(layout, state, 0.5, draw))
    x = draw.normal(size=(30, 1, 8, 8)).astype(np.float32)
    proof = compact(small_bundle, state, tmp_path, x, runs=1, threads=2)
    assert [(layer.kept, layer.total) for layer in proof.layers] == [(3, 6), (4, 8), (3, 3)]
    assert proof.runtime == f"onnxruntime {ort.__version__}"
    with pytest.raises(EngineError, match="no model at"):
        predict(tmp_path / "nothing.onnx", x)
