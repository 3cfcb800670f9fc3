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

from export.depthwise import TRANSLATION as DEPTHWISE
from spafl.errors import SpaflError

aten = torch.ops.aten

STACKING_RATIO = 1.25
"""Input rows per output row up to which a weight gradient stacks its kernel rows, with zeros between (29 ms where a
product per row takes 43: 64 channels of 28 x 28, kernel 5); beyond it the zeros cost more than they save."""
FEW_CHANNELS = 16
"""Input channels below which all pixels a kernel sees are gathered: the first layer's colours."""


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
    table[aten.threshold_backward.default] = threshold_backward
    table[aten.native_batch_norm_backward.default] = batch_norm_backward
    table[aten.max_pool2d_with_indices_backward.default] = max_pool2d_backward
    return table


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
    """Returns the gradients of a 2-D convolution by input, weight and bias, each None where not asked for.

    Raises:
        LoweringError: a transposed convolution.
    """
    if transposed:
        raise LoweringError(
            f"a transposed convolution with weight {tuple(weight.shape)} cannot be trained on devices yet: use an "
            "ordinary Conv2d"
        )
    stride, padding, dilation = _pair(stride), _pair(padding), _pair(dilation)
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
        patches = _gather(x, pixels)
        if groups != 1:
            patches = patches.reshape(groups, channels // groups * kernel[0] * kernel[1], -1)
            product = torch.bmm(grad.reshape(groups, out // groups, -1), patches.transpose(1, 2))
            return product.reshape(out, channels // groups, *kernel)
        patches = patches.reshape(channels * kernel[0] * kernel[1], -1)
        grad = grad.reshape(out, -1)
        # runtimes repack the second factor, in lanes of 16: the gradient, unless one colour makes even fewer columns
        product = torch.matmul(grad, patches.t()) if channels == 1 else torch.matmul(patches, grad.t()).t()
        return product.reshape(out, channels, *kernel)
    if stride[0] == 1 and height <= STACKING_RATIO * rows:
        # stack the gradient once per kernel row, shifted down: all of it is one matrix product
        reach = (kernel[0] - 1) * dilation[0]
        grad = F.pad(grad.flatten(2), (0, 0, reach, reach))  # (O, H' + 2 reach, W' * N)
        shifts = reach - torch.arange(kernel[0])[:, None] * dilation[0] + torch.arange(height)
        shifted = _gather(grad, shifts).reshape(out * kernel[0], -1)  # (O * kh, H * W' * N)
        pixels = torch.arange(height)[:, None] * width + across[:, None, :]  # (kw, H, W')
        lined_up = _gather(x, pixels).reshape(channels * kernel[1], -1)  # (C * kw, H * W' * N)
        product = torch.matmul(shifted, lined_up.t())
        return product.reshape(out, kernel[0], channels, kernel[1]).permute(0, 2, 1, 3)
    flat = grad.reshape(out, -1)  # (O, H' * W' * N)
    by_row = []
    for row in down:
        pixels = row[:, None] * width + across[:, None, :]  # (kw, H', W')
        lined_up = _gather(x, pixels).reshape(channels * kernel[1], -1)
        by_row.append(torch.matmul(flat, lined_up.t()).reshape(out, channels, 1, kernel[1]))
    return torch.cat(by_row, 2)


def _reads(kernel: int, outputs: int, stride: int, dilation: int) -> Tensor:
    """Returns the input positions (kernel, outputs) along one axis."""
    return torch.arange(kernel)[:, None] * dilation + torch.arange(outputs) * stride


def _gather(x: Tensor, positions: Tensor) -> Tensor:
    """Returns x (C, P, ...) at the fixed `positions` along its second axis, flattened: (C, len, ...)."""
    return x.index_select(1, positions.flatten())


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


def threshold_backward(grad: Tensor, x: Tensor, threshold: float) -> Tensor:
    """Returns the gradient of ReLU, as a product with 0 or 1: two thirds of the time of a Where."""
    return grad * (x > threshold).to(grad.dtype)


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
    kernel, size = _pair(kernel_size), [int(side) for side in x.shape[2:]]
    stride = _pair(stride) if len(stride) else kernel
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
    spread = _gather(torch.cat([*columns, left], 1), taps.flatten().argsort())
    return spread.reshape(spread.shape[0], *size, -1).permute(3, 0, 1, 2)


class Rewritten(TorchFunctionMode):
    """Functions written as others while tracing, with the same result."""

    def __init__(self) -> None:
        super().__init__()
        self._rectified: dict[int, tuple[Tensor, Tensor]] = {}

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is F.silu:  # its gradient works in place
            return args[0] * torch.sigmoid(args[0])
        if func in (F.relu, torch.relu, Tensor.relu):
            y = func(*args, **(kwargs or {}))
            self._rectified[id(y)] = (y, args[0])  # y is kept, so that no other tensor gets its id
            return y
        if func in (F.max_pool2d, torch.max_pool2d) and id(args[0]) in self._rectified:
            # max_pool(relu(x)) = relu(max_pool(x)), gradients too, for a quarter of the work: where a window's
            # maximum is positive it stands in the same place, and where it is not there is no gradient
            pooled = func(self._rectified[id(args[0])][1], *args[1:], **(kwargs or {}))
            if isinstance(pooled, Tensor):  # not with its indices: a window without gradient has none
                return F.relu(pooled)
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
    """The gradient of pools whose windows overlap, or leave something out: added up where the maxima stood."""
    # ONNX counts positions over the whole tensor, so they address the flattened input
    flat: Any = op.Constant(value_ints=[-1])
    zeros = op.ConstantOfShape(op.Reshape(op.Size(self), flat))
    scattered = op.ScatterElements(
        zeros, op.Reshape(indices, flat), op.Reshape(grad_output, flat), axis=0, reduction="add"
    )
    return op.Reshape(scattered, op.Shape(self))


def _sign(self: Any) -> Any:
    """The sign, in half the time Sign takes; of numbers below 1e-38, which are not normal, a fraction."""
    return op.Clip(
        op.Mul(self, op.Constant(value_float=3e38)),
        op.Constant(value_float=-1.0),
        op.Constant(value_float=1.0),
    )


def _index_select(self: Any, dim: int, index: Any) -> Any:
    return op.Gather(self, index, axis=dim)


def _vector_norm(
    self: Any, order: float = 2, dim: Sequence[int] | None = None, keepdim: bool = False, dtype: int = -1
) -> Any:
    if order != 2:
        raise LoweringError(f"a norm of order {order} cannot be exported yet: use order 2")
    if dim is None:
        return op.ReduceL2(self, keepdims=int(keepdim))
    axes: Any = op.Constant(value_ints=list(dim))
    return op.ReduceL2(self, axes, keepdims=int(keepdim))


TRANSLATIONS: dict[Callable[..., Any], Any] = {
    aten.index_select.default: _index_select,
    aten.linalg_vector_norm.default: _vector_norm,
    aten.sign.default: _sign,
    aten.sgn.default: _sign,
    aten.max_pool2d_with_indices.default: _max_pool,
    aten.max_pool2d_with_indices_backward.default: _max_pool_backward,
    **DEPTHWISE,
}
