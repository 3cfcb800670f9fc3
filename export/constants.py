"""What channels that are left out would be, and what layers and norms compute with."""

import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx

from export import operations as ops
from export.channels import Group
from export.flow import BatchNorm, ChannelFlows, Layer
from export.groups import shape_of
from trainer.masked import Masked
from trainer.norm import GatedBatchNorm


def constants(flows: ChannelFlows, node: fx.Node, dropped: Callable[[Group], bool]) -> Tensor | None:
    """Returns what each channel is in `node`'s value if it is left out, one entry a place; None: all are 0.

    Computed from the tensors the modules hold when called, so that it can be traced. Where a channel stays, whatever
    stands there is nothing to rely on.
    """
    held = flows.channels[node]
    if held.zero or not any(dropped(group) for group in held.groups):
        return None
    return _Constants(flows).of(node)


class _Constants:
    """What channels that are left out would be, value by value."""

    def __init__(self, flows: ChannelFlows) -> None:
        self._flows = flows
        self._known: dict[fx.Node, Tensor] = {}

    def of(self, node: fx.Node) -> Tensor:
        """Returns a value (places,) for each place along the axis of `node`'s channels."""
        if node not in self._known:
            held = self._flows.channels[node]
            size = sum(part.size for part in held.parts)
            self._known[node] = torch.zeros(size) if held.zero else self._computed(node)
        return self._known[node]

    def _computed(self, node: fx.Node) -> Tensor:
        kind, held = self._flows.kind(node), self._flows.channels[node]
        if isinstance(kind, Layer):
            return self._made(node, kind)
        if isinstance(kind, BatchNorm):
            scale, shift = scale_and_shift(kind)
            return self.of(node.all_input_nodes[0]) * scale + shift
        if ops.is_one_of(kind, ops.CATS):
            values: Any = node.args[0]
            return torch.cat([self._or_zeros(value, held.axis) for value in values])
        if ops.is_one_of(kind, ops.ATTENTION):
            # a mean of one value is this value
            averaged: Any = node.args[2] if len(node.args) > 2 else node.kwargs["value"]
            return self.of(averaged)
        if ops.is_one_of(kind, (*ops.ZERO_AT_ZERO, *ops.ELSEWHERE, *ops.ARITHMETIC)):
            return self._applied(node, kind)
        # pools, means and reshapes leave a constant as it is
        (source,) = (value for value in node.all_input_nodes if value in self._flows.channels)
        before, value = self._flows.channels[source], self.of(source)
        times = held.parts[0].columns // before.parts[0].columns
        return value.repeat_interleave(times) if times > 1 else value

    def _made(self, node: fx.Node, layer: Layer) -> Tensor:
        if str(node.target) not in self._flows.channels[node].parts[0].group.depthwise:
            if layer.bias is None or (isinstance(layer, Masked) and layer.gate):
                return torch.zeros(len(layer.weight))
            return layer.bias
        weight, bias = weight_and_bias(layer)
        bias = torch.zeros(len(weight)) if bias is None else bias
        source = node.args[0]
        assert isinstance(source, fx.Node)
        return bias + weight.flatten(1).sum(1) * self.of(source)

    def _applied(self, node: fx.Node, kind: object) -> Tensor:
        """Returns what an elementwise operation makes of the constants it is given."""
        channels = self._flows.channels
        arguments = fx.map_arg(node.args, lambda value: self.of(value) if value in channels else value)
        options = {name: option for name, option in node.kwargs.items() if name != "inplace"}
        if isinstance(kind, str):
            return getattr(arguments[0], kind)(*arguments[1:], **options)  # type: ignore[no-any-return]
        assert callable(kind)
        in_place = {operator.iadd: operator.add, operator.imul: operator.mul}
        return in_place.get(kind, kind)(*arguments, **options)  # type: ignore[no-any-return]

    def _or_zeros(self, value: fx.Node, axis: int) -> Tensor:
        if value in self._flows.channels:
            return self.of(value)
        return torch.zeros(shape_of(value)[axis])


def weight_and_bias(layer: Layer) -> tuple[Tensor, Tensor | None]:
    """Returns the weight and bias a layer computes with, masked where it is a masked one."""
    if isinstance(layer, Masked):
        return layer.masked_weight(), layer.masked_bias()
    return layer.weight, layer.bias


def scale_and_shift(norm: BatchNorm) -> tuple[Tensor, Tensor]:
    """Returns what a batch norm multiplies by and adds in inference, (channels,) each, its gate worked in."""
    assert norm.running_var is not None
    assert norm.running_mean is not None
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean * scale
    shift = shift if norm.bias is None else shift + norm.bias
    if isinstance(norm, GatedBatchNorm):
        active = norm.source.active()
        return scale * active, shift * active
    return scale, shift
