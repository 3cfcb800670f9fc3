"""`spafl inspect`: its numbers are those of proofs, bundles and runtimes, and a hostile file gets one line."""

import json
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import safetensors.numpy
from onnx import TensorProto, helper, numpy_helper
from typer.testing import CliRunner

from device_runtime.compaction import MODEL, compact
from device_runtime.conversion import Conversion
from device_runtime.state import BASE, DeviceState
from export import inspected_file, inspected_graph, inspected_program
from export.inspect_command import app
from export.inspected_file import InspectError
from spafl import algorithm
from spafl.bundle import Bundle, write_bundle
from spafl.errors import BundleError, SettingsError, SpaflError
from spafl.layout import Floats
from spafl.proof import PROOF, Proof
from spafl.protocol import Lease, Policy
from spafl.wire import Thresholds, encode_thresholds

FLIPS = 150
"""Files with damaged bytes, each read in a millisecond or two."""


def told(*arguments: object) -> dict[str, Any]:
    text = shown(*arguments, "--json")
    facts: dict[str, Any] = json.loads(text)
    assert len(text.splitlines()) == 1
    return facts


def shown(*arguments: object) -> str:
    result = CliRunner().invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(*arguments: object, kind: type[SpaflError] = InspectError) -> str:
    """What a refused call says, one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])
    assert isinstance(result.exception, kind), result.output
    assert result.stdout == ""
    assert len(str(result.exception).splitlines()) == 1
    return str(result.exception)


@pytest.fixture(scope="module")
def half(small_bundle: Bundle) -> dict[str, Floats]:
    """A state of the small bundle with half of its filters active."""
    state, layout = small_bundle.initial_state(), small_bundle.manifest.layout
    return state | layout.split(algorithm.thresholds_at(layout, state, 0.5, np.random.default_rng(2)))


@pytest.fixture(scope="module")
def examples() -> Floats:
    return np.random.default_rng(3).normal(size=(30, 1, 8, 8)).astype(np.float32)


def device_state(folder: Path, bundle: Bundle, tensors: dict[str, Floats]) -> Path:
    """A device's state directory that holds `tensors`."""
    lease = Lease(
        run="r", round=0, version=0, bundle=bundle.id, layout=bundle.manifest.layout.id, expires=1e12,
        deadline=1e12, rounds=1, precision="f32", policy=Policy(),
        hyperparameters={"epochs": 1, "batch_size": 1, "lr": 0.1, "coeff": 0.1},
    )  # fmt: skip
    with DeviceState(folder) as opened:
        opened.leased(lease)
        opened.trained(tensors, bundle.initial_thresholds(), "{}")
    return folder


# ------------------------------------------------------------------------------------------------ bundles


