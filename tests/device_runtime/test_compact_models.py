"""Compact models beyond plain chains: sums, depthwise and grouped convolutions, attention, one dimension."""

import functools
from pathlib import Path

import numpy as np
import onnx
import pytest

from device_runtime.compaction import MODEL, MULTIPLES, compact, fastest_multiple, predict
from device_runtime.engines.onnx import OnnxEngine
from spafl.algorithm import mask_of
from spafl.layout import Floats
from spafl.rows import kept_filters, kept_rows
from tests.device_runtime.test_compaction import RELATIVE, Case

CASES = {
    **{
        name: (name, True)
        for name in ("residual", "resnet", "separable", "mobilenet", "cnn1d", "mlp", "text", "attending")
    },
    **{f"{name}, no gate": (name, False) for name in ("resnet", "mobilenet", "attending")},
}


@functools.cache
def case_of(name: str, folder: Path) -> Case:
    case = Case(*CASES[name], folder / name.replace(",", "").replace(" ", "_"))
    if case.made.input.ids is not None:
        draw = np.random.default_rng(0)
        case.x = draw.integers(0, case.made.input.ids, case.x.shape).astype(np.float32)
    return case


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("bundles")


def assert_close(got: Floats, expected: Floats) -> None:
    np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


@pytest.mark.parametrize("name", CASES)
def test_the_compact_model_is_eager_pytorchs(name: str, folder: Path, tmp_path: Path) -> None:
    case = case_of(name, folder)
    sizes = {}
    for density in (1.0, 0.5, 0.3, 0.0):
        state = case.state(density)
        proof = compact(case.bundle, state, tmp_path, case.x, runs=1)
        assert_close(predict(tmp_path / MODEL, case.x), case.eager(state))
        assert (proof.equal, proof.argmax_agreement) == (True, 1.0)
        kept = kept_filters(case.made.compaction, mask_of(case.made.layout, state))
        assert {layer.layer: layer.kept for layer in proof.layers if layer.layer in kept} == kept
        sizes[density] = proof.compact.weights
        graph = onnx.load(tmp_path / MODEL).graph
        stored = sum(int(np.prod(tensor.dims)) for tensor in graph.initializer if len(tensor.dims) > 1)
        assert stored >= proof.compact.weights
        assert not {"TopK", "Abs"} & {node.op_type for node in graph.node}, "constants are left to fold"
    assert sizes[0.3] < sizes[0.5] < sizes[1.0]


def test_a_depthwise_convolution_has_as_many_groups_as_channels_stay(folder: Path, tmp_path: Path) -> None:
    case = case_of("mobilenet", folder)
    wide = [entry for entry in case.made.compaction if entry.width_at is not None]
    assert wide
    for density in (0.5, 0.3):
        state = case.state(density)
        compact(case.bundle, state, tmp_path, case.x, runs=1)
        kept = kept_filters(case.made.compaction, mask_of(case.made.layout, state))
        nodes = onnx.load(tmp_path / MODEL).graph.node
        groups = [
            attribute.i
            for node in nodes
            if node.op_type == "Conv"
            for attribute in node.attribute
            if attribute.name == "group"
        ]
        assert [group for group in groups if group > 1] == [
            kept[entry.layer] for entry in wide if kept[entry.layer] > 1
        ]
        # what a device evaluates with is the same graph
        assert_close(OnnxEngine(case.bundle).predict(state, case.x), case.eager(state))


@pytest.mark.parametrize("name", ["resnet", "mobilenet", "attending"])
@pytest.mark.parametrize("multiple", [2, 16])
def test_widths_are_rounded_up(name: str, multiple: int, folder: Path, tmp_path: Path) -> None:
    case = case_of(name, folder)
    state = case.state(0.3)
    proof = compact(case.bundle, state, tmp_path, case.x, runs=1, multiple=multiple)
    assert_close(predict(tmp_path / MODEL, case.x), case.eager(state))
    assert proof.multiple == multiple
    entries = {entry.layer: entry for entry in case.made.compaction}
    kept = {layer.layer: layer.kept for layer in proof.layers if entries[layer.layer].drops}
    assert kept == kept_filters(case.made.compaction, mask_of(case.made.layout, state), multiple)
    for layer, count in kept.items():
        entry = entries[layer]
        assert count == entry.out or count // entry.blocks % multiple == 0
    assert multiple == 2 or any("fill up" in layer.reason for layer in proof.layers)


def test_the_fastest_multiple_is_one_of_those_tried(folder: Path) -> None:
    case = case_of("resnet", folder)
    assert fastest_multiple(case.bundle, case.state(0.5), case.x, runs=3) in MULTIPLES


def test_why_pruned_filters_stay_and_active_ones_go(folder: Path, tmp_path: Path) -> None:
    case = case_of("resnet", folder)
    reasons = {
        layer.layer: layer.reason
        for layer in compact(case.bundle, case.state(0.3), tmp_path, case.x, runs=1).layers
    }
    assert any(
        "pruned ones stay" in reason and "needs their channels" in reason for reason in reasons.values()
    )
    case = case_of("attending", folder)
    reasons = {
        layer.layer: layer.reason
        for layer in compact(case.bundle, case.state(0.5), tmp_path, case.x, runs=1).layers
    }
    assert any("active ones go too" in reason for reason in reasons.values())
    assert any("blocks keeps equally many" in reason for reason in reasons.values())


def test_layers_that_are_added_up_keep_the_same_filters(folder: Path) -> None:
    case = case_of("resnet", folder)
    mask = mask_of(case.made.layout, case.state(0.3))
    rows = kept_rows(case.made.compaction, mask)
    together = [entry for entry in case.made.compaction if len(entry.live) > 1]
    assert together
    for entry in together:
        layers = sorted({layer for layers in entry.live for layer in layers})
        assert entry.layer in layers
        active = np.logical_or.reduce([mask[layer] for layer in layers])
        np.testing.assert_array_equal(rows[entry.layer], np.flatnonzero(active))
