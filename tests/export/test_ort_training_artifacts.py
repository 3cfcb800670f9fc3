"""Artifacts: what stock tools can check of them without ONNX Runtime Training, and what only it can."""

import math
from itertools import product
from pathlib import Path

import numpy as np
import onnx
import onnxruntime as ort
import pytest
import torch
import torch.nn.functional as F
from onnx import TensorProto, helper, numpy_helper
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn

from export import ort_training_artifacts
from export.build import export_bundle
from export.decompositions import LoweringError
from export.ort_training_forward import _convolve_averages, drop_stops, forward_model, value
from export.ort_training_models import optimizer_model, parameter_names, training_model
from spafl import ort_training
from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.manifest import InputSpec, StateTensor
from spafl.step import MOMENTUM, NEXT
from tests.export.artifacts import artifacts, needs_ort_training, tensors_of
from trainer.sparsify import sparsify

ROUNDINGS = 2e-6
"""Relative to a tensor's largest value: a dozen float32 roundings."""


class Dense(nn.Module):
    """The smallest net with a masked layer; `middle` is between its two layers."""

    shape = (6,)

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(6, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.middle(self.fc1(x)))

    def middle(self, x: Tensor) -> Tensor:
        return F.relu(x)


class Hiding(Dense):
    """Stops a gradient in a way that leaves no trace in a graph."""

    def middle(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = 1 / (1 + x.square().mean(1, keepdim=True))
        return F.relu(x) * scale


class Cumulative(Dense):
    def middle(self, x: Tensor) -> Tensor:
        return torch.cumsum(F.relu(x), 1)


class Attention(nn.Module):
    """One block of a vision transformer: patches, a token for the label, attention, a residual; and a detach."""

    shape = (1, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.patches = nn.Conv2d(1, 8, 4, 4)
        self.token = nn.Parameter(torch.randn(1, 1, 8))
        self.norm = nn.LayerNorm(8)
        self.query, self.value, self.head = nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.patches(x).flatten(2).transpose(1, 2)
        x = torch.cat([self.token.expand(x.shape[0], -1, -1), x], 1)
        y = self.norm(x)
        x = x + F.softmax(self.query(y) @ y.transpose(1, 2), 2) @ F.gelu(self.value(y))
        return self.head(x[:, 0] / (1 + x.square().mean((1, 2))[:, None]).detach())


def sparse(model: type[nn.Module]) -> nn.Module:
    torch.manual_seed(3)
    return sparsify(model())


def stops(graph: onnx.GraphProto) -> int:
    return sum(
        node.op_type == "Cast" and helper.get_node_attr_value(node, "to") == TensorProto.UINT64
        for node in graph.node
    )


@pytest.fixture(scope="module")
def dense() -> tuple[onnx.ModelProto, tuple[StateTensor, ...]]:
    """The graph to differentiate of `Dense`, and its tensors."""
    model = sparse(Dense)
    tensors = tensors_of(model)
    return forward_model(model, tensors, Dense.shape), tensors


def test_detach_marks_where_gradients_stop_and_leaves_the_numbers_alone(
    dense: tuple[onnx.ModelProto, tuple[StateTensor, ...]],
) -> None:
    made, tensors = dense
    model = onnx.ModelProto()
    model.CopyFrom(made)
    assert stops(model.graph) > 0
    drop_stops(model.graph)
    assert stops(model.graph) == 0
    onnx.checker.check_model(model)
    eager = sparse(Dense)
    draw = np.random.default_rng(0)
    x, y = draw.normal(size=(5, 6)).astype(np.float32), np.array([0, 1, -100, 2, 1])
    feeds = {"x": x, "y": y, "coeff": np.array(0.1, np.float32)}
    feeds |= {tensor.name: eager.state_dict()[tensor.name].numpy() for tensor in tensors}
    session = ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"])
    got = dict(zip(("loss", "correct", "objective"), session.run(None, feeds), strict=True))
    logits = eager(torch.from_numpy(x))
    loss = F.cross_entropy(logits, torch.from_numpy(y))
    assert got["loss"] == pytest.approx(loss.item(), rel=ROUNDINGS)
    assert got["correct"] == int((logits.argmax(1) == torch.from_numpy(y)).sum())
    assert got["objective"] == pytest.approx(loss.item() + 0.1 * 8, rel=ROUNDINGS)  # 8 thresholds of 0


def test_an_identity_takes_the_place_of_each_stop() -> None:
    nodes = [
        helper.make_node("Cast", ["a"], ["a.integer"], to=TensorProto.UINT64),
        helper.make_node("Cast", ["a.integer"], ["b"], to=TensorProto.FLOAT),
        helper.make_node("Cast", ["a"], ["c"], to=TensorProto.INT64),
        helper.make_node("Cast", ["c"], ["d"], to=TensorProto.FLOAT),
    ]
    graph = helper.make_graph(nodes, "g", [value("a", [2])], [value("b", [2]), value("d", [2])])
    drop_stops(graph)
    model = helper.make_model(graph)
    b, d = ReferenceEvaluator(model).run(None, {"a": np.array([-1.5, 2.5], np.float32)})
    assert b.tolist() == [-1.5, 2.5]
    assert d.tolist() == [-1.0, 2.0]  # a model's own rounding is its own


@pytest.mark.parametrize(
    ("kernel", "stride", "pad", "dilation"), [*product((2, 3), (1, 2, 3), (0, 1), (1,)), (2, 1, 0, 2)]
)
@pytest.mark.parametrize("options", [{}, {"count_include_pad": 1}, {"ceil_mode": 1}])
def test_a_convolution_averages_as_a_pool_does(
    kernel: int, stride: int, pad: int, dilation: int, options: dict[str, int]
) -> None:
    pool = helper.make_node(
        "AveragePool",
        ["a"],
        ["b"],
        kernel_shape=[kernel, kernel],
        strides=[stride, stride],
        pads=[pad, 0, 0, pad],
        dilations=[dilation, dilation],
        **options,
    )
    # its input must be the output of a node: the shapes of graph inputs are told, those between are inferred
    nodes = [helper.make_node("Identity", ["x"], ["a"]), pool]
    graph = helper.make_graph(nodes, "g", [value("x", ["n", 3, 7, 8])], [value("b", ["n", 3, "h", "w"])])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 19)], ir_version=8)
    x = np.random.default_rng(1).normal(size=(2, 3, 7, 8)).astype(np.float32)
    expected = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    _convolve_averages(model)
    assert {node.op_type for node in model.graph.node} == {"Identity", "Reshape", "Conv", "Mul"}
    got = ort.InferenceSession(model.SerializeToString()).run(None, {"x": x})[0]
    np.testing.assert_allclose(got, expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("clip", [None, 0.5, 100.0])
def test_changes_are_those_of_sgd(clip: float | None) -> None:
    tensors = (
        StateTensor(name="a.weight", shape=(3, 2), role="weight", layer="a"),
        StateTensor(name="a.threshold", shape=(3,), role="threshold", layer="a"),
        StateTensor(name="still", shape=(2,), role="parameter"),
        StateTensor(name="mean", shape=(2,), role="statistic"),
    )
    draw = np.random.default_rng(2)
    values = {
        name: draw.normal(size=shape).astype(np.float32)
        for name, shape in [(tensor.name, tensor.shape) for tensor in tensors]
        + [(MOMENTUM + tensor.name, tensor.shape) for tensor in tensors if tensor.trained]
    }
    outcome = {name + "_grad": draw.normal(size=values[name].shape).astype(np.float32) for name in values}
    outcome = {name: outcome[name] for name in ("a.weight_grad", "a.threshold_grad")}  # `still` has none
    outcome |= {NEXT + "mean": draw.normal(size=2).astype(np.float32)}
    outcome |= {"loss": np.array(1.0, np.float32), "correct": np.array(1)}
    nodes = [
        helper.make_node("Constant", [], [name], value=numpy_helper.from_array(of))
        for name, of in outcome.items()
    ]
    results = [value(name, of.shape) for name, of in outcome.items()]
    given = [
        helper.make_model(helper.make_graph(nodes, "g", [value("x", [1]), value("y", [1])], order))
        for order in (results, results[::-1])  # the gradient builder lists them in another order every time
    ]
    made, same = (training_model(model, tensors) for model in given)
    assert made.SerializeToString(deterministic=True) == same.SerializeToString(deterministic=True)
    graph = made.graph
    inputs = [declared.name for declared in graph.input]
    assert inputs[:7] == ["x", "y", "lr", "threshold_lr", "coeff", "momentum", "clip"]
    assert inputs[7 : 7 + len(values)] == parameter_names(tensors) == list(values)
    written = {
        node.output[0].removesuffix("_grad.accumulation.out"): node.input[1]
        for node in graph.node
        if node.domain
    }
    assert written.keys() == values.keys()
    kept = [node for node in graph.node if not node.domain]
    changes = [value(change, values[name].shape) for name, change in written.items()]
    update = helper.make_model(helper.make_graph(kept, "g", graph.input, changes, graph.initializer))

    h = Hyperparameters(lr=0.3, threshold_lr=0.07, momentum=0.8, clip=clip)
    scalars = {name: np.array(number, np.float32) for name, number in h.scalars().items()}
    got = dict(zip(written, ReferenceEvaluator(update).run(None, {**values, **scalars}), strict=True))
    norm = math.sqrt(
        sum(float(np.square(outcome[name]).sum()) for name in ("a.weight_grad", "a.threshold_grad"))
    )
    factor = 1.0 if clip is None else min(1.0, clip / (norm + 1e-6))
    for name, rate in (("a.weight", 0.3), ("a.threshold", 0.07), ("still", 0.3)):
        moved = 0.8 * values[MOMENTUM + name] + factor * outcome.get(f"{name}_grad", np.float32(0))
        np.testing.assert_allclose(values[name] - got[name], values[name] - rate * moved, rtol=0, atol=1e-6)
        np.testing.assert_allclose(values[MOMENTUM + name] - got[MOMENTUM + name], moved, rtol=0, atol=1e-6)
    np.testing.assert_allclose(values["mean"] - got["mean"], outcome[NEXT + "mean"], rtol=0, atol=1e-6)


def test_the_optimizer_takes_what_the_runtime_gives_any_optimizer() -> None:
    graph = optimizer_model().graph
    assert [declared.name for declared in graph.input] == [
        "learning_rate",
        "step",
        "params",
        "gradients",
        "first_order_moments",
    ]
    assert [(node.domain, node.op_type) for node in graph.node] == [("com.microsoft", "SGDOptimizerV2")]


def test_without_the_runtime_nothing_is_begun(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv(ort_training.VARIABLE, str(tmp_path / "python"))
    spec = InputSpec(shape=(6,), mean=(0.0,) * 6, std=(1.0,) * 6)
    stages: list[str] = []
    with pytest.raises(SettingsError, match=r"spafl device install-ort-training.*make engines"):
        export_bundle(
            sparse(Dense),
            tmp_path / "b",
            name="b",
            input=spec,
            labels=("a", "b", "c"),
            engines=["ort_training"],
            stage=lambda name: stages.append(name),  # type: ignore[arg-type, return-value]
        )
    assert not stages
    assert not (tmp_path / "b").exists()


def test_another_release_is_no_use(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv(ort_training.VARIABLE, raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    with pytest.raises(SettingsError, match="it is not installed"):
        ort_training.find_python()
    python = ort_training.python_of(ort_training.environment())
    python.parent.mkdir(parents=True)
    python.write_text("#!/bin/sh\necho 1.18.0\n")
    python.chmod(0o755)
    with pytest.raises(SettingsError, match=r"needs ONNX Runtime Training 1\.19\.2; .* has 1\.18\.0"):
        ort_training.find_python()
    ort_training.installed.cache_clear()
    python.write_text("#!/bin/sh\necho 1.19.2\n")
    assert ort_training.find_python() == python


@needs_ort_training
def test_artifacts_train_as_pytorch_does() -> None:
    files, entry = artifacts(sparse(Attention))  # a difference raises
    assert set(entry.files) == {"training_model", "eval_model", "optimizer_model", "checkpoint"}
    assert set(entry.files.values()) == set(files)
    assert entry.requires == {"onnxruntime-training": "1.19.2"}
    assert entry.operators["training_model"]["SoftmaxCrossEntropyLossGrad"] == 1
    graph = onnx.load_from_string(files["ort_training/training_model.onnx"]).graph
    assert stops(graph) == 0
    assert [declared.name for declared in graph.output][:2] == ["loss", "correct"]


@needs_ort_training
def test_a_gradient_that_is_stopped_unseen_is_found_out() -> None:
    with pytest.raises(LoweringError, match=r"trains this model wrongly.*with detach\(\)"):
        artifacts(sparse(Hiding))


@needs_ort_training
def test_an_operation_without_gradient_is_refused_by_name() -> None:
    with pytest.raises(
        LoweringError, match=r"has no gradient for CumSum\. .*leave --engine ort_training out"
    ):
        artifacts(sparse(Cumulative))


@needs_ort_training
def test_a_crash_of_the_runtime_is_said_in_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    script = tmp_path / "crash.py"
    script.write_text("import os, signal; os.kill(os.getpid(), signal.SIGSEGV)")
    monkeypatch.setattr(ort_training_artifacts, "_WORKER", script)
    with pytest.raises(LoweringError, match="its process crashed"):
        ort_training_artifacts._run(ort_training.find_python(), "trial", tmp_path)