def test_a_bundle_in_its_initial_state(small_bundle_file: Path, small_bundle: Bundle, tmp_path: Path) -> None:
    facts, manifest = told(small_bundle_file), small_bundle.manifest
    assert (facts["kind"], facts["name"], facts["id"]) == ("bundle", "small", small_bundle.id)
    assert facts["input"] == {"shape": [1, 8, 8], "mean": [0.5], "std": [0.25], "ids": None}
    assert facts["labels"] == ["a", "b", "c"]
    assert facts["train_step"] == {"form": "rows", "reason": manifest.train_step.reason}
    assert facts["state"] == "initial"
    # conv 1 -> 6, 3x3, of 6x6 places; linear 54 -> 8; head 8 -> 3, not masked
    names = ("layer", "kind", "filters", "weights_per_filter", "positions", "weights", "flops", "thresholds")
    assert [tuple(layer[name] for name in names) for layer in facts["layers"]] == [
        ("0", "conv", 6, 9, 36, 54, 2 * 54 * 36, 6),
        ("5", "linear", 8, 54, 1, 432, 2 * 432, 8),
        ("7", "linear", 3, 8, 1, 24, 48, 0),
    ]
    assert [layer["density"] for layer in facts["layers"]] == [1.0, 1.0, None]
    assert facts["density"] == {"mean_of_layers": 1.0, "by_weights": 1.0, "by_flops": 1.0}
    trained = [tensor for tensor in manifest.state if tensor.role in ("weight", "parameter")]
    parameters = sum(int(np.prod(tensor.shape)) for tensor in trained)
    assert facts["totals"] == {
        "parameters": parameters, "thresholds": 14, "weights": 510, "flops": 3888 + 864 + 48,
        "kept_weights": 510, "kept_flops": 4800,
    }  # fmt: skip
    body = encode_thresholds(manifest.layout, Thresholds(small_bundle.initial_thresholds(), 0))
    assert (facts["wire"]["thresholds_f32"], facts["wire"]["weights_f32"]) == (len(body), 4 * parameters)
    assert len(body) - facts["wire"]["thresholds_f16"] >= 2 * 14 - 4  # padding of the header aside
    engine = facts["engines"]["onnx"]
    assert engine["requires"] == {"opset": "18", "ir_version": "8"}
    assert engine["operators"] == manifest.engines["onnx"].operators
    assert engine["files"]["infer"] == {"name": "infer.onnx", "bytes": len(small_bundle.read("infer.onnx"))}
    assert facts["files"] == {name: entry.bytes for name, entry in manifest.files.items()}
    assert facts["producer"] == manifest.producer
    unpacked = tmp_path / "unpacked"
    write_bundle(unpacked, manifest, {name: small_bundle.read(name) for name in manifest.files})
    assert told(unpacked) == {**facts, "path": str(unpacked)}


@pytest.mark.parametrize("where", ["a device's directory", "its state file", "a file without base"])
def test_a_devices_state_has_the_figures_of_its_proof(
    where: str,
    small_bundle: Bundle,
    small_bundle_file: Path,
    half: dict[str, Floats],
    examples: Floats,
    tmp_path: Path,
) -> None:
    folder = device_state(tmp_path / "phone", small_bundle, half)
    (state,) = folder.glob("state-*.safetensors")
    assert BASE in safetensors.numpy.load_file(state)
    if where == "a device's directory":
        state = folder
    elif where == "a file without base":
        state = tmp_path / "s.safetensors"
        safetensors.numpy.save_file(half, state)
    facts = told(small_bundle_file, "--state", state)
    proof = compact(small_bundle, half, tmp_path / "out", examples, runs=1)
    assert facts["state"] == str(state)
    assert {
        layer["layer"]: layer["density"] for layer in facts["layers"] if layer["thresholds"]
    } == proof.density
    assert [
        {"layer": layer["layer"], "kept": layer["kept"], "total": layer["filters"], "reason": layer["reason"]}
        for layer in facts["layers"]
    ] == [layer.to_json() for layer in proof.layers]
    totals = facts["totals"]
    assert (totals["weights"], totals["flops"]) == (proof.masked.weights, proof.masked.flops)
    assert (totals["kept_weights"], totals["kept_flops"]) == (proof.compact.weights, proof.compact.flops)
    assert sum(layer["kept_flops"] for layer in facts["layers"]) == proof.compact.flops < proof.masked.flops
    assert facts["density"]["mean_of_layers"] == 0.5


def test_a_layer_without_active_filters_says_so(
    small_bundle: Bundle, small_bundle_file: Path, half: dict[str, Floats], tmp_path: Path
) -> None:
    safetensors.numpy.save_file(
        {**half, "5.threshold": np.full(8, 99, np.float32)}, tmp_path / "s.safetensors"
    )
    layer = told(small_bundle_file, "--state", tmp_path / "s.safetensors")["layers"][1]
    assert (layer["kept"], layer["density"]) == (1, 0.0)
    assert ": one is kept" in layer["reason"]


