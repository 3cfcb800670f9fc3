"""What operations become that ExecuTorch's kernels have no fast or right form for: gathers and matrix products.

Its portable convolutions and pools are plain loops, and the backward pass of its max pool adds to memory that nobody
cleared (pytorch/executorch#21686). Inside an operation tensors are laid out (channels, pixels, examples): with the
examples innermost, lining up the pixels under a kernel copies whole runs of memory.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import reduce
from itertools import islice
from math import prod
from typing import Any

import numpy as np
import torch
from torch import Tensor

from export.convolution import by_row, refuse_convolution
from export.decompositions import decompositions
from export.errors import LoweringError
from export.window import NOWHERE, Table, Window

aten = torch.ops.aten


def portable_decompositions() -> dict[Any, Any]:
    """Returns the decompositions of the ONNX graphs, with those that ExecuTorch needs in their place."""
    table = decompositions()
    table[aten.convolution.default] = convolution
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.max_pool2d_with_indices.default] = max_pool2d
    table[aten.max_pool2d_with_indices_backward.default] = max_pool2d_backward
    table[aten.avg_pool2d.default] = avg_pool2d
    table[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    table[aten.native_batch_norm.default] = batch_norm
    table[aten._native_batch_norm_legit.no_stats] = lambda x, weight, bias, training, momentum, eps: (
        batch_norm(x, weight, bias, None, None, training, momentum, eps)
    )
    table[aten._native_batch_norm_legit_no_training.default] = (
        lambda x, weight, bias, mean, var, momentum, eps: batch_norm(
            x, weight, bias, mean, var, False, momentum, eps
        )
    )
    table[aten.native_batch_norm_backward.default] = batch_norm_backward
    table[aten.linalg_vector_norm.default] = vector_norm
    table[aten.threshold_backward.default] = threshold_backward
    return table


TINY = 1.2e-38
"""The smallest normal float32: next to it every larger number is itself."""


LOWEST = -1e38
"""What a max pool finds in the padding: below every value, and still a number to subtract."""
BLOCK_BYTES = 32 << 10
"""Of lined-up pixels at a time, per example: a convolution's own memory is no more than its batch's activations."""


def convolution(
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (O, C / groups, kh, kw)
    bias: Tensor | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
) -> Tensor:
    """Returns the convolution (N, O, H', W'): every pixel under the kernel lined up, then one matrix product.

    One of (N, C, L) is that of images of one row, (N, C, 1, L).

    Raises:
        LoweringError: a transposed or 3-D convolution.
    """
    refuse_convolution(transposed, weight)
    if x.dim() == 3:
        sizes = [1, *stride], [0, *padding], [1, *dilation]
        y = convolution(x.unsqueeze(2), weight.unsqueeze(2), bias, *sizes, False, [0, 0], groups)
        return y.squeeze(2)
    window = Window(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    pixels, rows = _pixels(x), _by_group(weight, groups)
    blocks = [_product(rows, _lined_up(pixels, reads, groups)) for reads in _blocks(window, x.shape[1])]
    y = torch.cat([block.reshape(len(weight), -1, x.shape[0]) for block in blocks], 1)  # (O, Q, N)
    if bias is not None:
        y = y + bias[:, None, None]
    return _images(y, window.outputs)


def convolution_backward(
    grad: Tensor,  # (N, O, H', W')
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (O, C / groups, kh, kw)
    bias_sizes: list[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of a convolution by input, weight and bias, each None where not asked for.

    Raises:
        LoweringError: a transposed or 3-D convolution.
    """
    refuse_convolution(transposed, weight)
    if x.dim() == 3:
        return by_row(convolution_backward, grad, x, weight, stride, padding, dilation, groups, output_mask)
    window = Window(x.shape[2:], weight.shape[2:], stride, padding, dilation)
    outgoing = _pixels(grad)  # (O, Q, N)
    by_x = by_weight = by_bias = None
    if output_mask[0]:
        by_x = _images(_by_pixels(outgoing, weight, window, groups), window.size)
    if output_mask[1]:
        by_weight = _by_weight(outgoing, _pixels(x), window, groups).reshape(weight.shape)
    if output_mask[2]:
        by_bias = outgoing.reshape(len(weight), -1).sum(1)
    return by_x, by_weight, by_bias


