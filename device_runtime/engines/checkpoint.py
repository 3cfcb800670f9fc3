"""What a checkpoint must hold before any engine goes on from it."""

from collections.abc import Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray

from device_runtime.engines.engine import EngineError
from spafl.manifest import Manifest
from spafl.step import ACTIVE, MOMENTUM


def refuse_foreign(manifest: Manifest, checkpoint: Mapping[str, NDArray[Any]]) -> None:
    """Returns nothing if `checkpoint` is of a bundle with this manifest.

    Raises:
        EngineError: a tensor is missing or of another shape; the message names it.
    """
    shapes = {tensor.name: tensor.shape for tensor in manifest.state}
    shapes |= {MOMENTUM + tensor.name: tensor.shape for tensor in manifest.state if tensor.trained}
    wrong = [
        name
        for name, shape in shapes.items()
        if (value := checkpoint.get(name)) is None or value.dtype != np.float32 or value.shape != shape
    ]
    filters = {ACTIVE + str(tensor.layer): tensor.shape[0] for tensor in manifest.state if tensor.rows}
    wrong += [name for name, out in filters.items() if not _are_rows(checkpoint.get(name), out)]
    if wrong:
        raise EngineError(
            f"the checkpoint is not of this bundle: {', '.join(wrong[:5])} missing or of another shape"
        )


def _are_rows(index: NDArray[Any] | None, out: int) -> bool:
    """Returns whether `index` holds ascending int64 row numbers of a layer with `out` filters, at least one."""
    if index is None or index.dtype != np.int64 or index.ndim != 1 or len(index) == 0:
        return False
    return bool(index[0] >= 0 and index[-1] < out and (np.diff(index) > 0).all())
