"""How alike two architectures must be."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

ARCHITECTURE = 1e-5
"""Relative to a tensor's largest value. Other vector instructions, and other engines, add the same float32 numbers in
another order: five steps of LeNet-5 differed by 1e-6 in momentum and 2e-7 in weights; a learning rate that is wrong by
half a percent shows at 5e-5."""


def assert_close(got: Mapping[str, NDArray[Any]], expected: Mapping[str, NDArray[Any]]) -> None:
    """Returns nothing if both hold the same tensors: whole numbers exactly, floats but for their rounding."""
    assert got.keys() == expected.keys()
    for name, value in expected.items():
        if np.issubdtype(value.dtype, np.floating):
            allowed = ARCHITECTURE * max(float(np.abs(value).max()), 1e-6)
            np.testing.assert_allclose(got[name], value, rtol=0, atol=allowed, err_msg=name)
        else:
            np.testing.assert_array_equal(got[name], value, err_msg=name)
