"""Compact models in other numbers and opsets: what is in the file, what it cost, and what is refused."""

import json
import re
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
from onnx import TensorProto, numpy_helper
from typer.testing import CliRunner

from device_runtime import conversion
from device_runtime.command import app
from device_runtime.compaction import MODEL, compact, predict
from device_runtime.conversion import CALIBRATION, Conversion, at_opset
from device_runtime.data import load_data
from device_runtime.engines.engine import EngineError
from device_runtime.errors import DataError
from device_runtime.state import snapshot
from spafl.bundle import Bundle
from spafl.errors import SettingsError, SpaflError
from spafl.layout import Floats
from spafl.proof import PROOF, Precision, Proof

FP16 = 5e-3
"""Of the largest logit: float16 has 11 bits, and some hundred terms are summed."""
INT8 = 0.1
"""Of the largest logit: each of three layers rounds to 256 steps."""


def device(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Noise with one bright third, which the label names: learnt in a few epochs."""
    random = np.random.default_rng(0)
    x, y = random.integers(0, 100, (700, 8, 8), np.uint8), random.integers(0, 3, 700)
    for image, label in zip(x, y, strict=True):
        image[:, label * 3 : label * 3 + 2] += 60
    file = tmp_path_factory.mktemp("data") / "thirds.npz"
    np.savez(file, x=x, y=y)
    return file


@pytest.fixture(scope="module")
def trained(small_bundle_file: Path, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    state = tmp_path_factory.mktemp("trained") / "state"
    arguments = ("--bundle", small_bundle_file, "--state", state, "--data", data, "--rounds", 1)
    device("train", *arguments, "--epochs", 4, "--lr", "0.02", "--json")
    return state


@pytest.fixture
def compacted(trained: Path, data: Path, tmp_path: Path) -> Any:
    """Compacts into `tmp_path`/out with some options; returns the proof as it was written."""

    def run(*options: object) -> Proof:
        out = tmp_path / "out"
        told = json.loads(
            device("compact", "--state", trained, "--data", data, "--out", out, "--json", *options)
        )
        proof = Proof.from_text((out / PROOF).read_text())
        assert told == {"model": str(out / MODEL), **proof.to_json()}
        assert sorted(path.name for path in out.iterdir()) == [MODEL, PROOF]
        return proof

    return run


def held_out(state: Path, data: Path) -> tuple[Floats, Any]:
    bundle = snapshot(state)[1]
    local = load_data(str(data), bundle.manifest)
    return local.validation.inputs(bundle.manifest.input), local.validation.y


@pytest.mark.parametrize(("kind", "tolerance"), [("fp16", FP16), ("int8", INT8)])
def test_a_converted_model_is_plain_onnx_and_its_price_is_the_measured_one(
    kind: str, tolerance: float, compacted: Any, trained: Path, data: Path, tmp_path: Path
) -> None:
    plain = compacted()
    x, y = held_out(trained, data)
    before = predict(tmp_path / "out" / MODEL, x)
    proof = compacted(f"--{kind}")
    file = tmp_path / "out" / MODEL
    after, cost = predict(file, x), proof.precision
    assert plain.precision is None
    assert cost is not None
    assert proof.equal
    assert proof.compact.bytes == plain.compact.bytes  # of the compact model before it was converted
    assert (cost.kind, cost.examples) == (kind, len(x)) == (kind, 140)
    assert cost.calibration == (CALIBRATION if kind == "int8" else 0)
    assert cost.accuracy_before == (before.argmax(1) == y).mean() > 0.9
    assert cost.accuracy_after == (after.argmax(1) == y).mean() > 0.9
    assert cost.argmax_agreement == (after.argmax(1) == before.argmax(1)).mean()
    assert 0 < cost.relative_difference < tolerance
    np.testing.assert_allclose(
        cost.relative_difference, np.abs(after - before).max() / np.abs(before).max(), rtol=1e-3
    )
    assert cost.bytes == file.stat().st_size
    assert 0 < cost.latency_median_ms <= cost.latency_p95_ms

    model = onnx.load(file)
    onnx.checker.check_model(model, full_check=True)
    assert {node.domain for node in model.graph.node} == {""}
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 18)]
    ends = [*model.graph.input, *model.graph.output]
    assert [(end.name, end.type.tensor_type.elem_type) for end in ends] == [("x", 1), ("logits", 1)]
    weights = [tensor for tensor in model.graph.initializer if len(tensor.dims) > 1]
    assert len(weights) == 3
    assert {tensor.data_type for tensor in weights} == {
        TensorProto.FLOAT16 if kind == "fp16" else TensorProto.INT8
    }


def test_int8_has_a_scale_per_channel(compacted: Any, tmp_path: Path) -> None:
    compacted("--int8")
    graph = onnx.load(tmp_path / "out" / MODEL).graph
    tensors = {tensor.name: numpy_helper.to_array(tensor) for tensor in graph.initializer}
    weights = [node for node in graph.node if node.op_type == "DequantizeLinear" and node.input[0] in tensors]
    scaled = [(tensors[node.input[0]], tensors[node.input[1]]) for node in weights]
    wide = [(weight.shape, scale.shape) for weight, scale in scaled if weight.ndim > 1]
    assert len(wide) == 3
    assert all(len(scale) == 1 and scale[0] in (weight[0], weight[-1]) for weight, scale in wide)
    assert all(len(set(scale.tolist())) > 1 for weight, scale in scaled if weight.ndim > 1)


def test_int8_leaves_products_of_activations_in_float32() -> None:
    """Attention, and what is no layer: there int8 costs labels and time."""
    nodes = [
        onnx.helper.make_node("MatMul", ["x", "w"], ["q"]),
        onnx.helper.make_node("Transpose", ["q"], ["k"], perm=[0, 2, 1]),
        onnx.helper.make_node("MatMul", ["q", "k"], ["scores"]),
        onnx.helper.make_node("Softmax", ["scores"], ["logits"]),
    ]
    draw = np.random.default_rng(0)
    weight = numpy_helper.from_array(draw.normal(size=(6, 8)).astype(np.float32), "w")
    ends = [onnx.helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 4, size]) for name, size in
            (("x", 6), ("logits", 4))]  # fmt: skip
    graph = onnx.helper.make_graph(nodes, "g", ends[:1], ends[1:], [weight])
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    calibration = draw.normal(size=(20, 4, 6)).astype(np.float32)
    made = onnx.load_model_from_string(conversion.to_int8(model.SerializeToString(), calibration)).graph
    by_output = {node.output[0]: node for node in made.node}
    layer, scores = (node for node in made.node if node.op_type == "MatMul")
    assert [by_output[name].op_type for name in layer.input] == ["DequantizeLinear"] * 2
    assert by_output["logits"].op_type == "Softmax"
    assert by_output["logits"].input[0] == scores.output[0]  # nothing rounds between them


def test_int8_is_calibrated_on_what_accuracy_is_not_measured_on(
    compacted: Any, trained: Path, data: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def spy(model: bytes, calibration: Floats) -> bytes:
        seen.append(calibration)
        return real(model, calibration)

    real = conversion.to_int8
    monkeypatch.setattr(conversion, "to_int8", spy)
    compacted("--int8")
    bundle = snapshot(trained)[1]
    local = load_data(str(data), bundle.manifest)
    rows = {part: {x.tobytes() for x in getattr(local, part).inputs(bundle.manifest.input)} for part in
            ("train", "validation")}  # fmt: skip
    drawn = {x.tobytes() for x in seen[0]}
    assert len(drawn) == CALIBRATION
    assert drawn <= rows["train"]
    assert not drawn & rows["validation"]


def test_an_opset_is_what_is_written_and_proven(compacted: Any, tmp_path: Path) -> None:
    proof = compacted("--opset", 16)
    model = onnx.load(tmp_path / "out" / MODEL)
    assert [(entry.domain, entry.version) for entry in model.opset_import] == [("", 16)]
    onnx.checker.check_model(model, full_check=True)
    assert proof.equal
    assert proof.precision is None
    assert proof.compact.bytes == (tmp_path / "out" / MODEL).stat().st_size
    both = compacted("--int8", "--opset", 17).precision
    assert both is not None
    assert both.kind == "int8"
    assert onnx.load(tmp_path / "out" / MODEL).opset_import[0].version == 17


def refusal(state: Path, data: object, out: Path, *options: object) -> tuple[SpaflError, list[str]]:
    """The error of a refused call, and what lies in `out` afterwards."""
    arguments = ("compact", "--state", state, "--data", data, "--out", out, "--json", *options)
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, SpaflError), result.output
    assert len(str(result.exception).splitlines()) == 1
    return result.exception, sorted(path.name for path in out.iterdir()) if out.exists() else []


def test_an_opset_an_operator_has_no_form_in_is_refused_with_the_lowest_there_is(
    trained: Path, data: Path, tmp_path: Path
) -> None:
    error, left = refusal(trained, data, tmp_path / "out", "--opset", 11)
    found = re.search(r"cannot be had in opset 11 \(.*Shape.*\): (\d+) is the lowest it can be", str(error))
    assert found
    assert left == []
    lowest = int(found[1])
    device(
        "compact", "--state", trained, "--data", data, "--out", tmp_path / "at", "--opset", lowest, "--json"
    )
    error, _ = refusal(trained, data, tmp_path / "out", "--opset", lowest - 1)
    assert f"{lowest} is the lowest" in str(error)
    error, _ = refusal(trained, data, tmp_path / "out", "--opset", 999)
    assert re.search(r"--opset 999: expected 1 to \d+", str(error))


def test_an_opset_this_runtime_does_not_run_is_refused(
    small_bundle: Bundle, compacted: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compacted()
    model = (tmp_path / "out" / MODEL).read_bytes()

    def too_new(*arguments: object) -> None:
        raise EngineError("unsupported")

    monkeypatch.setattr(conversion, "session", too_new)
    with pytest.raises(EngineError, match=r"onnxruntime .* does not run this model in opset 19: choose a l"):
        at_opset(model, 19)


def wrecked(model: bytes, calibration: Floats) -> bytes:
    """A conversion that loses everything: weights with the other sign."""
    parsed = onnx.load_model_from_string(model)
    for tensor in parsed.graph.initializer:
        if tensor.data_type == TensorProto.FLOAT:
            tensor.CopyFrom(numpy_helper.from_array(-numpy_helper.to_array(tensor), tensor.name))
    return bytes(parsed.SerializeToString())


def test_too_much_accuracy_lost_replaces_nothing(
    compacted: Any, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    compacted()
    out = tmp_path / "out"
    before = {path.name: path.read_bytes() for path in out.iterdir()}
    monkeypatch.setattr(conversion, "to_int8", wrecked)
    error, _ = refusal(trained, data, out, "--int8")
    words = r"int8 costs \d+\.\d points of accuracy \(\d+\.\d% => \d+\.\d% of 140 held-out examples\), at most 2 may"
    assert re.match(words, str(error))
    assert {path.name: path.read_bytes() for path in out.iterdir()} == before
    proof = compacted("--int8", "--max-drop", 100)
    assert proof.precision.accuracy_after < proof.precision.accuracy_before - 0.02
    assert (out / MODEL).read_bytes() != before[MODEL]


@pytest.mark.parametrize(("lost", "refused"), [(2, False), (3, True)])
def test_the_bound_is_inclusive(lost: int, refused: bool, tmp_path: Path) -> None:
    cost = Precision(
        kind="int8",
        examples=100,
        calibration=1,
        accuracy_before=0.90,
        accuracy_after=0.90 - lost / 100,
        argmax_agreement=1.0,
        relative_difference=0.0,
        bytes=1,
        latency_median_ms=1.0,
        latency_p95_ms=1.0,
    )
    if refused:
        with pytest.raises(EngineError, match=r"costs 3\.0 points"):
            Conversion("int8").refuse_loss(cost, tmp_path)
    else:
        Conversion("int8").refuse_loss(cost, tmp_path)


def test_numbers_too_large_for_float16_are_refused_whatever_may_be_lost(
    compacted: Any, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def overflowing(model: bytes) -> bytes:
        parsed = onnx.load_model_from_string(model)
        for tensor in parsed.graph.initializer:
            if tensor.data_type == TensorProto.FLOAT:
                tensor.CopyFrom(numpy_helper.from_array(numpy_helper.to_array(tensor) * 1e30, tensor.name))
        return bytes(parsed.SerializeToString())

    monkeypatch.setattr(conversion, "to_float16", overflowing)
    error, left = refusal(trained, data, tmp_path / "out", "--fp16", "--max-drop", 100)
    assert "logits are not finite" in str(error)
    assert left == []


@pytest.mark.parametrize("option", ["--int8", "--fp16", "--opset 17"])
def test_without_the_package_onnx_nothing_is_begun(
    option: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "onnx", None)
    error, left = refusal(tmp_path / "no-state", "no-data", tmp_path / "out", *option.split())
    assert str(error).startswith(f"{option.split()[0]} needs the package onnx")
    assert str(error).endswith("pip install onnx")
    assert left == []


@pytest.mark.parametrize(
    ("options", "kind", "words"),
    [
        (("--int8", "--fp16"), SettingsError, "--fp16 and --int8 exclude each other"),
        (("--int8", "--programs", "http://127.0.0.1:9"), SettingsError, "are of model.onnx"),
        (("--opset", 17, "--programs", "http://127.0.0.1:9"), SettingsError, "are of model.onnx"),
        (("--int8", "--validation", 0), DataError, "leaves no examples to measure accuracy on"),
    ],
)
def test_what_does_not_go_together(
    options: tuple[object, ...], kind: type[SpaflError], words: str, trained: Path, data: Path, tmp_path: Path
) -> None:
    error, left = refusal(trained, data, tmp_path / "out", *options)
    assert isinstance(error, kind)
    assert words in str(error)
    assert left == []


def test_a_conversion_needs_labels_and_calibration_examples(small_bundle: Bundle, tmp_path: Path) -> None:
    x = np.zeros((4, 1, 8, 8), np.float32)
    state, labels = small_bundle.initial_state(), np.zeros(4, np.int64)
    for wanted, words in (
        (Conversion("fp16"), "--fp16 is measured by accuracy: got 0 labels for 4 examples"),
        (Conversion("int8", labels=labels), "--int8 takes its ranges from training examples, got none"),
    ):
        with pytest.raises(EngineError, match=words):
            compact(small_bundle, state, tmp_path / "out", x, conversion=wanted)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("error", [ValueError("no such operator\nand more"), KeyError("x")])
def test_what_the_tools_raise_is_told_in_one_line(
    error: Exception, trained: Path, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(*arguments: object) -> bytes:
        raise error

    monkeypatch.setattr(conversion, "to_float16", fails)
    told, left = refusal(trained, data, tmp_path / "out", "--fp16")
    assert f"cannot be had in fp16 ({type(error).__name__}: " in str(told)
    assert left == []


def test_people_see_the_price(trained: Path, data: Path, tmp_path: Path) -> None:
    text = device("compact", "--state", trained, "--data", data, "--out", tmp_path, "--int8")
    assert re.search(
        r"^int8 +examples 140 .*accuracy_before .*accuracy_after .*bytes \d+", text, re.MULTILINE
    )
    assert "precision" not in text
    assert "precision" not in device("compact", "--state", trained, "--data", data, "--out", tmp_path)
