"""The model to export: a name we know or `module:function`, and the weights it starts from."""

import importlib
import inspect
import sys
from pathlib import Path

import safetensors.torch
import torch
from torch import Tensor, nn

from spafl.bundle import Bundle
from spafl.errors import SettingsError
from trainer.models import MODELS
from trainer.sparsify import layout_of, sparsify


def load_model(source: str, labels: int | None, init: Path | None, seed: int) -> nn.Module:
    """Returns the ordinary PyTorch model of `source`, randomly initialised by `seed` or from `init`.

    source  a name of `trainer.models.MODELS`, or module:function, which takes nothing and returns an nn.Module
    labels  outputs of the models we know; as many as they are made for if None
    init    a .safetensors file or a torch state_dict, of tensors under the model's own names

    Raises:
        SettingsError: no such model, or the weights are not its.
    """
    torch.manual_seed(seed)
    if source in MODELS:
        model = MODELS[source]() if labels is None else MODELS[source](labels)
    elif ":" in source:
        model = _call(source)
    else:
        raise SettingsError(f"no model {source!r}: expected {', '.join(MODELS)} or module:function")
    if init is not None:
        _load(model, init)
    return model


def bundle_model(bundle: Bundle, source: str | None = None) -> nn.Module:
    """Returns the sparsified model that `bundle` was exported from, made again from its source.

    source   what `load_model` takes; None: what the bundle says it was exported from

    Raises:
        SettingsError: no source is known, or what it makes is not the bundle's model.
    """
    manifest, options = bundle.manifest, bundle.manifest.options
    source = source or str(options.get("model", ""))
    if not source:
        raise SettingsError(f"bundle {manifest.name} does not say what it was exported from: give --model")
    plain = load_model(source, len(manifest.labels), None, 0)
    own, initial = plain.state_dict(), bundle.initial_state()
    # where thresholds are in units of their layer, the initial weights say of which size these are
    known = {
        name: torch.from_numpy(value)
        for name, value in initial.items()
        if name in own and own[name].shape == value.shape
    }
    plain.load_state_dict(known, strict=False)
    model = sparsify(
        plain,
        gate=bool(options.get("gate", True)),
        mask_head=bool(options.get("mask_head", False)),
        ste="cifar-release" if options.get("ste") == "cifar-release" else "identity",
        scale="layer" if options.get("scale") == "layer" else "unit",
    )
    layout = layout_of(model, "n_in" if options.get("conv_divisor") == "n_in" else "kernel")
    shapes = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    differ = [tensor.name for tensor in manifest.state if shapes.get(tensor.name) != tensor.shape]
    if layout.id != manifest.layout.id or differ:
        what = f"tensors {differ[:5]} differ" if differ else f"its layout is {layout.id}"
        raise SettingsError(f"{source} is not what bundle {manifest.name} was exported from: {what}")
    return model


def _call(source: str) -> nn.Module:
    module, _, name = source.partition(":")
    sys.path.insert(0, str(Path.cwd()))  # as `python -m` does: people keep models beside where they work
    try:
        function = getattr(importlib.import_module(module), name)
    except (
        ImportError,
        AttributeError,
        ValueError,
        TypeError,
    ) as error:  # the last two for names that are none
        raise SettingsError(f"cannot import {source!r}: {error}") from error
    finally:
        sys.path.pop(0)
    try:
        inspect.signature(function).bind()
    except (TypeError, ValueError) as error:
        raise SettingsError(f"{source} is no function that takes no arguments: {error}") from error
    model = function()
    if not isinstance(model, nn.Module):
        raise SettingsError(f"{source} returned {type(model).__name__}, expected a torch.nn.Module")
    return model


def _load(model: nn.Module, path: Path) -> None:
    if not path.is_file():
        raise SettingsError(f"no weights at {path}")
    try:
        if path.suffix == ".safetensors":
            weights: dict[str, Tensor] = safetensors.torch.load_file(path)
        else:
            # weights_only: a pickle can run anything, and this file may be anybody's
            weights = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:  # torch raises what the unpickler happens to raise
        raise SettingsError(f"{path} is not a state_dict of tensors: {str(error).splitlines()[0]}") from error
    if not isinstance(weights, dict) or not all(isinstance(value, Tensor) for value in weights.values()):
        raise SettingsError(f"{path} is not a state_dict of tensors by name: save model.state_dict() alone")
    expected = {name: tuple(value.shape) for name, value in model.state_dict().items()}
    got = {name: tuple(value.shape) for name, value in weights.items() if not name.endswith(".threshold")}
    if wrong := [
        f"{name} {expected.get(name)} -> {got.get(name)}"
        for name in {**expected, **got}
        if expected.get(name) != got.get(name)
    ]:
        raise SettingsError(
            f"{path} has other tensors than the model (model -> file): {'; '.join(wrong[:5])}"
        )
    model.load_state_dict({name: weights[name] for name in expected})
