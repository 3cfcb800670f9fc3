"""Where the channels of each masked layer go: who reads them, and what a pruned channel is by then.

A pruned filter can be left out of training or inference only if everything that reads its channel can do without.
This follows each masked layer's output through the traced model to the layers that read it, and says why not where
it cannot be left out.
"""

import copy
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor, fx, nn
from torch.fx.passes.shape_prop import ShapeProp

from trainer.graph import calls, trace
from trainer.masked import Masked
from trainer.norm import GatedBatchNorm
from trainer.sparsify import masked_layers

_RELU = (nn.ReLU, F.relu, torch.relu, "relu")
_ZERO_AT_ZERO = (
    *_RELU,
    *(nn.ReLU6, nn.GELU, nn.SiLU, nn.Tanh, nn.ELU, nn.LeakyReLU, nn.Hardswish, nn.Identity),
    *(F.relu6, F.gelu, F.silu, F.elu, F.leaky_relu, F.hardswish, F.tanh, torch.tanh, "tanh"),
)
_ELSEWHERE = (
    nn.Sigmoid,
    nn.Hardsigmoid,
    nn.Softplus,
    F.sigmoid,
    torch.sigmoid,
    F.hardsigmoid,
    F.softplus,
    "sigmoid",
)
_MAX_POOLS = (nn.MaxPool2d, nn.AdaptiveMaxPool2d, F.max_pool2d, F.adaptive_max_pool2d)
_AVERAGE_POOLS = (nn.AvgPool2d, nn.AdaptiveAvgPool2d, F.avg_pool2d, F.adaptive_avg_pool2d)
_BY_AXIS = (torch.flatten, "flatten")
_FLATTENS = (nn.Flatten, *_BY_AXIS, "view", "reshape", torch.reshape)
_CHANNELWISE = (*_ZERO_AT_ZERO, *_ELSEWHERE, *_MAX_POOLS, *_AVERAGE_POOLS)
_AVERAGE_OPTIONS = (
    "input",
    "kernel_size",
    "stride",
    "padding",
    "ceil_mode",
    "count_include_pad",
    "divisor_override",
)


@dataclass(frozen=True)
class Reader:
    """A layer that reads another's channels.

    name     its module path
    columns  how many columns of its weight one channel feeds: the positions a flatten lined up, else 1
    padded   whether it pads with zeros, so that a constant channel is not constant to it
    path     the calls a channel passes on its way here, in order, the source's norm not among them
    """

    name: str
    columns: int
    padded: bool
    path: tuple[fx.Node, ...]


@dataclass(frozen=True)
class Flow:
    """The channels of one masked layer on their way to their readers.

    norm      module path of the batch norm right behind the layer
    refusal   why pruned channels cannot be left out; None if they can
    exact     a pruned channel is 0 at every reader and gets no task gradient: it can be left out of training too
    """

    layer: str
    norm: str | None
    readers: tuple[Reader, ...]
    refusal: str | None
    exact: bool

    @property
    def drops(self) -> bool:
        """Returns whether compaction leaves pruned channels out."""
        return self.refusal is None


