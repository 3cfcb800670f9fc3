"""What operations become that ONNX has no good form for: others, in PyTorch or in ONNX, with the same result.

Times are of one thread on x86-64, onnxruntime 1.31.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from onnxscript import opset18 as op
from torch import Tensor
from torch._decomp import core_aten_decompositions, get_decompositions
from torch.overrides import TorchFunctionMode

from spafl.errors import SpaflError

aten = torch.ops.aten

STACKING_RATIO = 1.25
"""Input rows per output row up to which a weight gradient stacks its kernel rows, with zeros between (29 ms where a
product per row takes 43: 64 channels of 28 x 28, kernel 5); beyond it the zeros cost more than they save."""
FEW_CHANNELS = 16
"""Input channels up to which slicing the input is cheaper than stacking the gradient: the first layer's colours."""


class LoweringError(SpaflError):
    """A model holds an operation that has no exported form; the message names it."""


def decompositions() -> dict[Any, Any]:
    """Returns torch's core decompositions with ours, and those that training needs, added."""
    table: dict[Any, Any] = dict(core_aten_decompositions())
    table.update(
        get_decompositions(
            [
                aten.native_batch_norm,
                aten.native_layer_norm,
                aten.native_layer_norm_backward,
                aten.threshold_backward,
                aten.gelu_backward,
                aten.embedding_dense_backward,
                aten._softmax_backward_data,
                aten._log_softmax_backward_data,
                aten.nll_loss_forward,
                aten.nll_loss_backward,
                aten.index_fill,
            ]
        )
    )
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    table[aten.native_batch_norm_backward.default] = batch_norm_backward
    return table


def convolution_backward(
    grad: Tensor,  # (N, O, H', W')
    x: Tensor,  # (N, C, H, W)
    weight: Tensor,  # (O, C, kh, kw)
    bias_sizes: list[int] | None,
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    transposed: bool,
    output_padding: Sequence[int],
    groups: int,
    output_mask: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Returns the gradients of a 2-D convolution by input, weight and bias, each None where not asked for.

    Raises:
        LoweringError: a transposed or grouped convolution.
    """
    if transposed or groups != 1:
        raise LoweringError(
            f"a {'transposed' if transposed else 'grouped'} convolution with weight {tuple(weight.shape)} "
            "cannot be trained on devices yet: use an ordinary Conv2d"
        )
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
    kernel = list(weight.shape[2:])
    by_x = by_weight = by_bias = None
    if output_mask[0]:
        # what the stride skipped at the far border, which the transposed convolution must put back
        reach = [(grad.shape[2 + i] - 1) * stride[i] + dilation[i] * (kernel[i] - 1) + 1 for i in (0, 1)]
        missing = [x.shape[2 + i] + 2 * padding[i] - reach[i] for i in (0, 1)]
        # 2.7 ms where a flipped convolution takes 9.5
        by_x = aten.convolution.default(grad, weight, None, stride, padding, dilation, True, missing, 1)
    if output_mask[1]:
        by_weight = _weight_gradient(grad, x, kernel, stride, padding, dilation)
    if output_mask[2]:
        by_bias = grad.sum([0, 2, 3])
    return by_x, by_weight, by_bias


def _weight_gradient(
    grad: Tensor, x: Tensor, kernel: list[int], stride: list[int], padding: list[int], dilation: list[int]
) -> Tensor:
    if x.shape[1] == 1 or kernel == [1, 1]:
        # with one input channel there is nothing to gain from matrix products
        swapped: Tensor = aten.convolution.default(
            x.transpose(0, 1), grad.transpose(0, 1), None, dilation, padding, stride, False, [0, 0], 1
        )
        return swapped[:, :, : kernel[0], : kernel[1]].transpose(0, 1)
    out, height, width = grad.shape[1], grad.shape[2], grad.shape[3]
    channels = x.shape[1]
    if any(padding):
        x = F.pad(x, (padding[1], padding[1], padding[0], padding[0]))
    last = (width - 1) * stride[1] + 1
    columns = [slice(j * dilation[1], j * dilation[1] + last, stride[1]) for j in range(kernel[1])]
    few = isinstance(channels, int) and channels < FEW_CHANNELS
    if stride[0] == 1 and x.shape[2] <= STACKING_RATIO * height and not few:
        # stack the gradient once per kernel row, shifted by padding: all of it is one matrix product
        reach = (kernel[0] - 1) * dilation[0]
        rows = [i * dilation[0] for i in range(kernel[0])]
        grad = grad.permute(1, 2, 0, 3)  # (O, H', N, W')
        shifted = torch.stack([F.pad(grad, (0, 0, 0, 0, row, reach - row)) for row in rows])
        x = x.permute(1, 2, 0, 3)  # (C, H, N, W)
        lined_up = torch.stack([x[..., column] for column in columns], 1)  # (C, kw, H, N, W')
        product = torch.matmul(
            shifted.reshape(kernel[0] * out, -1), lined_up.reshape(channels * kernel[1], -1).t()
        )
        return product.reshape(kernel[0], out, channels, kernel[1]).permute(1, 2, 0, 3)
    # line up the columns of the input once; then one matrix product per kernel row
    x = x.permute(1, 2, 0, 3)  # (C, H, N, W)
    lined_up = torch.stack([x[..., column] for column in columns], 1)  # (C, kw, H, N, W')
    flat = grad.permute(1, 2, 0, 3).reshape(out, -1)  # (O, H' * N * W')
    by_row = []
    for i in range(kernel[0]):
        first = i * dilation[0]
        row = lined_up[:, :, first : first + (height - 1) * stride[0] + 1 : stride[0]]
        product = torch.matmul(flat, row.reshape(channels * kernel[1], -1).t())
        by_row.append(product.reshape(out, channels, 1, kernel[1]))
    return torch.cat(by_row, 2)


def _pair(values: Sequence[int]) -> list[int]:
    return list(values) * 2 if len(values) == 1 else list(values)


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
    """Returns the gradients of a batch norm in training by x (N, C, ...), weight and bias (C,).

    mean, inverse   (C,) of the batch, inverse = 1 / sqrt(variance + eps), as the forward pass returns them
    """
    axes = [0, *range(2, x.dim())]
    shape = [1, -1, *[1] * (x.dim() - 2)]
    count = x.numel() // x.shape[1]
    centred = x - mean.view(shape)
    total, along = grad.sum(axes), (grad * centred).sum(axes)
    scale = inverse if weight is None else inverse * weight
    away = centred * (along * inverse * inverse / count).view(shape)
    by_x = (grad - away - (total / count).view(shape)) * scale.view(shape)
    return by_x, along * inverse, total


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
    """Returns the gradient of an average pool: every output's share, spread over its window.

    Raises:
        LoweringError: windows that count fewer values at the border.
    """
    kernel, padding = _pair(kernel_size), _pair(padding)
    stride = _pair(stride) if len(stride) else kernel
    if ceil_mode or (any(padding) and not count_include_pad):
        raise LoweringError(
            "an average pool with ceil_mode, or padding it does not count, cannot be trained on devices"
        )
    missing = [
        x.shape[2 + i] + 2 * padding[i] - (grad.shape[2 + i] - 1) * stride[i] - kernel[i] for i in (0, 1)
    ]
    share = grad.new_full((1, 1, *kernel), 1 / (divisor_override or kernel[0] * kernel[1]))
    # channels become examples: a convolution of each by itself needs their number, and that is symbolic
    alone = grad.reshape(-1, 1, grad.shape[2], grad.shape[3])
    spread: Tensor = aten.convolution.default(alone, share, None, stride, padding, [1, 1], True, missing, 1)
    return spread.reshape(x.shape)


class Rewritten(TorchFunctionMode):
    """Functions written as others while tracing: what torch does for them in backward has no graph."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.silu:  # its gradient works in place
            return args[0] * torch.sigmoid(args[0])
        return func(*args, **(kwargs or {}))


def _max_pool(
    self: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int] = (),
    padding: Sequence[int] = (0, 0),
    dilation: Sequence[int] = (1, 1),
    ceil_mode: bool = False,
) -> Any:
    return op.MaxPool(
        self,
        kernel_shape=_pair(kernel_size),
        strides=_pair(stride) if len(stride) else _pair(kernel_size),
        pads=_pair(padding) * 2,
        dilations=_pair(dilation),
        ceil_mode=int(ceil_mode),
    )


