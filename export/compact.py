"""A sparsified model rewired so that its layers hold only the filters of channels that stay.

Rows are the first axis of a weight (one filter each). A layer in rows form keeps its rows with *all* their columns,
because a score is a mean over the whole row; what reads channels selects the columns of those that are there.
"""

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.channels import Channels, Group, Part
from export.constants import constants, scale_and_shift, weight_and_bias
from export.depthwise import depthwise
from export.flow import BatchNorm, ChannelFlows, Convolution, Layer, pads
from trainer.masked import MaskedLinear
from trainer.norm import GatedBatchNorm, normalise


def select_columns(weight: Tensor, active: Tensor, columns: int) -> Tensor:
    """Returns `weight` (out, C * columns, ...) with only the columns that the channels in `active` (k,) feed."""
    if columns == 1:
        return weight.index_select(1, active)
    grouped = weight.reshape(weight.shape[0], -1, columns)
    return grouped.index_select(1, active).flatten(1)


class CompactModel:
    """A model whose forward takes rows: set `active`, call `run`, read `statistics`.

    model       a copy of the model, rewired
    dropped     the groups of channels whose layers hold only some rows, by name
    depthwise   width of each depthwise convolution of which only some channels stay, by layer
    rows        names of the tensors whose first axis runs over a dropped group's channels, but thresholds, by group
    active      index (k,) of the channels that stay, one for each dropped group; set before `run`
    statistics  new running mean and variance by tensor name; filled by a training pass
    """

    def __init__(
        self,
        model: nn.Module,
        shape: tuple[int, ...],
        dropped: Callable[[Group], bool],
        *,
        training: bool = False,
    ) -> None:
        self.flows = ChannelFlows(model, shape, training=training)
        self.model = self.flows.root
        self.dropped = {group.name: group for group in self.flows.by_layer.values() if dropped(group)}
        names = set(self.model.state_dict())
        self.depthwise = {layer: group.width for group in self.dropped.values() for layer in group.depthwise}
        self.rows = {
            name: [x for x in _first_axis(group) if x in names] for name, group in self.dropped.items()
        }
        self.active: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self._full: Mapping[str, Tensor] = {}
        if training:
            self._rewire_training()
        else:
            self._rewire_inference()

    def run(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Returns the logits for `x` (N, *shape), rows gathered from the whole `tensors` where a layer is dropped."""
        rows = dict(tensors)
        for name, group in self.dropped.items():
            for tensor in [*self.rows[name], *(f"{layer}.threshold" for layer in group.layers)]:
                rows[tensor] = tensors[tensor].index_select(0, self.active[name])
        self._full = tensors
        return self.run_rows(rows, x)

    def run_rows(self, rows: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Returns the logits for `x` (N, *shape), where `rows` already holds only the rows that stay."""
        self.statistics = {}
        logits: Tensor = torch.func.functional_call(self.flows.graph, dict(rows), (x,))
        return logits

    def _rewire_training(self) -> None:
        """Makes forwards train: columns selected, norm statistics returned, nothing mutated."""
        for name, module in self.model.named_modules():
            if isinstance(module, BatchNorm):
                replace_forward(module, partial(self._train_norm, name, module))
            elif isinstance(module, Layer) and self._selects(name):
                replace_forward(module, partial(self._train_reader, name, module))

    def _rewire_inference(self) -> None:
        """Makes forwards infer: gates and norms folded into weights, constants of what was left out into biases.

        All of it is work on weights alone, so a runtime that folds constants leaves only small weights behind.
        """
        self._folded = {
            layer: norm for group in self.flows.by_layer.values() for norm, layer in group.norms.items()
        }
        for name, module in self.model.named_modules():
            if name in self._folded.values():
                replace_forward(module, lambda x: x)
            elif isinstance(module, BatchNorm) and name in self.flows.sources:
                replace_forward(module, partial(self._infer_norm, name, module))
            elif isinstance(module, Layer):
                replace_forward(module, partial(self._infer, name, module))

    def _train_norm(self, name: str, norm: Any, x: Tensor) -> Tensor:
        active = norm.source.active() if isinstance(norm, GatedBatchNorm) else None
        y, mean, variance = normalise(norm, x, active)
        self.statistics.update(
            {f"{name}.running_mean": mean.detach(), f"{name}.running_var": variance.detach()}
        )
        return y

    def _train_reader(self, name: str, layer: Any, x: Tensor) -> Tensor:
        if isinstance(layer, MaskedLinear):
            return layer.mapped(x, self._columns(name, layer.weight))
        weight, bias = weight_and_bias(layer)
        return apply(layer, x, self._columns(name, weight), bias)

    def _infer(self, name: str, layer: Any, x: Tensor) -> Tensor:
        weight, bias = weight_and_bias(layer)
        if self._selects(name):
            weight, bias, x = self._without_dropped(name, layer, weight, bias, x)
        if name in self._folded:
            scale, shift = scale_and_shift(self.flows.modules[self._folded[name]])
            weight = weight * scale.view(-1, *[1] * (weight.dim() - 1))
            bias = shift if bias is None else bias * scale + shift
        if name in self.depthwise:
            return depthwise(layer, x, weight, bias, list(self.depthwise).index(name))
        return apply(layer, x, weight, bias)

    def _infer_norm(self, name: str, norm: Any, x: Tensor) -> Tensor:
        # in products and sums: a compiler would work statistics into whatever stands before a norm
        scale, shift = scale_and_shift(norm)
        if self._selects(name):
            parts = self._read(name).parts
            scale, shift = self._selected(scale, parts, 0), self._selected(shift, parts, 0)
        axes = (1, -1, *[1] * (x.dim() - 2))
        return x * scale.view(axes) + shift.view(axes)

    def _without_dropped(
        self, name: str, layer: Any, weight: Tensor, bias: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the reader's weight on the channels left, and its bias and input with the others' constants."""
        if name in self.depthwise:
            return weight, bias, x
        held = self._read(name)
        # the constants of channels left out need whole tensors, not rows
        with torch.nn.utils.stateless._reparametrize_module(self.model, dict(self._full)):
            constant = constants(self.flows, self.flows.sources[name], self._drops)
        kept = self._columns(name, weight)
        if constant is None:
            return kept, bias, x
        constant = self._of_dropped(constant, held)
        if getattr(layer, "groups", 1) > 1:
            # (groups, filters, columns, *kernel) on (groups, columns)
            share = _by_group(weight.flatten(2).sum(2), layer.groups)
            share = (share * constant.view(layer.groups, 1, -1)).sum(2).flatten()
            return kept, share if bias is None else bias + share, x
        share = (weight * constant.view(-1, *[1] * (weight.dim() - 2))).sum(1, keepdim=True)
        if pads(layer):
            # behind the padding a constant channel is not constant: one channel of ones stands for all of them
            axes = weight.dim() - 2
            return torch.cat([kept, share], 1), bias, F.pad(x, (0, 0) * axes + (0, 1), value=1.0)
        share = share.flatten(1).sum(1)
        return kept, share if bias is None else bias + share, x

    def _columns(self, name: str, weight: Tensor) -> Tensor:
        """Returns the columns of a layer's `weight` that the channels left feed."""
        held, layer = self._read(name), self.flows.modules[name]
        groups = layer.groups if isinstance(layer, Convolution) else 1
        if groups == 1:
            return self._selected(weight, held.parts, 1)
        (part,) = held.parts
        each = part.group.width // groups
        # equally many channels stay in each group of the convolution: their places inside their own
        index = self.active[part.group.name].view(groups, -1) - torch.arange(groups).unsqueeze(1) * each
        grouped = _by_group(weight, groups)
        index = index.view(groups, 1, -1, *[1] * (weight.dim() - 2))
        index = index.expand(-1, grouped.shape[1], -1, *weight.shape[2:])
        selected: Tensor = grouped.gather(2, index).flatten(0, 1)
        return selected

    def _selected(self, tensor: Tensor, parts: Sequence[Part], axis: int) -> Tensor:
        """Returns the places of channels that stay along an axis that `parts` lie on, 0 or 1."""
        pieces, start = [], 0
        for part in parts:
            piece = tensor if len(parts) == 1 else tensor.narrow(axis, start, part.size)
            start += part.size
            if part.group.name in self.dropped:
                active = self.active[part.group.name]
                if axis == 0:
                    piece = piece.view(-1, part.columns).index_select(0, active).flatten()
                else:
                    piece = select_columns(piece, active, part.columns)
            pieces.append(piece)
        return pieces[0] if len(pieces) == 1 else torch.cat(pieces, axis)

    def _of_dropped(self, constant: Tensor, held: Channels) -> Tensor:
        """Returns `constant` (places,) with 0 in the places of channels that stay."""
        pieces, start = [], 0
        for part in held.parts:
            piece = constant.narrow(0, start, part.size)
            start += part.size
            if part.group.name not in self.dropped:
                piece = torch.zeros_like(piece)
            else:
                active = self.active[part.group.name]
                piece = piece.view(-1, part.columns).index_fill(0, active, 0.0).flatten()
            pieces.append(piece)
        return torch.cat(pieces)

    def _selects(self, name: str) -> bool:
        return name in self.flows.sources and any(self._drops(group) for group in self._read(name).groups)

    def _read(self, name: str) -> Channels:
        return self.flows.channels[self.flows.sources[name]]

    def _drops(self, group: Group) -> bool:
        return group.name in self.dropped


def _by_group(weight: Tensor, groups: int) -> Tensor:
    return weight.view(groups, -1, *weight.shape[1:])


def _first_axis(group: Group) -> list[str]:
    names = [f"{layer}.{leaf}" for layer in (*group.layers, *group.others) for leaf in ("weight", "bias")]
    leaves = ("weight", "bias", "running_mean", "running_var")
    return names + [f"{norm}.{leaf}" for norm in group.norms for leaf in leaves]


def apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    """Returns what `layer` makes of `x` with another weight and bias."""
    if isinstance(layer, Convolution):
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    """Returns nothing; `module` computes `forward` from now on, its class and other models of it stay as they are."""
    module.forward = forward
