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

from export.convolution import convolution_backward, pair
from export.depthwise import TRANSLATION as DEPTHWISE
from export.errors import LoweringError as LoweringError
from export.pooling import (
    adaptive_avg_pool2d_backward,
    adaptive_max_pool2d_backward,
    avg_pool2d,
    avg_pool2d_backward,
    max_pool2d_backward,
)

aten = torch.ops.aten


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
                aten._softmax_backward_data,
                aten._log_softmax_backward_data,
                aten.nll_loss_forward,
                aten.nll_loss_backward,
                aten.index_fill,
            ]
        )
    )
    table[aten.convolution_backward.default] = convolution_backward
    table[aten.avg_pool2d.default] = avg_pool2d
    table[aten.avg_pool2d_backward.default] = avg_pool2d_backward
    table[aten._adaptive_avg_pool2d_backward.default] = adaptive_avg_pool2d_backward
    table[aten.adaptive_max_pool2d_backward.default] = adaptive_max_pool2d_backward
    table[aten.embedding_dense_backward.default] = embedding_backward
    table[aten.threshold_backward.default] = threshold_backward
    table[aten.native_batch_norm_backward.default] = batch_norm_backward
    table[aten.max_pool2d_with_indices_backward.default] = max_pool2d_backward
    return table


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


def embedding_backward(
    grad: Tensor,  # (..., dim)
    indices: Tensor,  # (...)
    num_weights: int,
    padding_idx: int,
    scale_grad_by_freq: bool,
) -> Tensor:
    """Returns the gradient of an embedding's weight (num_weights, dim): that of each place added to its token's row.

    In the order of the places, as torch adds them up. Torch's own form is a ScatterND, whose additions may run in
    parallel where a token comes twice.

    Raises:
        LoweringError: gradients scaled by frequency.
    """
    if scale_grad_by_freq:
        raise LoweringError(
            "an embedding with scale_grad_by_freq cannot be trained on devices yet: switch it off"
        )
    rows, places = grad.reshape(-1, grad.shape[-1]), indices.reshape(-1, 1)
    if padding_idx >= 0:
        rows = rows * (places != padding_idx).to(rows.dtype)
    zeros = rows.new_zeros(num_weights, rows.shape[1])
    return zeros.scatter_add(0, places.expand(-1, rows.shape[1]), rows)


_MAX_POOLS = (F.max_pool1d, torch.max_pool1d, F.max_pool2d, torch.max_pool2d)


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
        if func is F.linear and args[0].dim() > 2:
            # with a bias torch counts the rows, which takes the batch for a constant, or adds it in place
            bias = args[2] if len(args) > 2 else (kwargs or {}).get("bias")
            if bias is not None:
                return torch.matmul(args[0], args[1].t()) + bias
        if func in (F.relu, torch.relu, Tensor.relu):
            y = func(*args, **(kwargs or {}))
            self._rectified[id(y)] = (y, args[0])  # y is kept, so that no other tensor gets its id
            return y
        if func in _MAX_POOLS and id(args[0]) in self._rectified:
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
        kernel_shape=pair(kernel_size),
        strides=pair(stride) if len(stride) else pair(kernel_size),
        pads=pair(padding) * 2,
        dilations=pair(dilation),
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
