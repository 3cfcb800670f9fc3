"""Which pixels a convolution or a pool reads: the tables that gathers are made of."""

from collections.abc import Sequence
from math import prod
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

Table: TypeAlias = NDArray[np.int64]
NOWHERE = -1
"""In a table: the padding, or nothing."""


class Window:
    """Which pixels of an image (height, width) a kernel reads for each of its outputs.

    outputs   (H', W'); as many as fit if None
    """

    def __init__(
        self,
        size: Sequence[int],
        kernel: Sequence[int],
        stride: Sequence[int],
        padding: Sequence[int],
        dilation: Sequence[int] = (1,),
        outputs: Sequence[int] | None = None,
    ) -> None:
        self.size = _pair(size)
        self.kernel, self.padding, self.dilation = _pair(kernel), _pair(padding), _pair(dilation)
        self.stride = _pair(stride) if len(stride) else self.kernel
        axes = zip(self.size, self.kernel, self.stride, self.padding, self.dilation, strict=True)
        fit = [(n + 2 * p - d * (k - 1) - 1) // s + 1 for n, k, s, p, d in axes]
        self.outputs = fit if outputs is None else list(outputs)
        self.taps = prod(self.kernel)

    def reads(self) -> Table:
        """Returns the pixel (taps, outputs) that each output reads at each place of the kernel, or NOWHERE."""
        axes = zip(
            self.size, self.kernel, self.stride, self.padding, self.dilation, self.outputs, strict=True
        )
        rows, columns = (
            np.where((at >= 0) & (at < n), at, NOWHERE)
            for n, k, s, p, d, out in axes
            for at in [np.arange(k)[:, None] * d + np.arange(out) * s - p]
        )
        pixels = rows[:, None, :, None] * self.size[1] + columns[None, :, None, :]  # (kh, kw, H', W')
        inside = (rows >= 0)[:, None, :, None] & (columns >= 0)[None, :, None, :]
        return np.where(inside, pixels, NOWHERE).reshape(self.taps, -1).astype(np.int64)

    def readers(self, spacing: int, taps: slice = slice(None)) -> Table:
        """Returns what reads each pixel (most, pixels), as tap * spacing + output, filled up with NOWHERE.

        taps   the places of the kernel to consider, counted from the first of them
        """
        reads = self.reads()[taps]
        tap, output = np.nonzero(reads >= 0)
        pixel = reads[tap, output]
        order = np.argsort(pixel, kind="stable")
        pixel, reader = pixel[order], (tap * spacing + output)[order]
        counts = np.bincount(pixel, minlength=prod(self.size))
        number = np.arange(len(pixel)) - np.repeat(np.cumsum(counts) - counts, counts)
        table = np.full((max(counts.max(initial=0), 1), prod(self.size)), NOWHERE, np.int64)
        table[number, pixel] = reader
        return table


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)