class ChannelFlows:
    """The flows of all masked layers of a sparsified model, followed on an example of `shape`.

    by_layer    flow by masked layer
    positions   outputs per filter and example, by layer with weights
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...]) -> None:
        # in eval mode: a training pass would move the norms' statistics
        graph = trace(copy.deepcopy(model).eval())
        ShapeProp(graph).propagate(torch.zeros(2, *shape))
        self.modules = dict(model.named_modules())
        nodes = calls(graph.graph)
        self.positions = {
            name: _positions(_shape(node), self.modules[name])
            for name, node in nodes.items()
            if isinstance(self.modules[name], nn.Conv1d | nn.Conv2d | nn.Linear)
        }
        self.by_layer = {
            name: self._follow(name, nodes[name]) for name in masked_layers(model) if name in nodes
        }

    @cached_property
    def sources(self) -> dict[str, tuple[Flow, Reader]]:
        """Returns, by reader, the droppable flow whose channels it reads, and how."""
        return {
            reader.name: (flow, reader)
            for flow in self.by_layer.values()
            if flow.drops
            for reader in flow.readers
        }

    def _follow(self, layer: str, start: fx.Node) -> Flow:
        module: Masked = self.modules[layer]
        norm, readers, refusals = None, [], []
        if isinstance(module, nn.Conv1d | nn.Conv2d) and module.groups != 1:
            refusals.append("a grouped convolution ties its filters to groups of input channels")
        if isinstance(module, nn.Linear) and len(_shape(start)) != 2:
            refusals.append(f"its output of shape {_shape(start)} has its filters on the last axis")
        frontier: list[tuple[fx.Node, int, tuple[fx.Node, ...]]] = [(start, 1, ())]
        for node, columns, path in frontier:
            for user in node.users:
                kind = self._kind(user)
                if user.op == "output":
                    refusals.append("its output is the model's output")
                elif isinstance(kind, nn.Conv2d | nn.Linear):
                    refusal = self._unreadable(kind, node)
                    refusals.extend([f"{user.target}: {refusal}"] if refusal else [])
                    padded = isinstance(kind, nn.Conv2d) and kind.padding not in ((0, 0), "valid")
                    readers.append(Reader(str(user.target), columns, padded, path))
                elif (
                    isinstance(kind, nn.BatchNorm1d | nn.BatchNorm2d)
                    and node is start
                    and len(node.users) == 1
                ):
                    norm = str(user.target)
                    frontier.append((user, columns, path))
                elif _is(kind, _FLATTENS) and (positions := _flattened(node, user)):
                    if _fixes_features(user):
                        refusals.append(f"{user.name} fixes the number of values: write flatten(1) instead")
                    frontier.append((user, columns * positions, (*path, user)))
                elif _is(kind, _CHANNELWISE):
                    frontier.append((user, columns, (*path, user)))
                elif not _reads_shape(user):
                    refusals.append(f"{user.name} mixes or moves channels")
                elif (other := _beside_reshapes(user)) is not None:
                    refusals.append(f"{other.name} depends on the value's shape")
        gated = module.gate if norm is None else self._gates(norm)
        # relu'(0) = 0 cuts the gradient of a channel that is 0 of itself
        silent = (
            module.bias is None and norm is None and all(self._passes(reader, _RELU) for reader in readers)
        )
        zero = (gated or silent) and not any(self._passes(reader, _ELSEWHERE) for reader in readers)
        if not zero and any(self._moves_constants(node) for reader in readers for node in reader.path):
            refusals.append(
                "behind an average pool with padding or a divisor a constant is another one, or none"
            )
        refusal = "; ".join(dict.fromkeys(refusals)) or (None if readers else "no layer reads it")
        return Flow(layer, norm, tuple(readers), refusal, exact=zero and refusal is None)

    def _passes(self, reader: Reader, kinds: tuple[object, ...]) -> bool:
        return any(_is(self._kind(node), kinds) for node in reader.path)

    def _gates(self, norm: str | None) -> bool:
        return norm is not None and isinstance(self.modules[norm], GatedBatchNorm)

    def _kind(self, node: fx.Node) -> object:
        """Returns the called module, function or method name of `node`."""
        return self.modules[str(node.target)] if node.op == "call_module" else node.target

    def _moves_constants(self, node: fx.Node) -> bool:
        kind = self._kind(node)
        if kind is F.avg_pool2d:
            options = {**dict(zip(_AVERAGE_OPTIONS, node.args, strict=False)), **node.kwargs}
        elif isinstance(kind, nn.AvgPool2d):
            options = vars(kind)
        else:
            return False
        return options.get("padding", 0) not in (0, (0, 0)) or options.get("divisor_override") is not None

    def _unreadable(self, reader: nn.Conv2d | nn.Linear, value: fx.Node) -> str | None:
        if isinstance(reader, nn.Conv2d):
            if reader.groups != 1:
                return "a grouped convolution ties input channels to output channels"
            return None if reader.padding_mode == "zeros" else f"padding mode {reader.padding_mode!r}"
        return None if len(_shape(value)) == 2 else f"a linear layer reads a value of shape {_shape(value)}"


def constants(flows: ChannelFlows, flow: Flow, reader: Reader) -> Tensor | None:
    """Returns what each channel (out,) of `flow`'s layer is at `reader` if its filter is pruned; None: all are 0.

    Computed from the tensors the modules hold when called, so that it can be traced.
    """
    if flow.exact:
        return None
    layer: Masked = flows.modules[flow.layer]
    norm = flows.modules[flow.norm] if flow.norm else None
    value = torch.zeros_like(layer.threshold) if layer.gate or layer.bias is None else layer.bias
    if isinstance(norm, GatedBatchNorm):
        value = torch.zeros_like(value)
    elif isinstance(norm, nn.BatchNorm1d | nn.BatchNorm2d):
        statistics = (norm.running_mean, norm.running_var, norm.weight, norm.bias)
        value = F.batch_norm(value.unsqueeze(0), *statistics, training=False, eps=norm.eps).squeeze(0)
    for node in reader.path:
        kind = flows._kind(node)
        if not _is(kind, (*_ZERO_AT_ZERO, *_ELSEWHERE)):
            continue  # pools and flattens leave a constant as it is
        if isinstance(kind, str):
            value = getattr(value, kind)()
        elif callable(kind):
            options = {key: option for key, option in node.kwargs.items() if key != "inplace"}
            value = kind(value, *node.args[1:], **options)
    return value


def _is(kind: object, known: tuple[object, ...]) -> bool:
    if isinstance(kind, nn.Module):
        return type(kind) in known
    return any(kind is entry or (isinstance(entry, str) and kind == entry) for entry in known)


def _shape(node: fx.Node) -> tuple[int, ...]:
    return tuple(node.meta["tensor_meta"].shape)


def _positions(shape: tuple[int, ...], layer: nn.Module) -> int:
    """Returns how many outputs each filter of `layer` has per example, given its output's `shape`."""
    return torch.Size(shape[2:] if isinstance(layer, nn.Conv1d | nn.Conv2d) else shape[1:-1]).numel()


def _flattened(before: fx.Node, after: fx.Node) -> int:
    """Returns how many values of each channel a flatten lines up, 0 if it does anything else."""
    old, new = _shape(before), _shape(after)
    positions = int(torch.Size(old[2:]).numel())
    return positions if len(new) == 2 and new == (old[0], old[1] * positions) else 0


def _fixes_features(flatten: fx.Node) -> bool:
    """Returns whether a flatten names the number of values it leaves, as view(-1, 320) does."""
    if _is(flatten.target, _BY_AXIS) or flatten.op == "call_module":
        return False
    sizes = flatten.args[1:]
    if len(sizes) == 1 and isinstance(sizes[0], Sequence):
        sizes = tuple(sizes[0])
    return not sizes or (isinstance(sizes[-1], int) and sizes[-1] != -1)


def _reads_shape(node: fx.Node) -> bool:
    if node.target is getattr:
        return node.args[1] in ("shape", "ndim")
    return node.target in ("size", "dim")


def _beside_reshapes(shape: fx.Node) -> fx.Node | None:
    """Returns the first tensor that is computed with what was read of a `shape`, reshaping aside; None without one."""
    for user in shape.users:
        if "tensor_meta" not in user.meta:
            if (found := _beside_reshapes(user)) is not None:
                return found
        elif not _is(user.target, _FLATTENS):
            return user
    return None
