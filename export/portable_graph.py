"""A traced graph made cheap for ExecuTorch's kernels: fewer transposed copies, one symbolic size, state written last.

Its permutations copy element by element. So those that undo each other are taken out, after they were moved through
what works on each element by itself, and products of matrices are written the way that transposes the least.
"""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, fx

from export.lowering import infer_sizes

aten = torch.ops.aten

TRANSPOSING = 160
"""Columns up to which a product with a transposed second factor is cheaper than transposing that factor first: the
one kernel takes 0.1 ns more per multiplication, the other 16 ns per element."""


def tidy_up(traced: fx.GraphModule, in_place: Sequence[tuple[int, int]] = ()) -> None:
    """Returns nothing; `traced` computes the same with fewer copies.

    in_place   (input, output) numbers that may share their memory: the output is written when nobody reads the input
               any more
    """
    _write_as_permute(traced.graph)
    _split_addmm(traced.graph)
    _cancel(traced.graph)
    _turn_products(traced.graph)
    _cancel(traced.graph)
    infer_sizes(traced.graph)
    _merge_constants(traced)
    _write_last(traced.graph, in_place)
    traced.graph.eliminate_dead_code()
    traced.graph.lint()
    traced.recompile()


def _order(node: Any) -> list[int] | None:
    """Returns the order of axes of a permutation, None for other nodes."""
    if isinstance(node, fx.Node) and node.target is aten.permute.default:
        return [axis % len(node.args[1]) for axis in node.args[1]]  # type: ignore[arg-type, operator, union-attr]
    return None


def _value(node: fx.Node) -> Any:
    return node.meta.get("val")


def _call(graph: fx.Graph, before: fx.Node, target: Any, *arguments: Any) -> fx.Node:
    """Returns a new node in front of `before`, with an example of its value."""
    with graph.inserting_before(before):
        node = graph.call_function(target, arguments)
    node.meta["val"] = target(*(_value(a) if isinstance(a, fx.Node) else a for a in arguments))
    return node


def _replace(graph: fx.Graph, node: fx.Node, by: fx.Node) -> None:
    node.replace_all_uses_with(by)
    graph.erase_node(node)


def _write_as_permute(graph: fx.Graph) -> None:
    for node in graph.nodes:
        if node.target not in (aten.t.default, aten.transpose.int):
            continue
        order = list(range(_value(node).dim()))
        if len(order) > 1:
            one, other = node.args[1:] if node.target is aten.transpose.int else (0, 1)
            order[one], order[other] = order[other], order[one]
        node.target, node.args = aten.permute.default, (node.args[0], order)


def _split_addmm(graph: fx.Graph) -> None:
    # as one operation it takes 30 times as long as the two
    for node in list(graph.nodes):
        if node.target is aten.addmm.default and not node.kwargs:
            bias, one, other = node.args
            product = _call(graph, node, aten.mm.default, one, other)
            _replace(graph, node, _call(graph, node, aten.add.Tensor, product, bias))


def _cancel(graph: fx.Graph) -> None:
    """Moves permutations behind what works by element, and takes out those that undo each other."""
    changed = True
    while changed:
        changed = False
        for node in list(graph.nodes):
            order = _order(node)
            if order is not None:
                changed |= _merged(graph, node, order)
            elif _by_element(node):
                changed |= _moved(graph, node)


def _merged(graph: fx.Graph, node: fx.Node, order: list[int]) -> bool:
    source = node.args[0]
    assert isinstance(source, fx.Node)
    if not node.users:
        graph.erase_node(node)
    elif order == sorted(order):
        _replace(graph, node, source)
    elif (before := _order(source)) is not None:
        node.args = (source.args[0], [before[axis] for axis in order])
    else:
        return False
    return True


def _by_element(node: fx.Node) -> bool:
    return (
        isinstance(node.target, torch._ops.OpOverload)
        and torch.Tag.pointwise in node.target.tags
        and isinstance(_value(node), Tensor)
    )


