"""Any ordinary PyTorch model -> the same model with masked layers."""

import copy
from typing import Literal, TypeVar

from torch import fx, nn

from spafl.errors import SettingsError
from spafl.layout import Layer, ThresholdLayout
from trainer.graph import calls, trace
from trainer.masked import Masked, MaskedConv1d, MaskedConv2d, MaskedLinear, StraightThrough
from trainer.norm import gated

M = TypeVar("M", bound=nn.Module)

MASKED: dict[type[nn.Module], type[Masked]] = {
    nn.Conv1d: MaskedConv1d,
    nn.Conv2d: MaskedConv2d,
    nn.Linear: MaskedLinear,
}
"""What layers are exchanged for; subclasses of them compute something else, and stay as they are."""


def sparsify(
    model: M,
    *,
    gate: bool = True,
    mask_head: bool = False,
    ste: StraightThrough = "identity",
    scale: Literal["unit", "layer"] = "unit",
) -> M:
    """Returns a copy of `model` whose Conv1d, Conv2d and Linear layers are masked by thresholds that start at 0.

    gate       pruned channels become exactly 0, behind their batch norm where they have one; False: as published
    mask_head  mask the layers that make the output too, as published; a pruned row then switches a class off
    ste        the straight-through surrogate (`trainer.masked.straight_through`)
    scale      unit of the thresholds: "unit" as published, "layer" the layer's mean |w| now

    The model's own classes and forward stay; only its layers are exchanged, under their own names. All other
    parameters, of embeddings, norms or positions, are trained as they are; so are layers inside a module of torch.nn,
    such as nn.TransformerEncoderLayer, whose forward is not taken apart.

    Raises:
        SettingsError: nothing to mask, a layer that is called twice, tied parameters, or a model that cannot be traced.
    """
    model = copy.deepcopy(model)
    _refuse_tied(model)
    graph = trace(model).graph
    modules, nodes = dict(model.named_modules()), calls(graph)
    layers = {name: node for name, node in nodes.items() if type(modules[name]) in MASKED}
    if not mask_head:
        layers = {
            name: node for name, node in layers.items() if not _makes_output(node, set(layers.values()))
        }
    if not layers:
        raise SettingsError(
            f"{type(model).__name__} has no Conv1d, Conv2d or Linear to mask"
            + ("" if mask_head else " beside its head; mask_head=True masks that as well")
        )
    for name, node in layers.items():
        layer = modules[name]
        unit = _mean_magnitude(layer) if scale == "layer" else 1.0
        norm = _norm_behind(node, modules) if gate else None
        masked = MASKED[type(layer)](layer, ste=ste, scale=unit, gate=gate and norm is None)
        model.set_submodule(name, masked)
        if norm is not None:
            model.set_submodule(norm, gated(modules[norm], masked, norm))
    return model


def masked_layers(model: nn.Module) -> dict[str, Masked]:
    """Returns the model's masked layers by module path, in module order."""
    return {name: module for name, module in model.named_modules() if isinstance(module, Masked)}


def layout_of(model: nn.Module, conv_divisor: Literal["kernel", "n_in"] = "kernel") -> ThresholdLayout:
    """Returns the threshold layout of a sparsified model, layers in the order the model calls them.

    conv_divisor  what a convolution's catch-up step is divided by: kh * kw as published, or its n_in

    Raises:
        SettingsError: the model has no masked layers.
    """
    masked = masked_layers(model)
    if not masked:
        raise SettingsError(f"{type(model).__name__} has no masked layers: sparsify() it first")
    layers = []
    for name in calls(trace(model).graph):
        if (layer := masked.get(name)) is None:
            continue
        n_in = layer.weight[0].numel()
        kernel = n_in if isinstance(layer, MaskedLinear) else layer.weight[0, 0].numel()
        layers.append(
            Layer(
                name=name,
                kind="linear" if isinstance(layer, MaskedLinear) else "conv",
                out=len(layer.weight),
                n_in=n_in,
                n_scale=kernel if conv_divisor == "kernel" else n_in,
                offset=0,
                scale=layer.scale,
            )
        )
    return ThresholdLayout.of(layers)


def _refuse_tied(model: nn.Module) -> None:
    names: dict[nn.Parameter, str] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        if (other := names.setdefault(parameter, name)) != name:
            raise SettingsError(
                f"{other} and {name} are one tensor: give each layer its own, as devices keep them"
            )


def _makes_output(node: fx.Node, layers: set[fx.Node]) -> bool:
    """Returns whether `node`'s value reaches the model's output without passing another maskable layer."""
    reached, seen = list(node.users), set()
    while reached:
        user = reached.pop()
        if user.op == "output":
            return True
        if user not in layers and user not in seen:
            seen.add(user)
            reached.extend(user.users)
    return False


def _norm_behind(node: fx.Node, modules: dict[str, nn.Module]) -> str | None:
    """Returns the path of the batch norm that is the only reader of `node`'s value, if there is one."""
    if len(node.users) != 1:
        return None
    (user,) = node.users
    if user.op != "call_module" or type(modules[str(user.target)]) not in (nn.BatchNorm1d, nn.BatchNorm2d):
        return None
    norm = modules[str(user.target)]
    if norm.momentum is None or not norm.track_running_stats:
        raise SettingsError(
            f"batch norm {user.target!r} needs momentum and running statistics to be trained on devices, "
            f"got momentum={norm.momentum}, track_running_stats={norm.track_running_stats}"
        )
    return str(user.target)


def _mean_magnitude(layer: nn.Module) -> float:
    # six digits, so that the layout's JSON is the same on every machine
    return float(f"{layer.weight.detach().abs().mean().item():.6g}")  # type: ignore[operator]