def test_people_see_a_table_with_reasons(small_bundle_file: Path) -> None:
    text = shown(small_bundle_file)
    assert re.search(r"^ 0 +conv +6 +9 +36 +6 +1\.000 +3,888 +6 of 6", text, re.MULTILINE)
    assert re.search(r"^0, 5 +pruned channels are left out", text, re.MULTILINE)
    assert re.search(r"^7 +not masked", text, re.MULTILINE)
    assert "--json has all of it" not in text
    assert re.search(r"^engine onnx +needs ir_version 8, opset 18", text, re.MULTILINE)


def test_a_long_reason_is_cut_for_people_only(small_bundle: Bundle, tmp_path: Path) -> None:
    manifest = small_bundle.manifest
    step = replace(manifest.train_step, reason="blocks.0.query keeps all rows; " * 100)
    files = {name: small_bundle.read(name) for name in manifest.files}
    write_bundle(tmp_path / "b", replace(manifest, train_step=step), files)
    assert "--json has all of it" in " ".join(shown(tmp_path / "b").split())
    assert told(tmp_path / "b")["train_step"]["reason"] == step.reason


def test_states_that_are_none(
    small_bundle: Bundle, small_bundle_file: Path, half: dict[str, Floats], tmp_path: Path
) -> None:
    def said(state: Path, kind: type[SpaflError] = InspectError) -> str:
        return refused(small_bundle_file, "--state", state, kind=kind)

    (tmp_path / "noise.safetensors").write_bytes(b"\xff" * 64)
    assert "is not a safetensors file" in said(tmp_path / "noise.safetensors")
    (tmp_path / "big.safetensors").write_bytes(bytes(3 << 20))
    assert "not read further" in said(tmp_path / "big.safetensors")
    assert "no file at" in said(tmp_path / "missing")
    (tmp_path / "empty").mkdir()
    assert "is not a device's state directory: it has no journal.json" in said(tmp_path / "empty")
    less = {name: value for name, value in half.items() if name != "7.bias"}
    safetensors.numpy.save_file(less, tmp_path / "less.safetensors")
    assert "missing or unknown: ['7.bias']" in said(tmp_path / "less.safetensors", BundleError)

    journal = device_state(tmp_path / "phone", small_bundle, half) / "journal.json"
    good = json.loads(journal.read_text())
    for damage, words in {
        "../../secret": "names '../../secret' as its state",
        "state-1.safetensors/../../x": "as its state: expected state-N.safetensors",
        7: "names 7 as its state",
    }.items():
        journal.write_text(json.dumps({**good, "state": damage}))
        assert words in said(tmp_path / "phone")
    journal.write_text(json.dumps({**good, "state": None}))
    assert "holds no model yet" in said(tmp_path / "phone")
    journal.write_text(json.dumps({**good, "bundle": "f" * 64}))
    assert "holds a model of bundle 'ffffffffffff" in said(tmp_path / "phone")
    journal.write_text("[" * 100_000)
    assert "is not JSON" in said(tmp_path / "phone")
    journal.write_text("[]")
    assert "holds no model yet" in said(tmp_path / "phone")


@pytest.mark.parametrize(
    "lie",
    [
        {"live": (("nowhere",),)},
        {"live": (("5",),)},
        {"live": ((),)},
        {"reads": {"nowhere": 9}},
        {"blocks": 4},
    ],
    ids=str,
)
def test_a_manifest_whose_compaction_does_not_fit_is_refused(
    lie: dict[str, Any], small_bundle: Bundle, tmp_path: Path
) -> None:
    manifest = small_bundle.manifest
    lying = replace(manifest, compaction=(replace(manifest.compaction[0], **lie), *manifest.compaction[1:]))
    write_bundle(tmp_path / "b", lying, {name: small_bundle.read(name) for name in manifest.files})
    assert "compacting '0' does not fit its layout: export the bundle again" in refused(tmp_path / "b")