def _max_pool_backward(
    grad_output: Any,
    self: Any,
    kernel_size: Sequence[int],
    stride: Sequence[int],
    padding: Sequence[int],
    dilation: Sequence[int],
    ceil_mode: bool,
    indices: Any,
) -> Any:
    """The gradient of 2x2 pools by strided slices, 2.0 ms where MaxUnpool takes 3.4; of others by scattering.

    The first maximum of a window takes the whole gradient, as in torch.
    """
    kernel, height, width = _pair(kernel_size), self.shape[2], self.shape[3]
    stride = _pair(stride) if len(stride) else kernel
    even = isinstance(height, int) and isinstance(width, int) and height % 2 == 0 and width % 2 == 0
    if kernel == stride == [2, 2] and not any(padding) and even:
        return _max_pool_2x2_backward(grad_output, self, height, width)
    # ONNX counts positions over the whole tensor, so they address the flattened input
    flat: Any = op.Constant(value_ints=[-1])
    zeros = op.ConstantOfShape(op.Reshape(op.Size(self), flat))
    scattered = op.ScatterElements(
        zeros, op.Reshape(indices, flat), op.Reshape(grad_output, flat), axis=0, reduction="add"
    )
    return op.Reshape(scattered, op.Shape(self))


def _max_pool_2x2_backward(grad: Any, x: Any, height: int, width: int) -> Any:
    def ints(*values: int) -> Any:
        return op.Constant(value_ints=list(values))

    zero = op.Constant(value_float=0.0)
    pooled = op.MaxPool(x, kernel_shape=[2, 2], strides=[2, 2])[0]
    left, corners = grad, []
    for row, column in ((0, 0), (0, 1), (1, 0)):
        corner = op.Slice(x, ints(row, column), ints(height, width), ints(2, 3), ints(2, 2))
        largest = op.Equal(corner, pooled)
        corners.append(op.Where(largest, left, zero))
        left = op.Where(largest, zero, left)
    corners.append(left)
    wide = [op.Unsqueeze(corner, ints(4)) for corner in corners]
    shape = ints(0, 0, 0, 1, width)
    top = op.Reshape(op.Concat(wide[0], wide[1], axis=4), shape)
    bottom = op.Reshape(op.Concat(wide[2], wide[3], axis=4), shape)
    return op.Reshape(op.Concat(top, bottom, axis=3), ints(0, 0, height, width))


TRANSLATIONS: dict[Callable[..., Any], Any] = {
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
}