def _moved(graph: fx.Graph, node: fx.Node) -> bool:
    """Returns whether the permutation that all operands share was moved behind `node`."""
    operands = [
        each for each in node.all_input_nodes if isinstance(_value(each), Tensor) and _value(each).dim()
    ]
    orders = [_order(each) for each in operands]
    order = orders[0] if orders else None
    if order is None or any(each != order for each in orders):
        return False
    for operand in operands:
        node.replace_input_with(operand, operand.all_input_nodes[0])
    value = _value(node)
    node.meta["val"] = value.permute([order.index(axis) for axis in range(len(order))])
    with graph.inserting_after(node):
        behind = graph.call_function(aten.permute.default, (node, order))
    behind.meta["val"] = value
    node.replace_all_uses_with(behind, delete_user_cb=lambda user: user is not behind)
    return True


def _turn_products(graph: fx.Graph) -> None:
    for node in list(graph.nodes):
        if node.target is aten.mm.default:
            _turned(graph, node)
    _cancel(graph)
    for node in list(graph.nodes):
        if node.target is not aten.mm.default:
            continue
        one, other = node.args
        assert isinstance(one, fx.Node)
        assert isinstance(other, fx.Node)
        if _order(other) is not None and _value(one).shape[0] <= TRANSPOSING:
            # `linear` takes its second factor transposed
            _replace(graph, node, _call(graph, node, aten.linear.default, one, other.args[0]))


def _turned(graph: fx.Graph, node: fx.Node) -> None:
    """Writes A B as (B' A')' where that transposes fewer elements."""
    one, other = node.args
    factors = [factor for factor in (one, other) if isinstance(factor, fx.Node)]
    transposed = [factor for factor in factors if _order(factor) is not None]
    direct = [factor for factor in factors if _order(factor) is None]
    if sum(map(_size, transposed)) > sum(map(_size, direct)) + _size(node):
        turned = [_call(graph, node, aten.permute.default, factor, [1, 0]) for factor in (other, one)]
        product = _call(graph, node, aten.mm.default, *turned)
        _replace(graph, node, _call(graph, node, aten.permute.default, product, [1, 0]))


def _size(node: fx.Node) -> int:
    """Returns the number of elements, for the example's batch."""
    size = 1
    for axis in _value(node).shape:
        size *= axis if isinstance(axis, int) else axis.node.hint
    return size


def _merge_constants(traced: fx.GraphModule) -> None:
    """Keeps one of equal tables: forward and backward read the same pixels."""
    first: dict[tuple[Any, ...], str] = {}
    for node in traced.graph.nodes:
        if node.op == "get_attr" and isinstance(node.target, str):
            value = getattr(traced, node.target)
            if isinstance(value, Tensor) and not value.requires_grad:
                key = (value.dtype, tuple(value.shape), value.numpy(force=True).tobytes())
                node.target = first.setdefault(key, node.target)
    traced.delete_all_unused_submodules()


def _write_last(graph: fx.Graph, in_place: Sequence[tuple[int, int]]) -> None:
    """Moves the outputs that share the memory of an input to the end, and copies those that would come too early."""
    inputs = [node for node in graph.nodes if node.op == "placeholder"]
    (end,) = (node for node in graph.nodes if node.op == "output")
    outputs = list(end.args[0])
    for _, number in in_place:
        _move_to_end(outputs[number], end)
    for source, number in in_place:
        written = outputs[number]
        position = {node: at for at, node in enumerate(graph.nodes)}
        late = any(position[user] > position[written] for user in inputs[source].users)
        if late or outputs.count(written) > 1 or written.op == "placeholder":
            outputs[number] = _call(graph, end, aten.clone.default, written)
    end.args = (tuple(outputs),)


def _move_to_end(node: fx.Node, end: fx.Node) -> None:
    """Moves `node` in front of `end`, and what uses it behind it."""
    if node.op != "call_function":
        return
    users = [user for user in node.users if user is not end]
    end.prepend(node)
    for user in users:
        _move_to_end(user, end)
