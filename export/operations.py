"""What the operations of a traced model do to channels, as far as leaving some out is concerned."""

import operator
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import fx, nn

RELU = (nn.ReLU, F.relu, torch.relu, "relu")
ZERO_AT_ZERO = (
    *RELU,
    *(nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Identity),
    *(F.relu6, F.gelu, F.silu, F.elu, F.leaky_relu, F.hardswish, F.tanh, torch.tanh, "tanh"),
    *(nn.Dropout, nn.Dropout1d, nn.Dropout2d, F.dropout, "contiguous", "clone"),
    *(torch.neg, operator.neg, "neg", torch.abs, "abs", torch.square, "square"),
)
"""Elementwise, and 0 stays 0."""
ELSEWHERE = (
    *(
        nn.Sigmoid,
        nn.Hardsigmoid,
        nn.Softplus,
        F.sigmoid,
        torch.sigmoid,
        F.hardsigmoid,
        F.softplus,
        "sigmoid",
    ),
    *(torch.exp, "exp"),
)
"""Elementwise, and 0 becomes something else."""
MAX_POOLS = (
    *(nn.MaxPool1d, nn.MaxPool2d, nn.AdaptiveMaxPool1d, nn.AdaptiveMaxPool2d),
    *(F.max_pool1d, F.max_pool2d, F.adaptive_max_pool1d, F.adaptive_max_pool2d),
)
AVERAGE_POOLS = (
    *(nn.AvgPool1d, nn.AvgPool2d, nn.AdaptiveAvgPool1d, nn.AdaptiveAvgPool2d),
    *(F.avg_pool1d, F.avg_pool2d, F.adaptive_avg_pool1d, F.adaptive_avg_pool2d),
)
POOLS = (*MAX_POOLS, *AVERAGE_POOLS)
"""Channel by channel, over positions; a constant stays the same constant, some average pools with padding aside."""
SUMS = (operator.add, operator.iadd, operator.sub, torch.add, torch.sub, "add", "sub", "add_")
QUOTIENTS = (operator.truediv, torch.div, "div")
PRODUCTS = (operator.mul, operator.imul, torch.mul, "mul", *QUOTIENTS)
ARITHMETIC = (*SUMS, *PRODUCTS)
CATS = (torch.cat, torch.concat)
MEANS = (torch.mean, "mean", torch.amax, "amax")
RESHAPES = ("view", "reshape", torch.reshape)
FLATTENS = (nn.Flatten, torch.flatten, "flatten")
UNFLATTENS = (nn.Unflatten, torch.unflatten, "unflatten")
AXES = (torch.squeeze, "squeeze", torch.unsqueeze, "unsqueeze")
TRANSPOSES = (torch.transpose, "transpose", torch.swapaxes, "swapaxes")
PERMUTES = (torch.permute, "permute")
MATMULS = (torch.matmul, operator.matmul, "matmul", torch.bmm, "bmm")
ATTENTION = (F.scaled_dot_product_attention,)
NORMALISING = (nn.LayerNorm, nn.GroupNorm, nn.InstanceNorm1d, nn.InstanceNorm2d, F.layer_norm, F.group_norm)

_POOL_OPTIONS = (
    *("input", "kernel_size", "stride", "padding", "ceil_mode", "count_include_pad", "divisor_override"),
)


def is_one_of(kind: object, known: tuple[object, ...]) -> bool:
    """Returns whether `kind`, a module, a function or a method's name, is among the `known`."""
    if isinstance(kind, nn.Module):
        return type(kind) in known
    return any(kind is entry or (isinstance(entry, str) and kind == entry) for entry in known)


def moves_constants(kind: object, node: fx.Node) -> bool:
    """Returns whether an average pool makes another value of a constant, at borders or everywhere."""
    if kind in (F.avg_pool1d, F.avg_pool2d):
        options = {**dict(zip(_POOL_OPTIONS, node.args, strict=False)), **node.kwargs}
    elif isinstance(kind, nn.AvgPool1d | nn.AvgPool2d):
        options = vars(kind)
    else:
        return False
    padding = options.get("padding", 0)
    return any(padding if isinstance(padding, tuple | list) else (padding,)) or bool(
        options.get("divisor_override")
    )


def axes_of(node: fx.Node, rank: int) -> tuple[int, ...] | None:
    """Returns the axes, counted from 0, that a mean goes over; None where it does not say."""
    named: Any = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else None)
    if isinstance(named, int):
        named = (named,)
    if not isinstance(named, Sequence) or not all(isinstance(axis, int) for axis in named):
        return None
    return tuple(axis % rank for axis in named)


def keeps_axes(node: fx.Node) -> bool:
    """Returns whether a mean leaves axes of size 1 where it went over them."""
    return bool(node.kwargs.get("keepdim", node.args[2] if len(node.args) > 2 else False))


def permutation(node: fx.Node, kind: object, rank: int) -> tuple[int, ...] | None:
    """Returns the old axis at each new one, of a transpose or permute; None where it is not written in numbers."""
    named: list[Any] = list(node.args[1:]) or list(node.kwargs.values())
    if len(named) == 1 and isinstance(named[0], Sequence):
        named = list(named[0])
    if not all(isinstance(axis, int) for axis in named):
        return None
    axes = [axis % rank for axis in named]
    if is_one_of(kind, PERMUTES):
        return tuple(axes)
    order = list(range(rank))
    order[axes[0]], order[axes[1]] = axes[1], axes[0]
    return tuple(order)


def picked(node: fx.Node, rank: int) -> tuple[int | None, ...] | None:
    """Returns the new place of each old axis an index of integers and slices leaves whole, None for the others.

    None as a whole where the index holds anything else.
    """
    index = node.args[1] if isinstance(node.args[1], tuple) else (node.args[1],)
    if not all(isinstance(entry, int | slice) for entry in index):
        return None
    places: list[int | None] = []
    new = 0
    for axis in range(rank):
        entry = index[axis] if axis < len(index) else slice(None)
        places.append(new if entry == slice(None) else None)
        new += isinstance(entry, slice)
    return tuple(places)
