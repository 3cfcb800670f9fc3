"""A device that was away for many rounds loses nothing: catching up at once equals having been there each round."""

from itertools import pairwise

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from spafl.algorithm import apply_global, collapsed, densities, reset_collapsed
from spafl.layout import Layer, ThresholdLayout

MOST_ROUNDS = 16
TELESCOPE = MOST_ROUNDS * 2**-23
"""Absolute difference allowed per weight: with |w| and |step| around 1 or less, a round taken on its own rounds the
weight by at most 2**-24 and its step by as much once more."""


@st.composite
def absences(draw: st.DrawFn) -> tuple[ThresholdLayout, dict[str, np.ndarray], list[np.ndarray]]:
    """A layout, a state, and the global thresholds of every version from the one it has to the newest."""
    out, n_in = draw(st.integers(1, 6)), draw(st.integers(1, 12))
    layout = ThresholdLayout.of(
        [
            Layer(
                "conv",
                "conv",
                out=out,
                n_in=4 * n_in,
                n_scale=4,
                offset=0,
                scale=draw(st.sampled_from([1.0, 0.25])),
            ),
            Layer("fc", "linear", out=2, n_in=n_in, n_scale=n_in, offset=0),
        ]
    )
    random = np.random.default_rng(draw(st.integers(0, 2**32)))
    spread = draw(st.sampled_from([0.0, 0.01, 0.3]))
    state = {
        "conv.weight": random.uniform(-0.5, 0.5, (out, n_in, 2, 2)).astype(np.float32),
        "fc.weight": random.uniform(-0.5, 0.5, (2, n_in)).astype(np.float32),
        **layout.split(random.uniform(0, 0.2, layout.size)),
    }
    count = draw(st.integers(2, MOST_ROUNDS + 1))
    versions = np.cumsum(random.normal(0, spread, (count, layout.size)) / count, axis=0).astype(np.float32)
    return layout, state, list(np.clip(versions, -0.5, 0.5))


def one_by_one(
    layout: ThresholdLayout, state: dict[str, np.ndarray], versions: list[np.ndarray]
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """The state after each round in turn, and by layer the filters (out,) whose sum of weights changed its sign."""
    start = {layer.name: _signs(layer, state) for layer in layout.layers}
    flipped = {layer.name: np.zeros(layer.out, bool) for layer in layout.layers}
    for base, target in pairwise(versions):
        state = apply_global(layout, state, base, target)
        for layer in layout.layers:
            flipped[layer.name] |= _signs(layer, state) != start[layer.name]
    return state, flipped


def _signs(layer: Layer, state: dict[str, np.ndarray]) -> np.ndarray:
    return np.sign(state[layer.weight].reshape(layer.out, -1).sum(axis=1))


@given(absences())
def test_catch_up_telescopes_for_every_filter_that_keeps_its_sign(
    absence: tuple[ThresholdLayout, dict[str, np.ndarray], list[np.ndarray]],
) -> None:
    layout, state, versions = absence
    slow, flipped = one_by_one(layout, state, versions)
    fast = apply_global(layout, state, versions[0], versions[-1])
    np.testing.assert_array_equal(layout.join(fast), layout.join(slow))
    for layer in layout.layers:
        difference = np.abs(fast[layer.weight] - slow[layer.weight]).reshape(layer.out, -1).max(axis=1)
        differ = difference > TELESCOPE
        assert not (differ & ~flipped[layer.name]).any(), "a filter differs whose sum kept its sign"


def test_a_sum_that_changes_its_sign_is_the_one_case_that_differs() -> None:
    """Named, so that the exception is known: the published update pushes a flipped filter the other way."""
    layout = ThresholdLayout.of([Layer("fc", "linear", out=2, n_in=1, n_scale=1, offset=0)])
    state = {"fc.weight": np.array([[0.1], [1.0]], np.float32), "fc.threshold": np.zeros(2, np.float32)}
    versions = [np.full(2, value, np.float32) for value in (0, 0.25, 0.5)]
    slow, flipped = one_by_one(layout, state, versions)
    fast = apply_global(layout, state, versions[0], versions[-1])
    np.testing.assert_array_equal(flipped["fc"], [True, False])
    np.testing.assert_allclose(slow["fc.weight"], [[0.1], [0.5]], atol=TELESCOPE)
    np.testing.assert_allclose(fast["fc.weight"], [[-0.4], [0.5]], atol=TELESCOPE)


@given(absences())
def test_after_the_guard_no_layer_with_weights_is_collapsed(
    absence: tuple[ThresholdLayout, dict[str, np.ndarray], list[np.ndarray]],
) -> None:
    layout, state, versions = absence
    raised = {**state, **layout.split(versions[-1] + 10)}
    assert collapsed(layout, raised) == ["conv", "fc"]
    after, names = reset_collapsed(layout, raised)
    assert names == ["conv", "fc"]
    assert collapsed(layout, after) == []
    assert set(densities(layout, after).values()) == {1.0}
    again, none = reset_collapsed(layout, after)
    assert none == []
    assert all(again[name] is after[name] for name in after)
