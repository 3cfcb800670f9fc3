"""The gradients of convolutions, as ONNX has fast operators for them.

Times are of one thread on x86-64, onnxruntime 1.31.
"""

from collections.abc import Callable, Sequence
from typing import TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from export.errors import LoweringError

aten = torch.ops.aten

Gradients: TypeAlias = tuple[Tensor | None, Tensor | None, Tensor | None]
"""By input, weight and bias, each None where not asked for."""

STACKING_RATIO = 1.25
"""Input rows per output row up to which a weight gradient stacks its kernel rows, with zeros between (29 ms where a
product per row takes 43: 64 channels of 28 x 28, kernel 5); beyond it the zeros cost more than they save."""
FEW_CHANNELS = 16
"""Input channels below which all pixels a kernel sees are gathered: the first layer's colours."""


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
) -> Gradients:
    """Returns the gradients of a convolution by input, weight and bias, each None where not asked for.

    One of (N, C, L) is that of images of one row, (N, C, 1, L).

    Raises:
        LoweringError: a transposed or 3-D convolution.
    """
    refuse_convolution(transposed, weight)
    if x.dim() == 3:
        return by_row(convolution_backward, grad, x, weight, stride, padding, dilation, groups, output_mask)
    stride, padding, dilation = pair(stride), pair(padding), pair(dilation)
    kernel = list(weight.shape[2:])
    by_x = by_weight = by_bias = None
    if output_mask[0]:
        # what the stride skipped at the far border, which the transposed convolution must put back
        reach = [(grad.shape[2 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
        missing = [x.shape[2 + i] + 2 * padding[i] - reach[i] for i in (0, 1)]
        # 2.7 ms where a flipped convolution takes 9.5
        by_x = aten.convolution.default(grad, weight, None, stride, padding, dilation, True, missing, groups)
    if output_mask[1]:
        by_weight = _weight_gradient(grad, x, kernel, stride, padding, dilation, groups)
    if output_mask[2]:
        by_bias = grad.sum([0, 2, 3])
    return by_x, by_weight, by_bias


def _weight_gradient(
    grad: Tensor,
    x: Tensor,
    kernel: list[int],
    stride: list[int],
    padding: list[int],
    dilation: list[int],
    groups: int,
) -> Tensor:
    """Returns the gradient (O, C / groups, kh, kw): products of the output's gradient with the pixels it was made from.

    Pixels are gathered by index from (C, pixels, N): with the examples innermost every copy is a run of memory.
    """
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    channels, height, width = x.shape[1], x.shape[2], x.shape[3]
    out, rows, columns = grad.shape[1], grad.shape[2], grad.shape[3]
    x = x.permute(1, 2, 3, 0).flatten(1, 2)  # (C, H * W, N)
    grad = grad.permute(1, 2, 3, 0)  # (O, H', W', N)
    # what output column w' and kernel column j read, (kw, W'); the same for rows
    across = _reads(kernel[1], columns, stride[1], dilation[1])
    down = _reads(kernel[0], rows, stride[0], dilation[0])
    few = isinstance(channels, int) and channels < FEW_CHANNELS
    if groups != 1 or few or kernel == [1, 1]:
        pixels = down[:, None, :, None] * width + across[:, None, :]  # (kh, kw, H', W')
        patches = x if kernel == stride == [1, 1] else gather(x, pixels)
        if groups != 1:
            patches = patches.reshape(groups, channels // groups * kernel[0] * kernel[1], -1)
            product = torch.bmm(grad.reshape(groups, out // groups, -1), patches.transpose(1, 2))
            return product.reshape(out, channels // groups, *kernel)
        patches = patches.reshape(channels * kernel[0] * kernel[1], -1)
        grad = grad.reshape(out, -1)
        # runtimes repack the second factor, in lanes of 16: the gradient, unless one colour makes even fewer columns
        product = torch.matmul(grad, patches.t()) if channels == 1 else torch.matmul(patches, grad.t()).t()
        return product.reshape(out, channels, *kernel)
    if kernel[0] > 1 and stride[0] == 1 and height <= STACKING_RATIO * rows:
        # stack the gradient once per kernel row, shifted down: all of it is one matrix product
        reach = (kernel[0] - 1) * dilation[0]
        grad = F.pad(grad.flatten(2), (0, 0, reach, reach))  # (O, H' + 2 reach, W' * N)
        shifts = reach - torch.arange(kernel[0])[:, None] * dilation[0] + torch.arange(height)
        shifted = gather(grad, shifts).reshape(out * kernel[0], -1)  # (O * kh, H * W' * N)
        pixels = torch.arange(height)[:, None] * width + across[:, None, :]  # (kw, H, W')
        lined_up = gather(x, pixels).reshape(channels * kernel[1], -1)  # (C * kw, H * W' * N)
        product = torch.matmul(shifted, lined_up.t())
        return product.reshape(out, kernel[0], channels, kernel[1]).permute(0, 2, 1, 3)
    flat = grad.reshape(out, -1)  # (O, H' * W' * N)
    by_row = []
    for row in down:
        pixels = row[:, None] * width + across[:, None, :]  # (kw, H', W')
        lined_up = gather(x, pixels).reshape(channels * kernel[1], -1)
        by_row.append(torch.matmul(flat, lined_up.t()).reshape(out, channels, 1, kernel[1]))
    return torch.cat(by_row, 2)


def _reads(kernel: int, outputs: int, stride: int, dilation: int) -> Tensor:
    """Returns the input positions (kernel, outputs) along one axis."""
    return torch.arange(kernel)[:, None] * dilation + torch.arange(outputs) * stride


def gather(x: Tensor, positions: Tensor) -> Tensor:
    """Returns x (C, P, ...) at the fixed `positions` along its second axis, flattened: (C, len, ...)."""
    return x.index_select(1, positions.flatten())


def by_row(
    backward: Callable[..., Gradients],
    grad: Tensor,  # (N, O, L')
    x: Tensor,  # (N, C, L)
    weight: Tensor,  # (O, C / groups, k)
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> Gradients:
    """Returns the gradients of a 1-D convolution by `backward`, which knows those of images: they get one row."""
    by_x, by_weight, by_bias = backward(
        *(value.unsqueeze(2) for value in (grad, x, weight)),
        *(None, [1, *stride], [0, *padding], [1, *dilation], False, [0, 0], groups, output_mask),
    )
    return (
        None if by_x is None else by_x.squeeze(2),
        None if by_weight is None else by_weight.squeeze(2),
        by_bias,
    )


def refuse_convolution(transposed: bool, weight: Tensor) -> None:
    """Returns nothing for an ordinary convolution of one or two dimensions.

    Raises:
        LoweringError: a transposed or 3-D convolution.
    """
    if transposed:
        raise LoweringError(
            f"a transposed convolution with weight {tuple(weight.shape)} cannot be trained on devices yet: use an "
            "ordinary Conv2d"
        )
    if weight.dim() not in (3, 4):
        raise LoweringError(
            f"a convolution with weight {tuple(weight.shape)} cannot be trained on devices yet: use Conv1d or Conv2d"
        )


def pair(values: Sequence[int]) -> list[int]:
    """Returns one number for each of two axes."""
    return list(values) * 2 if len(values) == 1 else list(values)
