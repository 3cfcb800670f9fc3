"""Times of several functions on a machine whose speed drifts: taken in turns, told as medians."""

import time
from collections.abc import Callable, Mapping

import numpy as np


def medians(functions: Mapping[str, Callable[[], object]], repeats: int) -> dict[str, float]:
    """Returns the median milliseconds of each function, over `repeats` turns.

    Each is called once untimed before each timed call, so that none pays for what the others left in the caches.
    """
    times: dict[str, list[float]] = {name: [] for name in functions}
    for turn in range(repeats + 2):
        for name, function in functions.items():
            function()
            start = time.perf_counter()
            function()
            if turn >= 2:
                times[name].append((time.perf_counter() - start) * 1e3)
    return {name: float(np.median(taken)) for name, taken in times.items()}