def max_pool2d(
    x: Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    dilation: Sequence[int] = (1,),
    ceil_mode: bool = False,
) -> tuple[Tensor, Tensor]:
    """Returns the largest value under the kernel (N, C, H', W'), and zeros where torch has the places of them."""
    window = _max_window(x, kernel_size, stride, padding, dilation, ceil_mode)
    largest = _images(reduce(torch.maximum, _under(_pixels(x), window, LOWEST)), window.outputs)
    return largest, torch.zeros_like(largest, dtype=torch.int64)


def max_pool2d_backward(
    grad: Tensor,  # (N, C, H', W')
    x: Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Tensor:
    """Returns the gradient of a max pool: the first largest value under the kernel takes it all, as in torch."""
    window = _max_window(x, kernel_size, stride, padding, dilation, ceil_mode)
    pixels = _pixels(x)
    largest = reduce(torch.maximum, _under(pixels, window, LOWEST))
    left, taken = _pixels(grad), []
    # gathered a second time: to keep them would take four times the memory of the pool's output
    for values in islice(_under(pixels, window, LOWEST), window.taps - 1):
        # 1 where the value is the largest, in arithmetic: comparing and casting takes six times as long
        taken.append(left * (1 - _positive(largest - values)))
        left = left - taken[-1]
    return _images(_spread([*taken, left], window), window.size)


def avg_pool2d(
    x: Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Tensor:
    """Returns the mean under the kernel (N, C, H', W').

    Raises:
        LoweringError: windows that count fewer values at the border.
    """
    window = _average_window(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
    total = reduce(torch.add, _under(_pixels(x), window, 0.0))
    return _images(total * (1 / (divisor_override or window.taps)), window.outputs)


def avg_pool2d_backward(
    grad: Tensor,  # (N, C, H', W')
    x: Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
    divisor_override: int | None,
) -> Tensor:
    """Returns the gradient of an average pool: every output's share, added up where windows overlap.

    Raises:
        LoweringError: windows that count fewer values at the border.
    """
    window = _average_window(x, kernel_size, stride, padding, ceil_mode, count_include_pad)
    share = _pixels(grad) * (1 / (divisor_override or window.taps))
    return _images(_spread([share] * window.taps, window), window.size)


def batch_norm(
    x: Tensor,  # (N, C, ...)
    weight: Tensor | None,
    bias: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    training: bool,
    momentum: float,
    eps: float,
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns x normalised, and the mean (C,) and 1 / sqrt(variance + eps) (C,) it was normalised by.

    By its own statistics in training, which then keeps none; else by the running ones.
    """
    channels, back = _channels_first(x)
    if training:
        mean = _mean(channels)
        centred = channels - mean[:, None, None]
        inverse = torch.rsqrt(_mean(centred * centred) + eps)
    else:
        if running_mean is None or running_var is None:
            raise LoweringError("a batch norm without running statistics cannot be used on devices")
        mean, centred = running_mean, channels - running_mean[:, None, None]
        inverse = torch.rsqrt(running_var + eps)
    y = centred * (inverse if weight is None else inverse * weight)[:, None, None]
    if bias is not None:
        y = y + bias[:, None, None]
    return back(y), mean, inverse


def batch_norm_backward(
    grad: Tensor,
    x: Tensor,
    weight: Tensor | None,
    running_mean: Tensor | None,
    running_var: Tensor | None,
    mean: Tensor,
    inverse: Tensor,
    training: bool,
    eps: float,
    output_mask: Sequence[bool],
) -> tuple[Tensor, Tensor, Tensor]:
    """Returns the gradients of `batch_norm` in training by x (N, C, ...), weight and bias (C,)."""
    channels, back = _channels_first(x)
    outgoing, _ = _channels_first(grad)
    centred = channels - mean[:, None, None]
    total, along = _mean(outgoing), _mean(outgoing * centred)
    scale = inverse if weight is None else inverse * weight
    away = centred * (along * inverse * inverse)[:, None, None]
    by_x = (outgoing - away - total[:, None, None]) * scale[:, None, None]
    count = channels.shape[1] * channels.shape[2]
    return back(by_x), along * inverse * count, total * count


def vector_norm(x: Tensor) -> Tensor:
    """Returns the Euclidean norm () of x; rows first, because a kernel that adds up 400,000 squares loses digits."""
    return (x * x).reshape(x.shape[0], -1).sum(1).sum().sqrt()


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Returns the gradient of ReLU.

    Raises:
        LoweringError: another threshold than 0.
    """
    if threshold != 0:
        raise LoweringError(
            f"an activation with threshold {threshold} cannot be trained on devices yet: use ReLU"
        )
    return grad * _positive(torch.relu(x))


def _positive(x: Tensor) -> Tensor:
    """Returns 1.0 where x >= 0 is positive, else 0.0; of numbers below 1e-31 a fraction."""
    return x / (x + TINY)


def _by_pixels(outgoing: Tensor, weight: Tensor, window: Window, groups: int) -> Tensor:
    """Returns the gradient by the pixels (C, P, N) from that by the outputs (O, Q, N), a kernel row after the other."""
    count, across = prod(window.outputs), window.kernel[1]
    # one output more, of zeros: for pixels that fewer outputs read than others
    outgoing = _by_group(_with_one_more(outgoing, 0.0), groups)  # (G, O / G, (Q + 1) * N)
    channels = weight.shape[1] * groups
    total = None
    for row in range(window.kernel[0]):
        taps = slice(row * across, (row + 1) * across)
        rows = _by_group(weight[:, :, row], groups).transpose(-1, -2)  # (G, C / G * kw, O / G)
        columns = _product(rows, outgoing).reshape(channels, across * (count + 1), -1)
        total = _added_up(columns, window.readers(count + 1, taps), count, total)
    assert total is not None
    return total


def _by_weight(outgoing: Tensor, pixels: Tensor, window: Window, groups: int) -> Tensor:
    """Returns the gradient by the weights (G, O / G, C / G * T), a block of outputs after the other."""
    total, at = None, 0
    for reads in _blocks(window, pixels.shape[0]):
        block = outgoing[:, at : at + reads.shape[1]]  # (O, q, N)
        at += reads.shape[1]
        lined_up = _lined_up(pixels, reads, groups)
        # this way round it is the gradient that is transposed, the smaller of the two
        product = _product(lined_up, _by_group(block, groups).transpose(-1, -2))
        total = product if total is None else total + product
    assert total is not None
    return total.transpose(-1, -2)


def _blocks(window: Window, channels: int) -> Iterator[Table]:
    """Yields the pixels (taps, q) that one run of outputs after the other reads, few enough to line up at a time."""
    reads = window.reads()
    most = max(BLOCK_BYTES // (4 * channels * window.taps), 1)
    count = -(-reads.shape[1] // most)
    yield from np.array_split(reads, count, axis=1)


def _max_window(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
) -> Window:
    window = Window(x.shape[2:], kernel, stride, padding, dilation)
    if not ceil_mode:
        return window
    outputs = aten.max_pool2d_with_indices(
        torch.empty(1, 1, *window.size, device="meta"), kernel, stride, padding, dilation, True
    )[0].shape[2:]
    return Window(x.shape[2:], kernel, stride, padding, dilation, outputs)


def _average_window(
    x: Tensor,
    kernel: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    ceil_mode: bool,
    count_include_pad: bool,
) -> Window:
    if ceil_mode or (any(padding) and not count_include_pad):
        raise LoweringError(
            "an average pool with ceil_mode, or padding it does not count, cannot be trained on devices"
        )
    return Window(x.shape[2:], kernel, stride, padding)


def _pixels(x: Tensor) -> Tensor:
    """Returns x (N, C, H, W) as (C, H * W, N)."""
    return x.permute(1, 2, 3, 0).reshape(x.shape[1], x.shape[2] * x.shape[3], -1)


def _images(y: Tensor, size: Sequence[int]) -> Tensor:
    """Returns y (C, H * W, N) as (N, C, H, W)."""
    return y.reshape(y.shape[0], *size, -1).permute(3, 0, 1, 2)


def _channels_first(x: Tensor) -> tuple[Tensor, Callable[[Tensor], Tensor]]:
    """Returns x (N, C, ...) as (C, the rest, N), and what turns such a tensor back."""
    shape, last = x.shape[1:], x.dim() - 1
    inner = x.permute(*range(1, x.dim()), 0).reshape(shape[0], prod(shape[1:]), -1)
    return inner, lambda y: y.reshape(*shape, -1).permute(last, *range(last))


def _mean(channels: Tensor) -> Tensor:
    """Returns the means (C,) of channels (C, n, N); a kernel that adds up 50,000 numbers in one go loses digits."""
    return channels.mean(2).mean(1)


def _by_group(rows: Tensor, groups: int) -> Tensor:
    """Returns rows (R, ...) as matrices (groups, R / groups, the rest), as one (R, the rest) without groups."""
    shape = [rows.shape[0]] if groups == 1 else [groups, rows.shape[0] // groups]
    return rows.reshape(*shape, -1)


def _product(one: Tensor, other: Tensor) -> Tensor:
    """Returns the product of two matrices, or of as many as there are groups."""
    return torch.mm(one, other) if one.dim() == 2 else torch.bmm(one, other)


def _lined_up(pixels: Tensor, reads: Table, groups: int) -> Tensor:
    """Returns what outputs read (taps, q) of pixels (C, P, N), as (groups, C / groups * taps, q * N)."""
    gathered = _gathered(pixels, reads.ravel(), 0.0)  # (C, T * q, N)
    return _by_group(gathered.reshape(pixels.shape[0] * len(reads), -1), groups)


def _under(pixels: Tensor, window: Window, padding: float) -> Iterator[Tensor]:
    """Yields the values (C, Q, N) at each place of the kernel, of pixels (C, P, N)."""
    for reads in window.reads():
        yield _gathered(pixels, reads, padding)


def _gathered(pixels: Tensor, table: Table, padding: float) -> Tensor:
    """Returns the pixels of a table (n,) as (C, n, N)."""
    if (table == NOWHERE).any():
        table = np.where(table == NOWHERE, pixels.shape[1], table)
        pixels = _with_one_more(pixels, padding)
    return pixels.index_select(1, torch.from_numpy(table))


def _with_one_more(columns: Tensor, value: float) -> Tensor:
    """Returns columns (C, n, N) with one behind them that holds `value`, (C, n + 1, N)."""
    return torch.cat([columns, torch.full_like(columns[:, :1], value)], 1)


def _added_up(columns: Tensor, readers: Table, zeros: int, total: Tensor | None = None) -> Tensor:
    """Returns for each pixel the sum of the columns that read it, (C, P, N), of columns (C, n, N).

    zeros   the number of a column of zeros
    total   what it is added to
    """
    for row in np.where(readers == NOWHERE, zeros, readers):
        values = columns.index_select(1, torch.from_numpy(row.copy()))
        total = values if total is None else total + values
    assert total is not None
    return total


def _spread(taps: list[Tensor], window: Window) -> Tensor:
    """Returns for each pixel the sum of what the taps, each (C, Q, N), have for it: (C, P, N)."""
    count = prod(window.outputs)
    readers = window.readers(count)
    columns = torch.cat(taps, 1)
    if (readers == NOWHERE).any():
        columns = _with_one_more(columns, 0.0)
    return _added_up(columns, readers, window.taps * count)
