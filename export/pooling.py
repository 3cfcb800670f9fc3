"""The gradients of pools, as ONNX has fast operators for them."""

from collections.abc import Sequence
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from export.convolution import gather, pair
from export.errors import LoweringError

aten = torch.ops.aten

Weights: TypeAlias = NDArray[np.float64]


def avg_pool2d(
    x: Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0,),
    ceil_mode: bool = False,
    count_include_pad: bool = True,
    divisor_override: int | None = None,
) -> Any:
    """Returns an average pool that divides by a number of its own, which ONNX's cannot; NotImplemented of others."""
    if divisor_override is None:
        return NotImplemented
    kernel, padding = pair(kernel_size), pair(padding)
    stride = pair(stride) if len(stride) else kernel
    shape = aten.avg_pool2d(
        torch.empty(1, 1, *x.shape[2:], device="meta"), kernel, stride, padding, ceil_mode
    ).shape
    axes = zip(x.shape[2:], shape[2:], kernel, stride, padding, strict=True)
    down, across = (np.sign(_windows(int(n), int(out), k, s, p, True)) for n, out, k, s, p in axes)
    rows, columns = (torch.from_numpy(each).to(x.dtype) for each in (down / divisor_override, across))
    return torch.matmul(rows, torch.matmul(x, columns.t()))


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
    """Returns the gradient of an average pool: every output's share, spread over its window."""
    kernel, padding = pair(kernel_size), pair(padding)
    stride = pair(stride) if len(stride) else kernel
    if ceil_mode or (any(padding) and not count_include_pad):
        axes = zip(x.shape[2:], grad.shape[2:], kernel, stride, padding, strict=True)
        down, across = (_windows(int(n), int(out), k, s, p, count_include_pad) for n, out, k, s, p in axes)
        return _spread(grad, down, across, divisor_override)
    missing = [
        x.shape[2 + i] + 2 * padding[i] - (grad.shape[2 + i] - 1) * stride[i] - kernel[i] for i in (0, 1)
    ]
    share = grad.new_full((1, 1, *kernel), 1 / (divisor_override or kernel[0] * kernel[1]))
    # channels become examples: a convolution of each by itself needs their number, and that is symbolic
    alone = grad.reshape(-1, 1, grad.shape[2], grad.shape[3])
    spread: Tensor = aten.convolution.default(alone, share, None, stride, padding, [1, 1], True, missing, 1)
    return spread.reshape(x.shape)


def adaptive_avg_pool2d_backward(grad: Tensor, x: Tensor) -> Tensor:
    """Returns the gradient of an adaptive average pool, for grad (N, C, H', W') and x (N, C, H, W)."""
    down, across = (_areas(int(n), int(out)) for n, out in zip(x.shape[2:], grad.shape[2:], strict=True))
    return _spread(grad, down, across)


def _areas(size: int, outputs: int) -> Weights:
    """Returns which positions (outputs, size) of an axis each output of an adaptive pool sees, as shares of 1."""
    weights = np.zeros((outputs, size), np.float64)
    for output in range(outputs):
        first, last = output * size // outputs, -(-(output + 1) * size // outputs)
        weights[output, first:last] = 1 / (last - first)
    return weights


def _windows(
    size: int, outputs: int, kernel: int, stride: int, padding: int, count_include_pad: bool
) -> Weights:
    """Returns which positions (outputs, size) of an axis each output of an average pool sees, as shares of 1."""
    weights = np.zeros((outputs, size), np.float64)
    for output in range(outputs):
        start = output * stride - padding
        end = min(start + kernel, size + padding)
        inside = slice(max(start, 0), min(end, size))
        weights[output, inside] = 1 / (end - start if count_include_pad else inside.stop - inside.start)
    return weights


def _spread(grad: Tensor, down: Weights, across: Weights, divisor: int | None = None) -> Tensor:
    """Returns grad (N, C, H', W') spread over what it is the mean of, (N, C, H, W): a product along each axis."""
    if divisor is not None:
        down, across = np.sign(down) / divisor, np.sign(across)
    rows, columns = (torch.from_numpy(weights).to(grad.dtype) for weights in (down, across))
    return torch.matmul(rows.t(), torch.matmul(grad, columns))


def adaptive_max_pool2d_backward(grad: Tensor, x: Tensor, indices: Tensor) -> Any:
    """Returns the gradient of an adaptive max pool whose areas are of one size.

    Raises:
        LoweringError: they are not.
    """
    sizes = [(int(n), int(out)) for n, out in zip(x.shape[2:], grad.shape[2:], strict=True)]
    if any(n % out for n, out in sizes):
        raise LoweringError(
            f"an adaptive max pool of {[n for n, _ in sizes]} positions into {[out for _, out in sizes]} cannot be "
            "trained on devices yet: use numbers that divide, or MaxPool"
        )
    kernel = [n // out for n, out in sizes]
    return max_pool2d_backward(grad, x, kernel, kernel, [0, 0], [1, 1], False, indices)


def max_pool2d_backward(
    grad: Tensor,  # (N, C, H', W')
    x: Tensor,  # (N, C, H, W)
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Tensor,
) -> Any:
    """Returns the gradient of a max pool: the first largest value under the kernel takes it all, as in torch.

    Of windows that lie side by side and leave nothing out; NotImplemented of others. Pixels are gathered from
    (C, pixels, N), as for a weight's gradient.
    """
    # never symbolic: only the batch is
    kernel, size = pair(kernel_size), [int(side) for side in x.shape[2:]]
    stride = pair(stride) if len(stride) else kernel
    apart = stride == kernel and not any(padding) and all(each == 1 for each in dilation)
    if not apart or any(n % k for n, k in zip(size, kernel, strict=True)):
        return NotImplemented
    places = torch.arange(size[0] * size[1]).reshape(size[0] // kernel[0], kernel[0], -1, kernel[1])
    taps = places.permute(1, 3, 0, 2).flatten(0, 1).flatten(1)  # (kh * kw, H' * W'): what each output sees
    # written as the forward pass has it, so that a runtime merges the two
    pooled = aten.max_pool2d_with_indices.default(x, kernel_size, stride, padding, dilation, ceil_mode)[0]
    pixels, largest, left = (each.permute(1, 2, 3, 0).flatten(1, 2) for each in (x, pooled, grad))
    columns = []
    for tap in taps[:-1]:
        # as numbers: Where takes three times as long as a product
        taken = left * (pixels.index_select(1, tap) == largest).to(left.dtype)
        columns.append(taken)
        left = left - taken
    spread = gather(torch.cat([*columns, left], 1), taps.flatten().argsort())
    return spread.reshape(spread.shape[0], *size, -1).permute(3, 0, 1, 2)