def test_a_damaged_bundle(small_bundle: Bundle, tmp_path: Path) -> None:
    manifest = small_bundle.manifest
    write_bundle(tmp_path / "b", manifest, {name: small_bundle.read(name) for name in manifest.files})
    (tmp_path / "b" / "infer.onnx").write_bytes(b"other")
    assert "infer.onnx" in refused(tmp_path / "b", kind=BundleError)
    (tmp_path / "b.zip").write_bytes(b"PK\x03\x04 nothing")
    assert "cannot read bundle" in refused(tmp_path / "b.zip", kind=BundleError)


def test_other_files_and_folders_are_told_what_to_do(
    small_bundle: Bundle, half: dict[str, Floats], tmp_path: Path
) -> None:
    (tmp_path / "notes.txt").write_text("text")
    assert "cannot tell what" in refused(tmp_path / "notes.txt")
    assert "no file at" in refused(tmp_path / "missing.zip")
    assert "is not a bundle: it has no manifest.json" in refused(tmp_path)
    phone = device_state(tmp_path / "phone", small_bundle, half)
    manifest = small_bundle.manifest
    write_bundle(phone / "bundle", manifest, {name: small_bundle.read(name) for name in manifest.files})
    said = refused(phone)
    assert "is a device's state: spafl inspect" in said
    file, option, state = said.rpartition("spafl inspect ")[2].split()[:3]
    assert told(file, option, state)["totals"]["kept_weights"] < 510  # what it says to do works
    (tmp_path / "m.onnx").touch()
    assert "--state goes with a bundle" in refused(tmp_path / "m.onnx", "--state", phone, kind=SettingsError)


# ------------------------------------------------------------------------------------------------ .onnx


@pytest.mark.parametrize("kind", ["fp32", "fp16", "int8"])
def test_a_compact_model_has_the_figures_of_its_proof(
    kind: Any, small_bundle: Bundle, half: dict[str, Floats], examples: Floats, tmp_path: Path
) -> None:
    labels = np.zeros(len(examples), np.int64)
    conversion = Conversion(kind, labels=labels, calibration=examples, max_drop=1.0)
    proof = compact(small_bundle, half, tmp_path, examples, conversion=conversion, runs=1)
    facts = told(tmp_path / MODEL)
    assert facts["precision"] == kind
    assert facts["totals"]["flops"] == proof.compact.flops
    assert facts["totals"]["weights"] == proof.compact.weights
    # 3 of 6 filters, 4 of 8 neurons, 3 labels: norms are folded, each layer has a bias
    assert facts["totals"]["parameters"] == proof.compact.weights + 3 + 4 + 3
    assert facts["bytes"] == (tmp_path / MODEL).stat().st_size
    assert facts["opset"] == {"ai.onnx": 18}
    assert facts["ir_version"] == 8
    assert facts["inputs"] == [{"name": "x", "dtype": "float32", "shape": ["batch", 1, 8, 8]}]
    assert facts["outputs"] == [{"name": "logits", "dtype": "float32", "shape": [None, 3]}]
    assert facts["layers"][0]["shape"] == [3, 1, 3, 3]
    assert {layer["dtype"] for layer in facts["layers"]} == {
        {"fp32": "float32", "fp16": "float16", "int8": "int8"}[kind]
    }
    assert facts["operators"]["Conv"] == 1
    assert facts["proof"] == json.loads((tmp_path / PROOF).read_text())
    assert facts["notes"] == []
    text = shown(tmp_path / MODEL)
    assert "equal to the masked model" in text
    assert (f"then {kind}: accuracy" in text) == (kind != "fp32")


