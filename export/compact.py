"""A sparsified model rewired so that its masked layers hold only their active rows.

Rows are the first axis of a weight (one filter each). A layer in rows form keeps its active rows with *all* their
columns, because a score is a mean over the whole row; the layers that read it select the columns of the channels
that are there.
"""

import copy
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.flow import ChannelFlows, Flow, Reader, constants
from trainer.masked import Masked, MaskedLinear
from trainer.norm import GatedBatchNorm, normalise

BatchNorms = (nn.BatchNorm1d, nn.BatchNorm2d)


def select_columns(weight: Tensor, active: Tensor, columns: int) -> Tensor:
    """Returns `weight` (out, C * columns, ...) with only the columns that the channels in `active` (k,) feed."""
    if columns == 1:
        return weight.index_select(1, active)
    grouped = weight.reshape(weight.shape[0], -1, columns)
    return grouped.index_select(1, active).flatten(1)


class CompactModel:
    """A model whose forward takes rows: set `active`, call `run`, read `statistics`.

    dropped     the flows whose layers hold only active rows, by layer
    rows        names of the tensors whose first axis runs over a dropped layer's filters, but its thresholds, by layer
    active      index (k,) of the active rows by layer, one for each dropped flow; set before `run`
    statistics  new running mean and variance by tensor name; filled by a training pass
    """

    def __init__(self, model: nn.Module, shape: tuple[int, ...], dropped: Callable[[Flow], bool]) -> None:
        self.model = copy.deepcopy(model)
        self.flows = ChannelFlows(self.model, shape)
        self.dropped = {name: flow for name, flow in self.flows.by_layer.items() if dropped(flow)}
        names = set(self.model.state_dict())
        self.rows = {
            name: [x for x in _first_axis(flow) if x in names] for name, flow in self.dropped.items()
        }
        self.active: dict[str, Tensor] = {}
        self.statistics: dict[str, Tensor] = {}
        self._full: Mapping[str, Tensor] = {}

    def run(self, tensors: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Returns the logits for `x` (N, *shape), rows gathered from the whole `tensors` where a layer is dropped."""
        rows = dict(tensors)
        for name, names in self.rows.items():
            for tensor in [*names, f"{name}.threshold"]:
                rows[tensor] = tensors[tensor].index_select(0, self.active[name])
        self._full = tensors
        return self.run_rows(rows, x)

    def run_rows(self, rows: Mapping[str, Tensor], x: Tensor) -> Tensor:
        """Returns the logits for `x` (N, *shape), where `rows` already holds only the active rows."""
        self.statistics = {}
        logits: Tensor = torch.func.functional_call(self.model, dict(rows), (x,))
        return logits

    def for_training(self) -> "CompactModel":
        """Returns this model with training forwards: columns selected, norm statistics returned, nothing mutated."""
        for name, module in self.model.named_modules():
            if isinstance(module, BatchNorms):
                _replace_forward(module, partial(self._train_norm, name, module))
        for name, (flow, reader) in self.flows.sources.items():
            if flow.layer in self.dropped:
                _replace_forward(self.flows.modules[name], partial(self._train_reader, flow, reader))
        self.model.train()
        return self

    def for_inference(self) -> "CompactModel":
        """Returns this model with inference forwards: gates and norms folded into weights, constants into biases.

        Every step below works on weights alone, so a runtime that folds constants leaves only small weights behind.
        """
        folded = {flow.norm: flow for flow in self.flows.by_layer.values() if flow.norm}
        for name, module in self.model.named_modules():
            if name in folded:
                _replace_forward(module, lambda x: x)
            elif isinstance(module, nn.Conv1d | nn.Conv2d | nn.Linear):
                _replace_forward(module, partial(self._infer, name))
        self.model.eval()
        return self

    def _train_norm(self, name: str, norm: nn.BatchNorm1d | nn.BatchNorm2d, x: Tensor) -> Tensor:
        active = norm.source.active() if isinstance(norm, GatedBatchNorm) else None
        y, mean, variance = normalise(norm, x, active)
        self.statistics.update(
            {f"{name}.running_mean": mean.detach(), f"{name}.running_var": variance.detach()}
        )
        return y

    def _train_reader(self, flow: Flow, reader: Reader, x: Tensor) -> Tensor:
        layer, active = self.flows.modules[reader.name], self.active[flow.layer]
        if isinstance(layer, MaskedLinear):
            return layer.mapped(x, select_columns(layer.weight, active, reader.columns))
        weight, bias = _weight_and_bias(layer)
        return _apply(layer, x, select_columns(weight, active, reader.columns), bias)

    def _infer(self, name: str, x: Tensor) -> Tensor:
        layer = self.flows.modules[name]
        weight, bias = _weight_and_bias(layer)
        source = self.flows.sources.get(name)
        if source and source[0].layer in self.dropped:
            weight, bias, x = self._without_dropped(*source, weight, bias, x)
        own = self.flows.by_layer.get(name)
        if own and own.norm:
            weight, bias = _fold_norm(self.flows.modules[own.norm], weight, bias)
        return _apply(layer, x, weight, bias)

    def _without_dropped(
        self, flow: Flow, reader: Reader, weight: Tensor, bias: Tensor | None, x: Tensor
    ) -> tuple[Tensor, Tensor | None, Tensor]:
        """Returns the reader's weight on the channels left, and its bias and input with the dropped ones' constants."""
        active = self.active[flow.layer]
        kept = select_columns(weight, active, reader.columns)
        # the constants of dropped channels need the source's whole tensors, not its rows
        whole = [*self.rows[flow.layer], f"{flow.layer}.threshold"]
        with torch.nn.utils.stateless._reparametrize_module(
            self.model, {name: self._full[name] for name in whole}
        ):
            constant = constants(self.flows, flow, reader)
        if constant is None:
            return kept, bias, x
        constant = constant.index_fill(0, active, 0.0).repeat_interleave(reader.columns)
        share = (weight * constant.view(-1, *[1] * (weight.dim() - 2))).sum(1, keepdim=True)
        if reader.padded:
            # behind the padding a constant channel is not constant: one channel of ones stands for all of them
            return torch.cat([kept, share], 1), bias, F.pad(x, (0, 0, 0, 0, 0, 1), value=1.0)
        share = share.flatten(1).sum(1)
        return kept, share if bias is None else bias + share, x


def _first_axis(flow: Flow) -> list[str]:
    names = [f"{flow.layer}.{leaf}" for leaf in ("weight", "bias")]
    if flow.norm:
        names += [f"{flow.norm}.{leaf}" for leaf in ("weight", "bias", "running_mean", "running_var")]
    return names


def _apply(layer: nn.Module, x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
    if isinstance(layer, nn.Conv1d | nn.Conv2d):
        y: Tensor = layer._conv_forward(x, weight, bias)
        return y
    return F.linear(x, weight, bias)


def _weight_and_bias(layer: Any) -> tuple[Tensor, Tensor | None]:
    if isinstance(layer, Masked):
        return layer.masked_weight(), layer.masked_bias()
    return layer.weight, layer.bias


def _fold_norm(norm: Any, weight: Tensor, bias: Tensor | None) -> tuple[Tensor, Tensor]:
    """Returns weight and bias of the layer with the norm behind it worked in, as it is in inference."""
    scale = torch.rsqrt(norm.running_var + norm.eps)
    scale = scale if norm.weight is None else scale * norm.weight
    shift = -norm.running_mean if bias is None else bias - norm.running_mean
    shift = shift * scale if norm.bias is None else shift * scale + norm.bias
    if isinstance(norm, GatedBatchNorm):
        shift = shift * norm.source.active()  # the weight of a pruned row is 0 already
    return weight * scale.view(-1, *[1] * (weight.dim() - 1)), shift


def _replace_forward(module: nn.Module, forward: Callable[..., Tensor]) -> None:
    # on the instance: the class, and every other model of it, stay as they are
    module.forward = forward
