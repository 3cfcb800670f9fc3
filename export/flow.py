"""Which channels of a model's values stay or go together, and what one that is left out would be.

One walk through the traced model. Every layer starts a group of channels; whatever passes channels on one by one keeps
them in their group; sums join groups; whatever would notice that a channel is missing makes its whole group stay, and
says why.
"""

import copy
import dataclasses
import math
import operator
from collections.abc import Sequence
from typing import Any

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from export import operations as ops
from export.channels import Channels, Group, Part, both, either, moved, reshaped, without
from trainer.graph import calls, trace
from trainer.masked import Masked
from trainer.norm import GatedBatchNorm

Convolution = nn.Conv1d | nn.Conv2d
Layer = nn.Conv1d | nn.Conv2d | nn.Linear
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d

UNMASKED = "its filters are not masked"
DEPTHWISE = "a depthwise convolution's number of groups is fixed in the graph"
GROUPED = "a grouped convolution ties channels to groups"
AUDIBLE = "a pruned channel is not silent: its norm, bias or activation lets it speak"


class ChannelFlows:
    """The channels of a sparsified model's values, followed on an example of `shape`.

    root        a copy of the model, in training or evaluation mode
    graph       the same as a module that calls the copy's layers; where a reshape or an attention call named a number
                of channels, it now takes as many as there are
    modules     of the copy, by path; nodes their calls
    channels    by node of the graph, where they are followed
    sources     by path of a layer or norm that reads channels, the node it reads
    by_layer    group by masked layer
    positions   outputs per filter and example, by layer
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], *, training: bool = False) -> None:
        self.root = copy.deepcopy(model).train(training)
        self.graph = trace(self.root)
        # a training pass would move the norms' statistics
        self.root.eval()
        ShapeProp(self.graph).propagate(torch.zeros(2, *shape))
        self.root.train(training)
        self.modules = dict(self.root.named_modules())
        self.nodes = nodes = calls(self.graph.graph)
        self.positions = {
            name: _positions(shape_of(node), self.modules[name])
            for name, node in nodes.items()
            if isinstance(self.modules[name], Layer)
        }
        self.channels: dict[fx.Node, Channels] = {}
        self.sources: dict[str, fx.Node] = {}
        for node in list(self.graph.graph.nodes):
            self._visit(node)
        self.graph.graph.eliminate_dead_code()
        for node in self.channels:
            self._watch_sizes(node)
        self.by_layer = {
            layer: group
            for channels in self.channels.values()
            for group in channels.groups
            for layer in group.layers
        }
        order = list(nodes)
        for group in self.by_layer.values():
            group.layers.sort(key=order.index)
            if not group.readers and not group.refusals:
                group.refusals.setdefault("no layer reads it")
        self.graph.recompile()

    def kind(self, node: fx.Node) -> object:
        """Returns the called module, function or method name of `node`."""
        return self.modules[str(node.target)] if node.op == "call_module" else node.target

    def _visit(self, node: fx.Node) -> None:
        kind = self.kind(node) if node.op.startswith("call") else None
        followed = [source for source in node.all_input_nodes if source in self.channels]
        if node.op == "output":
            self._stay(followed, "its output is the model's output")
        elif isinstance(kind, Layer):
            self._layer(node, kind)
        elif not followed or _reads_shape(node):
            return
        elif isinstance(kind, BatchNorm):
            self._norm(node, kind)
        elif ops.is_one_of(kind, ops.ARITHMETIC) and len(_tensors(node)) == 2:
            self._join(node, kind)
        elif ops.is_one_of(kind, ops.ATTENTION):
            self._attend(node)
        elif ops.is_one_of(kind, ops.MATMULS):
            self._multiply(node)
        elif ops.is_one_of(kind, ops.CATS):
            self._line_up(node)
        elif ops.is_one_of(kind, ops.NORMALISING):
            self._stay(followed, f"{_called(node)} normalises over channels")
        elif ops.moves_constants(kind, node) and not self.channels[followed[0]].zero:
            self._stay(
                followed, f"{_called(node)}, an average pool with padding or a divisor, changes constants"
            )
        elif (passed := self._passed(node, kind)) is not None:
            self._hold(node, passed)
        else:
            self._stay(followed, f"{_called(node)} mixes or moves channels")

    def _passed(self, node: fx.Node, kind: object) -> Channels | None:
        """Returns the channels of an operation on one value that leaves them apart; None if it does not."""
        source = node.all_input_nodes[0]
        if source not in self.channels:
            return None
        if node.args and node.args[0] is not source:
            # a number comes first
            held = self.channels[source]
            zero = held.zero and kind is operator.mul
            return dataclasses.replace(held, zero=zero) if ops.is_one_of(kind, ops.ARITHMETIC) else None
        held, rank = self.channels[source], len(shape_of(source))
        if ops.is_one_of(kind, (*ops.RESHAPES, *ops.FLATTENS, *ops.UNFLATTENS, *ops.AXES)):
            return self._reshaped(node, kind, held)
        if len(node.all_input_nodes) > 1:
            return None
        if ops.is_one_of(kind, ops.ZERO_AT_ZERO):
            cut = held.cut or (held.zero and ops.is_one_of(kind, ops.RELU))
            return dataclasses.replace(held, cut=cut)
        if ops.is_one_of(kind, ops.PRODUCTS):
            return held
        if ops.is_one_of(kind, (*ops.ELSEWHERE, *ops.SUMS)):
            return dataclasses.replace(held, zero=False)
        if ops.is_one_of(kind, ops.POOLS):
            return held if held.axis == 1 and held.inner is None and len(shape_of(node)) == rank else None
        if ops.is_one_of(kind, ops.MEANS):
            gone = ops.axes_of(node, kind, rank)
            if gone is None or held.axis in gone or held.inner in gone:
                return None
            return held if ops.keeps_axes(node) else without(held, gone)
        if ops.is_one_of(kind, (*ops.TRANSPOSES, *ops.PERMUTES)):
            order = ops.permutation(node, kind, rank)
            return None if order is None else moved(held, [order.index(axis) for axis in range(rank)])
        if kind is operator.getitem:
            places = ops.picked(node, rank)
            return None if places is None else moved(held, places)
        return None

    def _layer(self, node: fx.Node, layer: Layer) -> None:
        name, source = str(node.target), node.args[0]
        assert isinstance(source, fx.Node)
        convolution = isinstance(layer, Convolution)
        groups = layer.groups if isinstance(layer, Convolution) else 1
        read = self.channels.get(source)
        if read is not None and (refusal := self._unreadable(layer, source)):
            self._stay([source], f"{name}: {refusal}")
            read = None
        if read is not None:
            self.sources[name] = source
            self._read(read, name)
        axis = 1 if convolution else len(shape_of(node)) - 1
        masked = isinstance(layer, Masked)
        zero, cut = layer.bias is None, False
        if isinstance(layer, Masked):
            zero, cut = zero or layer.gate, layer.gate
        new = Group(len(layer.weight), layers=[name] if masked else [], others=[] if masked else [name])
        new.live = frozenset([frozenset([name])])
        if not masked:
            new.refusals.setdefault(f"{name}: {UNMASKED}")
        self._hold(node, Channels(axis, (Part(new),), zero, cut))
        if groups == 1:
            return
        new.audible.setdefault(GROUPED)
        if read is None:
            # its filters still belong to groups of channels that it reads whole
            self._in_blocks(new, groups)
        elif groups == layer.in_channels == layer.out_channels:
            self._follow_depthwise(node, layer, read, new)
        else:
            for group in (read.single, new):
                assert group is not None
                group.audible.setdefault(GROUPED)
                self._in_blocks(group, groups)

    def _follow_depthwise(self, node: fx.Node, layer: Layer, read: Channels, new: Group) -> None:
        """Joins the channels a depthwise convolution makes with those it reads: one of each feeds one of the other."""
        before = read.single
        assert before is not None
        name, silent = str(node.target), read.zero or not pads(layer)
        if not isinstance(layer, Masked):
            new.refusals.clear()
            if not silent:
                new.refusals.setdefault(f"{name}: {UNMASKED}, and it pads what is not zero")
        if not silent:
            live = either(before.live, new.live)
        elif isinstance(layer, Masked) and self._only_read_by(before, node):
            live = both(before.live, new.live)
        else:
            live = before.live
        # where the layer's own filter is active, its bias is what a channel left out is
        zero = read.zero and layer.bias is None
        self._merge(before, new)
        before.live = live
        before.depthwise.append(name)
        before.audible.setdefault(DEPTHWISE)
        self.channels[node] = dataclasses.replace(self.channels[node], zero=zero, cut=False)

    def _unreadable(self, layer: Layer, source: fx.Node) -> str | None:
        read, shape = self.channels[source], shape_of(source)
        axis = 1 if isinstance(layer, Convolution) else len(shape) - 1
        if read.axis != axis or read.inner is not None:
            return f"it reads a value of shape {shape} whose channels are on axis {read.axis}"
        if not isinstance(layer, Convolution) or layer.groups == 1:
            return None
        if read.single is None:
            return "a grouped convolution reads channels of more than one kind"
        depthwise = layer.groups == layer.in_channels
        if depthwise and layer.out_channels != layer.in_channels:
            return f"a depthwise convolution makes {layer.out_channels // layer.in_channels} channels of each"
        if not depthwise and pads(layer) and not read.zero:
            return "a grouped convolution pads what is not zero"
        return None

    def _norm(self, node: fx.Node, norm: BatchNorm) -> None:
        source, name = node.all_input_nodes[0], str(node.target)
        held = self.channels[source]
        if held.axis != 1 or held.inner is not None:
            self._stay([source], f"{name} normalises axis 1, channels are on axis {held.axis}")
            return
        group, layer = held.single, str(source.target)
        behind = (
            source.op == "call_module" and isinstance(self.kind(source), Layer) and len(source.users) == 1
        )
        if group is not None and behind:
            group.norms[name] = layer
        else:
            self.sources[name] = source
        gates = isinstance(norm, GatedBatchNorm)
        # behind a depthwise convolution a channel may go because of what it reads, and the gate be open
        silent = gates and not (group is not None and layer in group.depthwise)
        self._hold(node, dataclasses.replace(held, zero=silent, cut=silent or held.cut))

    def _join(self, node: fx.Node, kind: object) -> None:
        """Joins the groups of two values that are added up or multiplied."""
        one, other = _tensors(node)
        a, b = self.channels.get(one), self.channels.get(other)
        product = ops.is_one_of(kind, ops.PRODUCTS)
        if a is None or b is None:
            held, alien = (a, other) if a is not None else (b, one)
            assert held is not None
            if product and held.zero and (held is a or kind not in (operator.truediv, torch.div, "div")):
                shape, whole = shape_of(alien), shape_of(node)
                axes = [axis - len(whole) for axis in (held.axis, held.inner) if axis is not None]
                if len(shape_of(one if held is a else other)) == len(whole) and all(
                    -axis > len(shape) or shape[axis] == 1 for axis in axes
                ):
                    self._hold(node, held)
                    return
            self._stay([one, other], f"{_called(node)}: what it is joined with is not pruned")
            return
        same = a.axis == b.axis and a.inner == b.inner and a.sizes == b.sizes
        if not same or len(shape_of(one)) != len(shape_of(other)):
            self._stay([one, other], f"{_called(node)} joins channels that do not match")
            return
        for x, y in zip(a.groups, b.groups, strict=True):
            if x is not y:
                # what is multiplied by 0 is not needed, unless something else reads it
                x_goes = product and b.zero and self._only_read_by(x, node)
                y_goes = product and a.zero and self._only_read_by(y, node)
                live = both(x.live, y.live) if x_goes and y_goes else either(x.live, y.live)
                if x_goes != y_goes:
                    live = y.live if x_goes else x.live
                self._merge(x, y)
                x.live = live
        zero = (a.zero or b.zero) if product else (a.zero and b.zero)
        self._hold(node, dataclasses.replace(self.channels[one], zero=zero, cut=a.cut and b.cut))

    def _attend(self, node: fx.Node) -> None:
        """Follows softmax(q k^T) v: a channel of q and k goes if either is 0, those of v come out again."""
        names = ("query", "key", "value")
        given: dict[str, Any] = {**dict(zip(names, node.args, strict=False)), **node.kwargs}
        query, key, value = (given[name] for name in names)
        rank = len(shape_of(query))
        self._contract(node, query, key, rank - 1, rank - 1)
        if (mask := given.get("attn_mask")) in self.channels:
            self._stay([mask], f"{_called(node)} takes it as its mask")
        if query in self.channels and given.get("scale") is None:
            # of as many channels as there were: fewer of them must not make another scale
            size = shape_of(query)[-1]
            node.kwargs = {**node.kwargs, "scale": 1 / math.sqrt(size)}
        if value in self.channels:
            held = self.channels[value]
            if (held.axis if held.inner is None else held.inner) != rank - 1:
                self._stay([value], f"{_called(node)} mixes or moves channels")
                return
            self._hold(node, held)

    def _multiply(self, node: fx.Node) -> None:
        """Follows a matrix product of two values."""
        one, other = _tensors(node) if len(_tensors(node)) == 2 else (None, None)
        if one is None or other is None:
            self._stay(node.all_input_nodes, f"{_called(node)} mixes or moves channels")
            return
        rank = len(shape_of(node))
        if one in self.channels:
            self._contract(node, one, other, len(shape_of(one)) - 1, len(shape_of(other)) - 2)
        elif other in self.channels:
            held = self.channels[other]
            last = held.axis if held.inner is None else held.inner
            # a sum over other axes: 0 stays 0, another constant does not
            if last == rank - 1 and held.zero and len(shape_of(other)) == rank:
                self._hold(node, held)
            else:
                self._stay([other], f"{_called(node)} mixes or moves channels")

    def _contract(self, node: fx.Node, one: fx.Node, other: fx.Node, axis: int, other_axis: int) -> None:
        """Joins the channels of two values that are multiplied and summed up over these axes."""
        a, b = self.channels.get(one), self.channels.get(other)
        reason = f"{_called(node)} mixes or moves channels"
        if a is None or b is None:
            self._stay([one, other], reason)
            return
        x, y = a.single, b.single
        over = (a.axis if a.inner is None else a.inner) == axis and (
            b.axis if b.inner is None else b.inner
        ) == other_axis
        if not over or x is None or y is None or x.width != y.width or (a.inner is None) != (b.inner is None):
            self._stay([one, other], reason)
            return
        if not (a.zero and b.zero):
            self._stay([one, other], f"{_called(node)} multiplies channels that are not zero")
            return
        if x is not y:
            alone = self._only_read_by(x, node) and self._only_read_by(y, node)
            live = both(x.live, y.live) if alone else either(x.live, y.live)
            self._merge(x, y)
            x.live = live
        self._read(dataclasses.replace(self.channels[one], cut=a.cut and b.cut), node.name)

    def _line_up(self, node: fx.Node) -> None:
        """Follows a concatenation: the channels of each value are a stretch of the result's."""
        values = node.args[0]
        axis = node.kwargs.get("dim", node.args[1] if len(node.args) > 1 else 0)
        followed = [value for value in node.all_input_nodes if value in self.channels]
        first = self.channels[followed[0]]
        if not isinstance(values, Sequence) or not isinstance(axis, int) or first.inner is not None:
            self._stay(followed, f"{_called(node)} mixes or moves channels")
            return
        axis %= len(shape_of(node))
        if axis != first.axis:
            self._stay(followed, f"{_called(node)} puts positions together")
            return
        parts: list[Part] = []
        zero = cut = True
        for value in values:
            assert isinstance(value, fx.Node)
            held = self.channels.get(value)
            if held is None or held.axis != axis or held.inner is not None:
                self._stay([value], f"{_called(node)} mixes or moves channels")
                whole = Group(shape_of(value)[axis], refusals={"no masked layer makes it": None})
                held = Channels(axis, (Part(whole),), zero=False, cut=False)
            parts.extend(held.parts)
            zero, cut = zero and held.zero, cut and held.cut
        self._hold(node, Channels(axis, tuple(parts), zero, cut))

    def _reshaped(self, node: fx.Node, kind: object, held: Channels) -> Channels | None:
        """Returns the channels behind a reshape that keeps the order of values, its sizes freed of their number."""
        source = node.all_input_nodes[0]
        found = reshaped(held, shape_of(source), shape_of(node))
        if found is None:
            return None
        if found.inner is not None and held.inner is None:
            group = held.single
            if group is None or not self._in_blocks(group, shape_of(node)[found.axis]):
                return None
        place = found.axis if found.inner is None else found.inner
        if ops.is_one_of(kind, ops.RESHAPES):
            sizes = node.args[1] if isinstance(node.args[1], Sequence) else node.args[1:]
            sizes, start = list(sizes), node.args[0]
            free = [at for at, size in enumerate(sizes) if size == -1 and at != place]
            if free and (free != [0] or shape_of(source)[0] != shape_of(node)[0]):
                return None
            if free:
                with node.graph.inserting_before(node):
                    sizes[0] = node.graph.call_method("size", (start, 0))
            sizes[place] = -1
            node.args, node.kwargs = (start, tuple(sizes)), {}
            if node.op == "call_method":
                node.args = (start, *sizes)
        elif ops.is_one_of(kind, ops.UNFLATTENS) and found.inner is not None:
            sizes = kind.unflattened_size if isinstance(kind, nn.Unflatten) else node.args[2]  # type: ignore[assignment]
            if not isinstance(sizes, Sequence) or sizes[-1] != -1:
                return None
        return found

    def _watch_sizes(self, node: fx.Node) -> None:
        """Makes channels stay whose number is used for anything."""
        held, rank = self.channels[node], len(shape_of(node))
        for user in node.users:
            if (
                not _reads_shape(user)
                or (user.target is getattr and user.args[1] == "ndim")
                or user.target == "dim"
            ):
                continue
            named = user.args[1:] if user.target == "size" else ()
            for reader in [user] if named else list(user.users):
                index = named[0] if named else reader.args[1] if reader.target is operator.getitem else None
                if not isinstance(index, int) or index % rank in (held.axis, held.inner):
                    other = next(iter(reader.users), reader)
                    self._stay([node], f"{_called(other)} depends on the number of channels")

    def _hold(self, node: fx.Node, channels: Channels) -> None:
        self.channels[node] = channels
        for group in channels.groups:
            group.values.append(node)

    def _read(self, channels: Channels, reader: str) -> None:
        for group in channels.groups:
            group.readers.append(reader)
            if not (channels.zero and channels.cut):
                group.audible.setdefault(AUDIBLE)

    def _stay(self, nodes: Sequence[fx.Node], reason: str) -> None:
        """Makes all channels of these values stay."""
        for node in nodes:
            if node in self.channels:
                for group in self.channels[node].groups:
                    group.refusals.setdefault(reason)

    def _in_blocks(self, group: Group, blocks: int) -> bool:
        if group.blocks not in (1, blocks):
            group.refusals.setdefault(
                f"its channels are in {group.blocks} blocks for one reader, {blocks} for another"
            )
            return False
        group.blocks = blocks
        return True

    def _only_read_by(self, group: Group, node: fx.Node) -> bool:
        """Returns whether nothing but `node`, and what passes on to it, takes the group's values."""
        inside = {*group.values, node}
        return all(user in inside or _reads_shape(user) for value in group.values for user in value.users)

    def _merge(self, group: Group, gone: Group) -> None:
        """Makes one group of two: `gone`'s layers and values become `group`'s."""
        for node in gone.values:
            held = self.channels[node]
            parts = tuple(
                dataclasses.replace(part, group=group) if part.group is gone else part for part in held.parts
            )
            self.channels[node] = dataclasses.replace(held, parts=parts)
        group.layers += gone.layers
        group.others += gone.others
        group.norms |= gone.norms
        group.readers += gone.readers
        group.refusals |= gone.refusals
        group.audible |= gone.audible
        group.values += gone.values
        group.depthwise += gone.depthwise
        if gone.blocks > 1:
            self._in_blocks(group, gone.blocks)


def pads(layer: Layer) -> bool:
    """Returns whether a layer pads with zeros, so that a constant channel is not constant to it."""
    if not isinstance(layer, Convolution) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return layer.padding == "same" or any(layer.padding)


def shape_of(node: fx.Node) -> tuple[int, ...]:
    """Returns the shape of a node's value, with a batch of 2."""
    return tuple(node.meta["tensor_meta"].shape)


def _positions(shape: tuple[int, ...], layer: nn.Module) -> int:
    """Returns how many outputs each filter of `layer` has per example, given its output's `shape`."""
    return torch.Size(shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]).numel()


def _tensors(node: fx.Node) -> list[fx.Node]:
    """Returns which of a node's first two arguments are tensors."""
    return [value for value in node.args[:2] if isinstance(value, fx.Node) and "tensor_meta" in value.meta]


def _called(node: fx.Node) -> str:
    """Returns how to name an operation: a module by its path, a function by its node."""
    return str(node.target) if node.op == "call_module" else node.name


def _reads_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.op == "call_method" and node.target in ("size", "dim")