def test_a_proof_of_another_model_is_not_shown_as_this_ones(
    small_bundle: Bundle, half: dict[str, Floats], examples: Floats, tmp_path: Path
) -> None:
    compact(small_bundle, half, tmp_path, examples, runs=1)
    proof = Proof.from_text((tmp_path / PROOF).read_text())
    other = replace(proof, compact=replace(proof.compact, bytes=5))
    (tmp_path / PROOF).write_text(other.to_text())
    facts = told(tmp_path / MODEL)
    assert (facts["proof"], facts["notes"]) == (
        None,
        ["proof.json beside it is of another model, of 5 bytes"],
    )
    for text, words in {
        "{": "is not a proof",
        "[1]": "is not a proof",
        " " * 2_000_000: "expected at most",
    }.items():
        (tmp_path / PROOF).write_text(text)
        facts = told(tmp_path / MODEL)
        assert facts["proof"] is None
        assert words in facts["notes"][0]


def test_the_graphs_of_a_bundle_lack_their_weights_and_say_so(small_bundle: Bundle, tmp_path: Path) -> None:
    (tmp_path / "infer.onnx").write_bytes(small_bundle.read("infer.onnx"))
    facts = told(tmp_path / "infer.onnx")
    assert facts["external_data"] == [{"file": "state", "bytes": None}]
    assert [layer["weight"] for layer in facts["layers"]] == ["0.weight", "5.weight", "7.weight"]
    assert facts["totals"]["flops"] is None  # how many filters are active is not in the file
    (tmp_path / "begin_round.onnx").write_bytes(small_bundle.read("begin_round.onnx"))
    assert told(tmp_path / "begin_round.onnx")["layers"] == []


def model_of(nodes: list[Any], shape: list[Any], **tensors: Floats) -> onnx.ModelProto:
    return helper.make_model(
        helper.make_graph(
            nodes,
            "g",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
            [numpy_helper.from_array(np.asarray(value), name) for name, value in tensors.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )


def ones(*shape: int) -> Floats:
    return np.ones(shape, np.float32)


ODD = [  # what computes y from x, the input's shape, weights, groups, FLOPs of one example by hand
    ("Conv", {"group": 2, "strides": [2, 2], "pads": [1, 1, 1, 1]}, ["n", 4, 8, 8], ones(6, 2, 3, 3), 2, 2 * 108 * 16),
    ("Conv", {"group": 4}, ["n", 4, 10], ones(4, 1, 3), 4, 2 * 12 * 8),
    ("ConvTranspose", {"strides": [2, 2]}, ["n", 3, 5, 5], ones(3, 2, 2, 2), 1, 2 * 24 * 25),
    ("Gemm", {"transB": 1}, ["n", 7], ones(5, 7), 1, 2 * 35),
    ("Gemm", {}, [1, 7], ones(7, 5), 1, 2 * 35),
    ("MatMul", {}, ["n", 9, 7], ones(7, 5), 1, 2 * 9 * 35),  # nine tokens
    ("MatMul", {}, ["n", 3, 9, 7], ones(3, 7, 5), 1, 3 * 2 * 9 * 35),  # three heads, nine tokens
]  # fmt: skip


@pytest.mark.parametrize(("op", "attributes", "shape", "weight", "groups", "flops"), ODD)
def test_flops_by_hand(
    op: str,
    attributes: dict[str, Any],
    shape: list[Any],
    weight: Floats,
    groups: int,
    flops: int,
    tmp_path: Path,
) -> None:
    onnx.save(
        model_of([helper.make_node(op, ["x", "w"], ["y"], **attributes)], shape, w=weight),
        tmp_path / "m.onnx",
    )
    facts = told(tmp_path / "m.onnx")
    (layer,) = facts["layers"]
    assert (layer["op"], layer["groups"], layer["shape"]) == (op, groups, list(weight.shape))
    assert (layer["weights"], layer["flops"]) == (weight.size, flops)
    assert facts["totals"] == {"parameters": weight.size, "weights": weight.size, "flops": flops}


def test_a_product_of_activations_is_no_layer(tmp_path: Path) -> None:
    nodes = [
        helper.make_node("Transpose", ["x"], ["t"], perm=[0, 2, 1]),
        helper.make_node("MatMul", ["x", "t"], ["y"]),
    ]
    onnx.save(model_of(nodes, ["n", 3, 4]), tmp_path / "m.onnx")
    facts = told(tmp_path / "m.onnx")
    assert facts["layers"] == []
    assert facts["totals"]["flops"] is None
    assert "no layer has weights" in facts["notes"][0]


def test_operators_of_subgraphs_are_counted(tmp_path: Path) -> None:
    output = helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])
    branches = [
        helper.make_graph([helper.make_node(op, ["x"], ["c"])], "b", [], [output]) for op in ("Neg", "Exp")
    ]
    node = helper.make_node("If", ["x"], ["y"], then_branch=branches[0], else_branch=branches[1])
    onnx.save(model_of([node], [1]), tmp_path / "m.onnx")
    assert told(tmp_path / "m.onnx")["operators"] == {"Exp": 1, "If": 1, "Neg": 1}


