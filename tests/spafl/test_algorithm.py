"""The numpy reference against the equations, on numbers small enough to check by hand."""

import numpy as np
import pytest

from spafl.algorithm import (
    COLLAPSE_DENSITY,
    apply_global,
    collapsed,
    densities,
    mask,
    reset_collapsed,
    scores,
)
from spafl.layout import Layer, ThresholdLayout

PAIR = ThresholdLayout.of(
    [
        Layer("conv", "conv", out=3, n_in=8, n_scale=4, offset=0),
        Layer("fc", "linear", out=2, n_in=4, n_scale=4, offset=0, scale=0.5),
    ]
)


def tensors() -> dict[str, np.ndarray]:
    conv = np.zeros((3, 2, 2, 2), np.float32)
    conv[0], conv[1], conv[2] = 0.5, -0.25, np.array([1, -1] * 4, np.float32).reshape(2, 2, 2)
    fc = np.array([[1, 1, 1, 1], [-1, 0, 0, 0]], np.float32)
    return {
        "conv.weight": conv,
        "conv.threshold": np.array([0.5, 0.1, 0.9], np.float32),
        "fc.weight": fc,
        "fc.threshold": np.array([1.5, 0.6], np.float32),
        "head.bias": np.ones(3, np.float32),
    }


def test_scores_are_the_mean_absolute_weights_in_units_of_the_layers_scale() -> None:
    conv, fc = PAIR.layers
    np.testing.assert_array_equal(scores(conv, tensors()["conv.weight"]), [0.5, 0.25, 1.0])
    np.testing.assert_array_equal(scores(fc, tensors()["fc.weight"]), [2.0, 0.5])


def test_a_filter_at_its_threshold_is_pruned() -> None:
    np.testing.assert_array_equal(mask(PAIR.layers[0], tensors()), [False, True, True])


def test_density_is_the_share_of_active_filters() -> None:
    assert densities(PAIR, tensors()) == {"conv": pytest.approx(2 / 3), "fc": 0.5}


def test_catch_up_moves_each_filter_against_the_sign_of_its_sum() -> None:
    before = tensors()
    base = np.zeros(5, np.float32)
    target = np.array([4, 4, 4, 8, 8], np.float32)
    after = apply_global(PAIR, before, base, target)
    # conv: 4 / n_scale 4 = 1 per weight; sums > 0, < 0 and 0.  fc: 8 * scale 0.5 / n_scale 4 = 1
    np.testing.assert_array_equal(after["conv.weight"][0], before["conv.weight"][0] - 1)
    np.testing.assert_array_equal(after["conv.weight"][1], before["conv.weight"][1] + 1)
    np.testing.assert_array_equal(after["conv.weight"][2], before["conv.weight"][2])
    np.testing.assert_array_equal(after["fc.weight"], [[0, 0, 0, 0], [0, 1, 1, 1]])
    np.testing.assert_array_equal(PAIR.join(after), target)


def test_catch_up_leaves_its_inputs_and_the_rest_of_the_state_alone() -> None:
    before = tensors()
    kept = {name: tensor.copy() for name, tensor in before.items()}
    after = apply_global(PAIR, before, np.zeros(5, np.float32), np.ones(5, np.float32))
    for name, tensor in kept.items():
        np.testing.assert_array_equal(before[name], tensor)
    np.testing.assert_array_equal(after["head.bias"], kept["head.bias"])
    assert {tensor.dtype for tensor in after.values()} == {np.dtype(np.float32)}


def test_catching_up_to_where_one_is_changes_no_weight_but_takes_the_global_thresholds() -> None:
    before, here = tensors(), np.full(5, 0.3, np.float32)
    after = apply_global(PAIR, before, here, here)
    np.testing.assert_array_equal(after["conv.weight"], before["conv.weight"])
    np.testing.assert_array_equal(PAIR.join(after), here)


def hundred(active: int) -> tuple[ThresholdLayout, dict[str, np.ndarray]]:
    layout = ThresholdLayout.of([Layer("wide", "linear", out=200, n_in=1, n_scale=1, offset=0)])
    threshold = np.full(200, 2, np.float32)
    threshold[:active] = 0
    return layout, {"wide.weight": np.ones((200, 1), np.float32), "wide.threshold": threshold}


@pytest.mark.parametrize(("active", "falls"), [(0, True), (1, True), (2, True), (3, False), (200, False)])
def test_a_layer_collapses_at_one_percent_and_not_above(active: int, falls: bool) -> None:
    layout, state = hundred(active)
    assert COLLAPSE_DENSITY == 0.01
    assert collapsed(layout, state) == (["wide"] if falls else [])
    after, names = reset_collapsed(layout, state)
    assert names == (["wide"] if falls else [])
    np.testing.assert_array_equal(
        after["wide.threshold"], 0 * state["wide.threshold"] if falls else state["wide.threshold"]
    )
    np.testing.assert_array_equal(after["wide.weight"], state["wide.weight"])
    assert densities(layout, after)["wide"] == (1.0 if falls else active / 200)
    assert state["wide.threshold"].max() == (2 if active < 200 else 0)


def test_the_guard_resets_only_the_layers_that_collapsed() -> None:
    state = tensors()
    state["conv.threshold"] = np.full(3, 9, np.float32)
    after, names = reset_collapsed(PAIR, state)
    assert names == ["conv"]
    np.testing.assert_array_equal(after["fc.threshold"], state["fc.threshold"])


def test_nan_weights_are_pruned_not_active() -> None:
    state = tensors()
    state["conv.weight"][0] = np.nan
    assert not mask(PAIR.layers[0], state)[0]
