"""The mean: the paper's numbers, its weights, its order."""

import numpy as np
import pytest

from server_api.aggregation import Contribution, mean


def contribution(device: str, examples: int, *thresholds: float) -> Contribution:
    return Contribution(device, examples, np.array(thresholds, np.float32))


def test_plain_is_the_papers_mean():
    result = mean([contribution("a", 1, 1, 2), contribution("b", 99, 3, 6)], "plain")
    np.testing.assert_array_equal(result, np.array([2, 4], np.float32))


def test_examples_weigh():
    result = mean([contribution("a", 1, 1, 2), contribution("b", 3, 5, 6)], "examples")
    np.testing.assert_array_equal(result, np.array([4, 5], np.float32))


def test_one_device_gets_its_own_thresholds_back():
    alone = contribution("a", 7, 0.1, 1e-30, 3e38, -2.5)
    assert mean([alone], "examples").tobytes() == alone.thresholds.tobytes()


def test_sums_that_float32_could_not_hold():
    # in float32 the ones would be lost beside 2**24, and 3e38 twice would be infinite
    result = mean([contribution("a", 1, 2.0**24, 3e38), contribution("b", 1, 1, 3e38)], "plain")
    np.testing.assert_array_equal(result, np.array([(2.0**24 + 1) / 2, 3e38], np.float32))


def test_nothing_to_average():
    with pytest.raises(ValueError, match="no contributions"):
        mean([], "plain")


def test_a_device_twice_is_refused():
    with pytest.raises(ValueError, match="'a' after 'a'"):
        mean([contribution("a", 1, 1), contribution("a", 1, 1)], "plain")


def test_the_result_is_a_new_float32_vector():
    given = contribution("a", 1, 1, 2)
    result = mean([given], "plain")
    assert result.dtype == np.float32
    assert not np.shares_memory(result, given.thresholds)