def test_data_beside_a_model_is_weighed_but_not_opened(tmp_path: Path) -> None:
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 40], w=ones(40, 30))
    onnx.save(model, tmp_path / "m.onnx", save_as_external_data=True, location="m.data", size_threshold=0)
    facts = told(tmp_path / "m.onnx")
    assert facts["external_data"] == [{"file": "m.data", "bytes": 4800}]
    assert facts["totals"]["parameters"] == 1200
    (tmp_path / "m.data").chmod(0)
    assert told(tmp_path / "m.onnx") == facts


@pytest.mark.parametrize("location", ["../secret", "/etc/hostname", "sub/../../secret", "link", "", "a\0b"])
def test_data_outside_the_folder_is_refused(location: str, tmp_path: Path) -> None:
    (tmp_path / "secret").write_bytes(bytes(16))
    folder = tmp_path / "folder"
    folder.mkdir()
    (folder / "link").symlink_to(tmp_path / "secret")
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 4], w=ones(4, 1))
    tensor = model.graph.initializer[0]
    tensor.ClearField("raw_data")
    tensor.data_location = TensorProto.EXTERNAL
    entry = tensor.external_data.add()
    entry.key, entry.value = "location", location
    (folder / "m.onnx").write_bytes(model.SerializeToString())
    assert "outside the model's folder: not followed" in refused(folder / "m.onnx")


def test_data_outside_hides_in_no_attribute_or_subgraph(tmp_path: Path) -> None:
    hidden = numpy_helper.from_array(ones(2), "c")
    hidden.ClearField("raw_data")
    hidden.data_location = TensorProto.EXTERNAL
    entry = hidden.external_data.add()
    entry.key, entry.value = "location", "../secret"
    constant = helper.make_node("Constant", [], ["c"], value=hidden)
    branch = helper.make_graph(
        [constant], "b", [], [helper.make_tensor_value_info("c", TensorProto.FLOAT, [2])]
    )
    for nodes in (
        [constant, helper.make_node("Add", ["x", "c"], ["y"])],
        [helper.make_node("If", ["x"], ["y"], then_branch=branch, else_branch=branch)],
    ):
        (tmp_path / "m.onnx").write_bytes(model_of(nodes, [2]).SerializeToString())
        assert "outside the model's folder" in refused(tmp_path / "m.onnx")


def test_files_that_are_no_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "m.onnx"
    model = model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 4], w=ones(4, 1))
    whole = model.SerializeToString()

    def said(data: bytes) -> str:
        file.write_bytes(data)
        return refused(file)

    assert "is not an ONNX model" in said(b"")
    assert "is not an ONNX model" in said(b"hello, world\n")
    assert "is not an ONNX model" in said(b"\x89PNG\r\n\x1a\n" + bytes(100))
    assert "is not an ONNX model" in said(whole[:-5])
    model.graph.initializer[0].raw_data = bytes(12)
    assert "tensor 'w' of shape [4, 1] holds 12 bytes, expected 16" in said(model.SerializeToString())
    model.graph.initializer[0].ClearField("raw_data")
    assert "holds 0 numbers, expected 4" in said(model.SerializeToString())
    model.graph.initializer[0].dims[0] = -4
    assert "has shape [-4, 1]" in said(model.SerializeToString())
    model.graph.initializer[0].dims[0] = 2**60
    assert "expected 1,152,921,504,606,846,976" in said(model.SerializeToString())
    monkeypatch.setattr(inspected_graph, "MAX_MODEL_BYTES", 50)
    assert f"has {len(whole)} bytes, expected at most 50: not read further" in said(whole)
    file.unlink()
    file.mkdir()
    assert "is not a bundle" in refused(file)


