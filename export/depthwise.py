"""Depthwise convolutions of as many channels as a mask leaves.

ONNX has the number of groups as an attribute, fixed in the file; with channels left out it is another one. So the file
holds it in five bytes, however small it is, whose place the manifest tells: whoever supplies the weights writes it
there (`spafl.rows.write_widths`).
"""

from collections.abc import Callable, Mapping
from typing import Any

import torch
import torch.nn.functional as F
from onnxscript import opset18 as op
from torch import Tensor, nn

from spafl.rows import WIDTH_BYTES, width_bytes

_FIRST = 1 << 33
"""Stands for the number of groups of the first one until the file is written. Larger than any, five bytes long."""


def depthwise(
    layer: nn.Conv1d | nn.Conv2d, x: Tensor, weight: Tensor, bias: Tensor | None, number: int
) -> Tensor:
    """Returns the depthwise convolution of x (N, k, ...) with weight (k, 1, ...), padded and strided as `layer` is.

    number  of the layer among those of its model: `with_widths` finds it again by it
    """
    mode = "constant" if layer.padding_mode == "zeros" else layer.padding_mode
    if layer.padding not in ("valid", *((0,) * n for n in (1, 2))):
        x = F.pad(x, layer._reversed_padding_repeated_twice, mode=mode)
    bias = weight.new_zeros(weight.shape[0]) if bias is None else bias
    y: Tensor = torch.ops.spafl.depthwise(x, weight, bias, list(layer.stride), list(layer.dilation), number)
    return y


@torch.library.custom_op("spafl::depthwise", mutates_args=())
def _depthwise(
    x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], dilation: list[int], number: int
) -> Tensor:
    convolve = F.conv1d if weight.dim() == 3 else F.conv2d
    return convolve(x, weight, bias, stride, 0, dilation, groups=weight.shape[0])


@_depthwise.register_fake
def _(x: Tensor, weight: Tensor, bias: Tensor, stride: list[int], dilation: list[int], number: int) -> Tensor:
    sizes = [
        (size - step * (kernel - 1) - 1) // by + 1
        for size, kernel, by, step in zip(x.shape[2:], weight.shape[2:], stride, dilation, strict=True)
    ]
    return x.new_empty(x.shape[0], weight.shape[0], *sizes)


def _translated(x: Any, weight: Any, bias: Any, stride: Any, dilation: Any, number: int) -> Any:
    return op.Conv(x, weight, bias, strides=list(stride), dilations=list(dilation), group=_FIRST + number)


TRANSLATION: dict[Callable[..., Any], Any] = {torch.ops.spafl.depthwise.default: _translated}


def with_widths(model: bytes, layers: Mapping[str, int]) -> tuple[bytes, dict[str, int]]:
    """Returns the file of a model with its whole width in each depthwise convolution, and where these stand.

    layers   channels by name, numbered in this order
    """
    places = {}
    for number, (layer, width) in enumerate(layers.items()):
        mark = width_bytes(_FIRST + number)
        at = model.find(mark)
        if at < 0 or model.find(mark, at + 1) >= 0:
            raise AssertionError(f"{layer}: its number of groups is not in the file once")
        model = model[:at] + width_bytes(width) + model[at + WIDTH_BYTES :]
        places[layer] = at
    return model, places
