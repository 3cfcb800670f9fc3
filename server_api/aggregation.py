"""The server's whole mathematics: the mean of the thresholds devices report."""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Literal, TypeAlias

import numpy as np

from spafl.layout import Floats

Weighting: TypeAlias = Literal["examples", "plain"]


@dataclass(frozen=True, slots=True)
class Contribution:
    """What one device adds to a mean: its thresholds (size,) and the number of examples behind them."""

    device: str
    examples: int
    thresholds: Floats


def mean(contributions: Iterable[Contribution], weighting: Weighting) -> Floats:
    """Returns the mean (size,) float32 of the contributions, by examples or plain (the paper's).

    The contributions are summed one after the other in float64, so the sum needs the memory of one vector however
    many devices there are. Float addition does not commute over three terms: the order is part of the result. It is
    fixed as ascending device id, hence the mean depends on the set of contributions and not on who came first.

    Raises:
        ValueError: no contributions, or device ids that do not ascend strictly (unsorted, or a device twice).
    """
    total: np.ndarray[tuple[int, ...], np.dtype[np.float64]] | None = None
    weights, last = 0, ""
    for contribution in contributions:
        if contribution.device <= last:
            raise ValueError(f"device {contribution.device!r} after {last!r}: expected ascending ids")
        weight = contribution.examples if weighting == "examples" else 1
        term = contribution.thresholds.astype(np.float64) * weight
        total = term if total is None else total + term
        weights, last = weights + weight, contribution.device
    if total is None:
        raise ValueError("the mean of no contributions: expected at least one")
    return (total / weights).astype(np.float32)
