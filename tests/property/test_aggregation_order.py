"""The outcome of a round is a function of the set of accepted updates."""

import hypothesis.strategies as st
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis.extra.numpy import arrays

from server_api import rounds
from server_api.aggregation import Contribution, mean
from server_api.rounds import Run
from server_api.summary import Report
from spafl.protocol import Metrics, RunSettings

values = arrays(np.float32, 5, elements=st.floats(-(2.0**100), 2.0**100, width=32))
contributions = st.dictionaries(
    st.text("abcdef0123456789", min_size=1, max_size=6), st.tuples(st.integers(1, 10**9), values), min_size=1
)
reports = st.dictionaries(
    st.sampled_from([f"d{number}" for number in range(8)]),
    st.builds(
        Metrics,
        examples=st.integers(1, 10**9),
        loss=st.none() | st.floats(-1e6, 1e6),
        accuracy=st.none() | st.floats(0, 1),
        density=st.just(()) | st.tuples(st.floats(0, 1), st.floats(0, 1)),
    ),
    min_size=1,
)


@given(contributions, st.sampled_from(["examples", "plain"]))
def test_the_mean_is_exact_to_its_last_bit(devices, weighting):
    given = [Contribution(device, *devices[device]) for device in sorted(devices)]
    result = mean(given, weighting)
    weights = [c.examples if weighting == "examples" else 1 for c in given]
    # integers of 2**-149 and Python's big integers know no rounding
    exact = [
        sum(int(np.float64(c.thresholds[i]) * 2.0**149) * w for c, w in zip(given, weights, strict=True))
        for i in range(5)
    ]
    reference = np.array([value / sum(weights) / 2.0**149 for value in exact])
    scale = max(float(np.abs(c.thresholds).max()) for c in given)
    # one float32 rounding of the result, and the float64 roundings of the sum below it
    np.testing.assert_allclose(result, reference, rtol=2.0**-23, atol=len(given) * 2.0**-50 * scale)


@given(contributions, st.randoms(use_true_random=False))
def test_only_the_one_order_is_summed(devices, random):
    order = list(devices)
    random.shuffle(order)
    arrived = [Contribution(device, *devices[device]) for device in order]
    if order == sorted(order):
        mean(arrived, "examples")
    else:
        with pytest.raises(ValueError, match="expected ascending ids"):
            mean(arrived, "examples")


@given(reports, st.randoms(use_true_random=False))
@settings(max_examples=60)
def test_a_round_ends_the_same_whoever_reports_first(metrics, random):
    def play(order):
        run = Run(RunSettings(name="run", bundle="0" * 64, rounds=1, target=len(metrics)))
        step = rounds.start(run, 0.0)
        for device in sorted(metrics):
            step = rounds.check_in(step.run, device, 1.0)
        for device in order:
            step = rounds.report(step.run, 1, device, 0, Report("digest", metrics[device]), 2.0)
        return step

    order = list(metrics)
    random.shuffle(order)
    one, other = play(sorted(metrics)), play(order)
    assert one.run == other.run
    assert one.run.state == "finished"
    # the last device to report differs, the round's figures do not
    assert one.effects[1:] == other.effects[1:]