def test_the_size_is_bounded_before_it_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file of 8 GiB, of which nothing is on the disk, and a pipe that never ends."""
    with (tmp_path / "m.pte").open("wb") as sparse:
        sparse.truncate(8 << 30)
    monkeypatch.setattr(inspected_program, "MAX_MODEL_BYTES", 1 << 20)
    assert "has 8,589,934,592 bytes, expected at most 1,048,576" in refused(tmp_path / "m.pte")
    assert inspected_file.MAX_MODEL_BYTES == 1 << 30
    (tmp_path / "zero.onnx").symlink_to("/dev/zero")
    assert "no file at" in refused(tmp_path / "zero.onnx")


def test_control_characters_do_not_reach_the_terminal(tmp_path: Path) -> None:
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="a\x1b[2Jb[bold]")
    model = model_of([node], ["n\x1b]0;owned\x07", 4], w=ones(4, 1))
    model.producer_name = "p\x1b[31m\nsecond"
    (tmp_path / "m.onnx").write_bytes(model.SerializeToString())
    text = shown(tmp_path / "m.onnx")
    assert "\x1b" not in text
    assert "\x07" not in text
    assert "a?[2Jb[bold]" in text
    assert "p?[31m?second" in text


def damaged(file: Path, data: bytes, seed: int) -> int:
    """Reads `data` with bytes changed at random: either facts or an InspectError. Returns how many were refused."""
    draw, refusals = np.random.default_rng(seed), 0
    for _ in range(FLIPS):
        changed = bytearray(data)
        for at in draw.integers(0, len(data), draw.integers(1, 6)):
            changed[at] = draw.integers(256)
        file.write_bytes(bytes(changed))
        result = CliRunner().invoke(app, [str(file)])
        refusals += result.exit_code != 0
        assert result.exit_code == 0 or isinstance(result.exception, InspectError), bytes(changed).hex()
    return refusals


def test_damaged_models_are_refused_or_read(small_bundle: Bundle, tmp_path: Path) -> None:
    model = model_of(
        [helper.make_node("Conv", ["x", "w"], ["c"], group=2), helper.make_node("Relu", ["c"], ["y"])],
        ["n", 4, 5, 5],
        w=ones(2, 2, 3, 3),
    )
    assert damaged(tmp_path / "m.onnx", model.SerializeToString(), 1) > 0
    damaged(tmp_path / "m.onnx", small_bundle.read("infer.onnx"), 2)


# ------------------------------------------------------------------------------------------------ .pte


@pytest.fixture(scope="module")
def program() -> bytes:
    """A small ExecuTorch program."""
    pytest.importorskip("executorch", reason="pip install --no-deps executorch==1.5.1")
    from tests.export.small_program import small_program

    return small_program()


def test_a_program_is_what_executorch_reads_in_it(program: bytes, tmp_path: Path) -> None:
    from executorch.exir._serialize._program import deserialize_pte_binary

    (tmp_path / "m.pte").write_bytes(program)
    facts = told(tmp_path / "m.pte")
    read = deserialize_pte_binary(program)
    (plan,) = getattr(read, "program", read).execution_plan
    (method,) = facts["methods"]
    assert (facts["kind"], facts["schema"], facts["bytes"]) == ("executorch", "ET12", len(program))
    assert facts["release"] is None
    assert method["name"] == plan.name == "forward"
    assert method["inputs"] == [{"dtype": "float32", "shape": [16, 6], "varies": True}]
    assert method["outputs"] == [{"dtype": "float32", "shape": [16, 3], "varies": True}]
    names = {f"{operator.name}.{operator.overload}".rstrip(".") for operator in plan.operators}
    assert set(method["operators"]) == names
    assert sum(method["operators"].values()) == sum(len(chain.instructions) for chain in plan.chains)
    assert method["delegates"] == {}
    assert method["memory_bytes"] == sum(plan.non_const_buffer_sizes)
    text = shown(tmp_path / "m.pte")
    assert "(16, 6) at most" in text
    assert "release" in text


def test_programs_cut_short_or_damaged(program: bytes, tmp_path: Path) -> None:
    file = tmp_path / "m.pte"
    for length in (0, 4, 7):
        file.write_bytes(program[:length])
        assert "is not an ExecuTorch program" in refused(file)
    for length in range(8, len(program), max(1, len(program) // 40)):
        file.write_bytes(program[:length])
        result = CliRunner().invoke(app, [str(file)])
        assert result.exit_code == 0 or isinstance(result.exception, InspectError), length
    file.write_bytes(program[:40])
    assert "damaged or truncated" in refused(file)
    assert damaged(file, program, 3) > 0


def test_other_files_called_pte(tmp_path: Path) -> None:
    file = tmp_path / "m.pte"
    file.write_bytes(b"PK\x03\x04" + bytes(60))
    assert "expected 'ET..' as bytes 4 to 7, got b'\\x00\\x00\\x00\\x00'" in refused(file)
    file.write_bytes(b"\xff\xff\xff\x7fET12" + bytes(60))
    assert "damaged or truncated" in refused(file)
    file.write_bytes(b"\x08\x00\x00\x00ET12" + b"\xff" * 60)  # tables at offsets before the file's beginning
    assert "damaged or truncated" in refused(file)
    file.write_bytes(b"\x20\x00\x00\x00ET12eh00" + (24).to_bytes(4, "little") + b"\xff" * 60)
    assert "its header tells of 18,446,744,073,709,551,615 bytes" in refused(file)


# ------------------------------------------------------------------------------------------------ the process


def spafl(script: str, *arguments: object) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-W", "error", "-c", script + "\nfrom spafl.cli import main; main()", *map(str, arguments)],
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def without(*packages: str) -> str:
    return f"import sys\nfor name in {packages!r}: sys.modules[name] = None"


def test_a_bundle_needs_no_torch_no_onnx_and_no_runtime(small_bundle_file: Path, tmp_path: Path) -> None:
    wall = without("torch", "onnx", "onnxruntime", "fastapi", "sklearn")
    done = spafl(wall, "inspect", small_bundle_file, "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["name"] == "small"
    (tmp_path / "m.onnx").write_bytes(b"x")
    done = spafl(wall, "inspect", tmp_path / "m.onnx")
    assert done.returncode == 2
    assert done.stderr == "spafl: reading a .onnx needs onnx, which is not installed: pip install onnx\n"


def test_a_model_needs_no_torch_and_no_runtime(tmp_path: Path) -> None:
    onnx.save(
        model_of([helper.make_node("MatMul", ["x", "w"], ["y"])], ["n", 4], w=ones(4, 1)), tmp_path / "m.onnx"
    )
    done = spafl(without("torch", "onnxruntime"), "inspect", tmp_path / "m.onnx", "--json")
    assert done.returncode == 0, done.stderr
    assert json.loads(done.stdout)["totals"]["weights"] == 4
    (tmp_path / "m.onnx").write_bytes(b"x")
    done = spafl("", "inspect", tmp_path / "m.onnx")
    assert (done.returncode, done.stdout, len(done.stderr.splitlines())) == (2, "", 1)
    assert done.stderr.startswith("spafl: ")
