"""Which channels of a model's values stay or go together, and what one that is left out would be.

One walk through the traced model. Every layer starts a group of channels; whatever passes channels on one by one keeps
them in their group; sums join groups; whatever would notice that a channel is missing makes its whole group stay, and
says why.
"""

import copy
import dataclasses
import operator
from collections.abc import Sequence

import torch
from torch import fx, nn
from torch.fx.passes.shape_prop import ShapeProp, TensorMetadata

from export import operations as ops
from export.channels import Channels, Group, Part, both, either, moved, reshaped, without
from export.errors import LoweringError
from export.groups import Groups, called, reads_shape, shape_of, tensors
from export.joins import attend, join, line_up, multiply
from trainer.graph import calls, trace
from trainer.masked import Masked
from trainer.norm import GatedBatchNorm

Convolution = nn.Conv1d | nn.Conv2d
Layer = nn.Conv1d | nn.Conv2d | nn.Linear
BatchNorm = nn.BatchNorm1d | nn.BatchNorm2d

UNMASKED = "its filters are not masked"
DEPTHWISE = "a depthwise convolution's number of groups is fixed in the graph"
GROUPED = "a grouped convolution ties channels to groups"


class ChannelFlows:
    """The channels of a sparsified model's values, followed on an example of `shape`.

    root        a copy of the model, in training or evaluation mode
    graph       the same as a module that calls the copy's layers; where a reshape or an attention call named a number
                of channels, it now takes as many as there are
    modules     of the copy, by path; nodes their calls
    groups      what is done to them on the way
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
        try:
            ShapeProp(self.graph).propagate(torch.zeros(2, *shape))
        except (RuntimeError, ValueError, IndexError) as error:
            raise LoweringError(
                f"the model cannot be run on two examples of shape {shape}: {str(error).splitlines()[0][:200]}"
            ) from error
        self.root.train(training)
        self.modules = dict(self.root.named_modules())
        self.nodes = nodes = calls(self.graph.graph)
        self.positions = {
            name: _positions(shape_of(node), self.modules[name])
            for name, node in nodes.items()
            if isinstance(self.modules[name], Layer)
        }
        self.groups = Groups()
        self.channels = self.groups.channels
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
            self.groups.stay(followed, "its output is the model's output")
        elif isinstance(kind, Layer):
            self._layer(node, kind)
        elif not followed or reads_shape(node):
            return
        elif not isinstance(node.meta.get("tensor_meta"), TensorMetadata):
            self.groups.stay(followed, f"{called(node)} makes more than one value of them")
        elif isinstance(kind, BatchNorm):
            self._norm(node, kind)
        elif ops.is_one_of(kind, ops.ARITHMETIC) and len(tensors(node)) == 2:
            join(self.groups, node, kind)
        elif ops.is_one_of(kind, ops.ATTENTION):
            attend(self.groups, node)
        elif ops.is_one_of(kind, ops.MATMULS):
            multiply(self.groups, node)
        elif ops.is_one_of(kind, ops.CATS):
            line_up(self.groups, node)
        elif ops.is_one_of(kind, ops.NORMALISING):
            self.groups.stay(followed, f"{called(node)} normalises over channels")
        elif ops.moves_constants(kind, node) and not self.channels[followed[0]].zero:
            self.groups.stay(
                followed, f"{called(node)}, an average pool with padding or a divisor, changes constants"
            )
        elif (passed := self._passed(node, kind)) is not None:
            self.groups.hold(node, passed)
        else:
            self.groups.stay(followed, f"{called(node)} mixes or moves channels")

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
            gone = ops.axes_of(node, rank)
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
            self.groups.stay([source], f"{name}: {refusal}")
            read = None
        if read is not None:
            self.sources[name] = source
            self.groups.read(read, name)
        axis = 1 if convolution else len(shape_of(node)) - 1
        masked = isinstance(layer, Masked)
        zero, cut = layer.bias is None, False
        if isinstance(layer, Masked):
            zero, cut = zero or layer.gate, layer.gate
        new = Group(len(layer.weight), layers=[name] if masked else [], others=[] if masked else [name])
        new.live = frozenset([frozenset([name])])
        if not masked:
            new.refusals.setdefault(f"{name}: {UNMASKED}")
        self.groups.hold(node, Channels(axis, (Part(new),), zero, cut))
        if groups == 1:
            return
        new.audible.setdefault(GROUPED)
        if read is None:
            # its filters still belong to groups of channels that it reads whole
            self.groups.in_blocks(new, groups)
        elif groups == layer.in_channels == layer.out_channels:
            self._follow_depthwise(node, layer, read, new)
        else:
            for group in (read.single, new):
                assert group is not None
                group.audible.setdefault(GROUPED)
                self.groups.in_blocks(group, groups)

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
        elif isinstance(layer, Masked) and self.groups.only_read_by(before, node):
            live = both(before.live, new.live)
        else:
            live = before.live
        # where the layer's own filter is active, its bias is what a channel left out is
        zero = read.zero and layer.bias is None
        self.groups.merge(before, new)
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
            self.groups.stay([source], f"{name} normalises axis 1, channels are on axis {held.axis}")
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
        self.groups.hold(node, dataclasses.replace(held, zero=silent, cut=silent or held.cut))

    def _reshaped(self, node: fx.Node, kind: object, held: Channels) -> Channels | None:
        """Returns the channels behind a reshape that keeps the order of values, its sizes freed of their number."""
        source = node.all_input_nodes[0]
        found = reshaped(held, shape_of(source), shape_of(node))
        if found is None:
            return None
        if found.inner is not None and held.inner is None:
            group = held.single
            if group is None or not self.groups.in_blocks(group, shape_of(node)[found.axis]):
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
                not reads_shape(user)
                or (user.target is getattr and user.args[1] == "ndim")
                or user.target == "dim"
            ):
                continue
            named = user.args[1:] if user.target == "size" else ()
            for reader in [user] if named else list(user.users):
                index = named[0] if named else reader.args[1] if reader.target is operator.getitem else None
                if not isinstance(index, int) or index % rank in (held.axis, held.inner):
                    other = next(iter(reader.users), reader)
                    self.groups.stay([node], f"{called(other)} depends on the number of channels")


def pads(layer: Layer) -> bool:
    """Returns whether a layer pads with zeros, so that a constant channel is not constant to it."""
    if not isinstance(layer, Convolution) or layer.padding_mode != "zeros" or layer.padding == "valid":
        return False
    return layer.padding == "same" or any(layer.padding)


def _positions(shape: tuple[int, ...], layer: nn.Module) -> int:
    """Returns how many outputs each filter of `layer` has per example, given its output's `shape`."""
    return torch.Size(shape[1:-1] if isinstance(layer, nn.Linear) else shape[2:]).numel()
