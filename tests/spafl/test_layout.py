"""A layout gives every threshold one filter, and its id one meaning."""

from typing import Any

import numpy as np
import pytest

from spafl.errors import LayoutError
from spafl.layout import MAX_AXIS, MAX_LAYERS, MAX_NAME, MAX_THRESHOLDS, Layer, ThresholdLayout

LENET5 = [("conv1", "conv", 6, 25, 25), ("conv2", "conv", 16, 150, 25), ("fc1", "linear", 120, 400, 400)]


def fields(**changed: Any) -> dict[str, Any]:
    return {
        "name": "a",
        "kind": "conv",
        "out": 2,
        "n_in": 9,
        "n_scale": 9,
        "offset": 0,
        "scale": 1.0,
        **changed,
    }


def test_of_places_layers_one_behind_the_other() -> None:
    layout = ThresholdLayout.of([Layer(*row, offset=99) for row in LENET5])
    assert [layer.offset for layer in layout.layers] == [0, 6, 22]
    assert layout.size == 142
    assert [layer.span for layer in layout.layers] == [slice(0, 6), slice(6, 22), slice(22, 142)]


def test_json_round_trip_keeps_layout_and_id(layout: ThresholdLayout) -> None:
    again = ThresholdLayout.from_json(layout.to_json())
    assert again == layout
    assert again.id == layout.id


@pytest.mark.parametrize(
    "change", [{"name": "b"}, {"kind": "linear"}, {"out": 3}, {"n_in": 8}, {"n_scale": 8}, {"scale": 2.0}]
)
def test_every_field_is_part_of_the_id(change: dict[str, Any]) -> None:
    assert ThresholdLayout.of([fields(**change)]).id != ThresholdLayout.of([fields()]).id


def test_id_does_not_depend_on_how_a_number_was_written() -> None:
    assert ThresholdLayout.of([fields(scale=1)]).id == ThresholdLayout.of([fields(scale=1.0)]).id


def test_order_of_layers_is_part_of_the_id() -> None:
    rows = [fields(name="a"), fields(name="b")]
    assert ThresholdLayout.of(rows).id != ThresholdLayout.of(rows[::-1]).id


@pytest.mark.parametrize(
    "change",
    [
        {"name": ""},
        {"name": None},
        {"name": ["a"]},
        {"name": "a" * (MAX_NAME + 1)},
        {"kind": "attention"},
        {"kind": None},
        {"out": 0},
        {"out": -1},
        {"out": 2.0},
        {"out": True},
        {"out": "2"},
        {"out": MAX_AXIS + 1},
        {"n_in": 0},
        {"n_in": MAX_AXIS + 1},
        {"n_in": 9.5},
        {"n_scale": 0},
        {"offset": 1},
        {"offset": 0.0},
        {"offset": False},
        {"scale": 0.0},
        {"scale": -1.0},
        {"scale": float("nan")},
        {"scale": float("inf")},
        {"scale": "1"},
        {"scale": None},
        {"extra": 1},
    ],
)
def test_a_layer_that_is_not_as_it_should_be_is_refused(change: dict[str, Any]) -> None:
    with pytest.raises(LayoutError):
        ThresholdLayout.from_json([fields(**change)])


@pytest.mark.parametrize("layers", [None, 5, "ab", [None], ["ab"], [[]], [{}], [{"name": "a"}], {"a": 1}])
def test_json_that_is_no_list_of_layers_is_refused(layers: Any) -> None:
    with pytest.raises(LayoutError):
        ThresholdLayout.from_json(layers)


def test_gaps_and_overlaps_are_refused() -> None:
    first = fields()
    for offset in (0, 1, 3, -2):
        with pytest.raises(LayoutError, match=f"starts at {offset}, expected 2"):
            ThresholdLayout.from_json([first, fields(name="b", offset=offset)])


def test_repeated_names_are_refused() -> None:
    with pytest.raises(LayoutError, match="repeat"):
        ThresholdLayout.of([fields(), fields()])


def test_size_limits() -> None:
    assert ThresholdLayout.of([fields(out=MAX_THRESHOLDS)]).size == MAX_THRESHOLDS
    with pytest.raises(LayoutError, match="at most"):
        ThresholdLayout.of([fields(out=MAX_THRESHOLDS + 1)])
    with pytest.raises(LayoutError, match="1 to"):
        ThresholdLayout(())
    with pytest.raises(LayoutError, match="1 to"):
        ThresholdLayout.of(fields(name=f"l{i}", out=1) for i in range(MAX_LAYERS + 1))


def test_join_and_split_are_inverse(layout: ThresholdLayout) -> None:
    vector = np.arange(layout.size, dtype=np.float32)
    tensors = layout.split(vector)
    assert {name: tensor.shape for name, tensor in tensors.items()} == {
        "conv.threshold": (4,),
        "fc.threshold": (3,),
    }
    np.testing.assert_array_equal(layout.join(tensors), vector)


def test_split_copies(layout: ThresholdLayout) -> None:
    vector = np.zeros(layout.size, np.float32)
    layout.split(vector)["conv.threshold"][:] = 1
    assert not vector.any()


def test_join_names_the_tensor_that_does_not_fit(layout: ThresholdLayout) -> None:
    tensors = layout.split(np.zeros(layout.size))
    with pytest.raises(LayoutError, match=r"fc\.threshold.*got nothing"):
        layout.join({"conv.threshold": tensors["conv.threshold"]})
    with pytest.raises(LayoutError, match=r"fc\.threshold.*\(3,\).*\(3, 1\)"):
        layout.join({**tensors, "fc.threshold": np.zeros((3, 1))})


@pytest.mark.parametrize("shape", [(), (6,), (8,), (7, 1), (1, 7)])
def test_split_refuses_other_shapes(layout: ThresholdLayout, shape: tuple[int, ...]) -> None:
    with pytest.raises(LayoutError, match="has 7 thresholds"):
        layout.split(np.zeros(shape))
