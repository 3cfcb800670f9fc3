"""begin_round and end_round against the numpy reference."""

import numpy as np
import pytest

from export.host import GraphHost, run, session
from spafl import algorithm
from spafl.rows import training_rows
from tests.export.models import exported


@pytest.mark.parametrize("name", ["plain", "normed", "residual"])
@pytest.mark.parametrize("density", [1.0, 0.4, 0.0])
def test_begin_round_is_catch_up_guard_and_gather(name: str, density: float) -> None:
    made = exported(name, scale="layer")
    draw = np.random.default_rng(2)
    state = {t.name: made.model.state_dict()[t.name].numpy().copy() for t in made.state}
    target = algorithm.thresholds_at(made.layout, state, max(density, 0.01), draw)
    if density == 0.0:
        target = np.full_like(target, 50.0)
    base = (target + draw.normal(0, 0.1, made.layout.size)).astype(np.float32)
    out = run(session(made.files["begin_round.onnx"]), {**state, "base": base, "target": target})
    expected, names = algorithm.reset_collapsed(
        made.layout, algorithm.apply_global(made.layout, state, base, target)
    )
    for layer in made.layout.layers:
        # one subtraction of one product each: a rounding or two
        np.testing.assert_allclose(out[f"next.{layer.weight}"], expected[layer.weight], rtol=1e-6, atol=1e-7)
        np.testing.assert_array_equal(out[f"next.{layer.threshold}"], expected[layer.threshold])
    assert out["collapsed"].tolist() == [layer.name in names for layer in made.layout.layers]
    assert (len(names) == len(made.layout.layers)) == (density == 0.0)
    rows = training_rows(made, algorithm.mask_of(made.layout, expected))  # type: ignore[arg-type]
    assert rows.keys() == {tensor.layer for tensor in made.state if tensor.rows}
    for tensor in made.state:
        if tensor.rows:
            active = rows[str(tensor.layer)]
            np.testing.assert_array_equal(out[f"active.{tensor.layer}"], active)
            np.testing.assert_allclose(
                out[f"rows.{tensor.name}"], expected[tensor.name][active], rtol=1e-6, atol=1e-7
            )


def test_end_round_puts_rows_back_and_lines_up_thresholds() -> None:
    made = exported("normed")
    draw = np.random.default_rng(3)
    state = {t.name: made.model.state_dict()[t.name].numpy().copy() for t in made.state}
    target = algorithm.thresholds_at(made.layout, state, 0.5, draw)
    host = GraphHost(made, made.files)  # type: ignore[arg-type]
    host.begin_round(state, target, target)
    whole = {name: value.copy() for name, value in host.state.items()}
    for value in host.rows.values():
        value += 1.0
    ended = host.end_round()
    np.testing.assert_array_equal(ended["thresholds"], target)
    for tensor in made.state:
        if tensor.rows:
            active = host.active[str(tensor.layer)]
            changed = np.zeros(tensor.shape[0], bool)
            changed[active] = True
            np.testing.assert_array_equal(host.state[tensor.name][~changed], whole[tensor.name][~changed])
            np.testing.assert_allclose(host.state[tensor.name][changed], whole[tensor.name][changed] + 1.0)
    densities = algorithm.densities(made.layout, host.state)
    np.testing.assert_allclose(ended["density"], list(densities.values()), rtol=1e-6)
