"""Operations on two values or more: whose channels go together then."""

import dataclasses
import math
from collections.abc import Sequence
from typing import Any

from torch import fx

from export import operations as ops
from export.channels import Channels, Group, Part, both, either
from export.groups import Groups, called, shape_of, tensors


def join(groups: Groups, node: fx.Node, kind: object) -> None:
    """Joins the groups of two values that are added up or multiplied."""
    one, other = tensors(node)
    a, b = groups.channels.get(one), groups.channels.get(other)
    product = ops.is_one_of(kind, ops.PRODUCTS)
    if a is None or b is None:
        held, alien = (a, other) if a is not None else (b, one)
        assert held is not None
        if product and held.zero and (held is a or not ops.is_one_of(kind, ops.QUOTIENTS)):
            shape, whole = shape_of(alien), shape_of(node)
            axes = [axis - len(whole) for axis in (held.axis, held.inner) if axis is not None]
            if len(shape_of(one if held is a else other)) == len(whole) and all(
                -axis > len(shape) or shape[axis] == 1 for axis in axes
            ):
                groups.hold(node, held)
                return
        groups.stay([one, other], f"{called(node)}: what it is joined with is not pruned")
        return
    if ops.is_one_of(kind, ops.QUOTIENTS):
        groups.stay([one, other], f"{called(node)} divides by channels that may be pruned")
        return
    same = a.axis == b.axis and a.inner == b.inner and a.sizes == b.sizes
    if not same or len(shape_of(one)) != len(shape_of(other)):
        groups.stay([one, other], f"{called(node)} joins channels that do not match")
        return
    for x, y in zip(a.groups, b.groups, strict=True):
        if x is not y:
            # what is multiplied by 0 is not needed, unless something else reads it
            x_goes = product and b.zero and groups.only_read_by(x, node)
            y_goes = product and a.zero and groups.only_read_by(y, node)
            live = both(x.live, y.live) if x_goes and y_goes else either(x.live, y.live)
            if x_goes != y_goes:
                live = y.live if x_goes else x.live
            groups.merge(x, y)
            x.live = live
    zero = (a.zero or b.zero) if product else (a.zero and b.zero)
    groups.hold(node, dataclasses.replace(groups.channels[one], zero=zero, cut=a.cut and b.cut))


def attend(groups: Groups, node: fx.Node) -> None:
    """Follows softmax(q k^T) v: a channel of q and k goes if either is 0, those of v come out again."""
    names = ("query", "key", "value")
    given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
    query, key, value = (given[name] for name in names)
    rank = len(shape_of(query))
    _contract(groups, node, query, key, rank - 1, rank - 1)
    if (mask := given.get("attn_mask")) in groups.channels:
        groups.stay([mask], f"{called(node)} takes it as its mask")
    if query in groups.channels and given.get("scale") is None:
        # of as many channels as there were: fewer of them must not make another scale
        size = shape_of(query)[-1]
        node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(size)}
    if value in groups.channels:
        held = groups.channels[value]
        if (held.axis if held.inner is None else held.inner) != rank - 1:
            groups.stay([value], f"{called(node)} mixes or moves channels")
            return
        groups.hold(node, held)


def multiply(groups: Groups, node: fx.Node) -> None:
    """Follows a matrix product of two values."""
    one, other = tensors(node) if len(tensors(node)) == 2 else (None, None)
    if one is None or other is None:
        groups.stay(node.all_input_nodes, f"{called(node)} mixes or moves channels")
        return
    rank = len(shape_of(node))
    if one in groups.channels:
        _contract(groups, node, one, other, len(shape_of(one)) - 1, len(shape_of(other)) - 2)
    elif other in groups.channels:
        held = groups.channels[other]
        last = held.axis if held.inner is None else held.inner
        # a sum over other axes: 0 stays 0, another constant does not
        if last == rank - 1 and held.zero and len(shape_of(other)) == rank:
            groups.hold(node, held)
        else:
            groups.stay([other], f"{called(node)} mixes or moves channels")


def _contract(
    groups: Groups, node: fx.Node, one: fx.Node, other: fx.Node, axis: int, other_axis: int
) -> None:
    """Joins the channels of two values that are multiplied and summed up over these axes."""
    a, b = groups.channels.get(one), groups.channels.get(other)
    reason = f"{called(node)} mixes or moves channels"
    if a is None or b is None:
        groups.stay([one, other], reason)
        return
    x, y = a.single, b.single
    over = (a.axis if a.inner is None else a.inner) == axis and (
        b.axis if b.inner is None else b.inner
    ) == other_axis
    if not over or x is None or y is None or x.width != y.width or (a.inner is None) != (b.inner is None):
        groups.stay([one, other], reason)
        return
    if not (a.zero and b.zero):
        groups.stay([one, other], f"{called(node)} multiplies channels that are not zero")
        return
    if x is not y:
        alone = groups.only_read_by(x, node) and groups.only_read_by(y, node)
        live = both(x.live, y.live) if alone else either(x.live, y.live)
        groups.merge(x, y)
        x.live = live
    groups.read(dataclasses.replace(groups.channels[one], cut=a.cut and b.cut), node.name)


def line_up(groups: Groups, node: fx.Node) -> None:
    """Follows a concatenation: the channels of each value are a stretch of the result's."""
    values = node.args[0]
    axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
    followed = [value for value in node.all_input_nodes if value in groups.channels]
    first = groups.channels[followed[0]]
    if not isinstance(values, Sequence) or not isinstance(axis, int) or first.inner is not None:
        groups.stay(followed, f"{called(node)} mixes or moves channels")
        return
    axis %= len(shape_of(node))
    if axis != first.axis:
        groups.stay(followed, f"{called(node)} puts positions together")
        return
    parts: list[Part] = []
    zero = cut = True
    for value in values:
        assert isinstance(value, fx.Node)
        held = groups.channels.get(value)
        if held is None or held.axis != axis or held.inner is not None:
            groups.stay([value], f"{called(node)} mixes or moves channels")
            whole = Group(shape_of(value)[axis], refusals={"no masked layer makes it": None})
            held = Channels(axis, (Part(whole),), zero=False, cut=False)
        parts.extend(held.parts)
        zero, cut = zero and held.zero, cut and held.cut
    groups.hold(node, Channels(axis, tuple(parts), zero, cut))
