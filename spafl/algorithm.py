"""The algorithm between local steps, in numpy: the reference every engine is compared with.

SpaFL (Kim et al., NeurIPS 2024, arXiv 2406.00431). Layer l has weights W (out, ...) and thresholds tau (out,), in
units of the layer's `scale`:

    score_i = mean_j |W_ij| / scale        mask_i = score_i > tau_i
    catch-up:  W_ij -= sign(sum_j W_ij) * (target_i - base_i) * scale / n_scale        tau := target
"""

from collections.abc import Mapping
from typing import TypeAlias

import numpy as np
from numpy.typing import NDArray

from spafl.layout import Floats, Layer, ThresholdLayout

COLLAPSE_DENSITY = 0.01
"""A layer with this share of active filters or less has collapsed (the published code's bound)."""

_ACTIVE, _PRUNED = np.float32(-1.0), np.float32(1e30)
"""Thresholds no score comes near: scores are means of absolute values."""

Tensors: TypeAlias = Mapping[str, Floats]
Mask: TypeAlias = Mapping[str, NDArray[np.bool_]]
"""Which filters (out,) of each masked layer are active, by layer name."""


def scores(layer: Layer, weight: Floats) -> Floats:
    """Returns the scores (out,) of a layer's filters: mean |w| of each, in units of the layer's scale."""
    rows = np.abs(weight.reshape(layer.out, layer.n_in))
    return np.asarray(rows.mean(axis=1) / np.float32(layer.scale), np.float32)


def mask(layer: Layer, tensors: Tensors) -> NDArray[np.bool_]:
    """Returns which filters (out,) are active: those whose score is above their threshold."""
    return scores(layer, tensors[layer.weight]) > tensors[layer.threshold]


def mask_of(layout: ThresholdLayout, state: Mapping[str, Floats]) -> dict[str, NDArray[np.bool_]]:
    """Returns which filters of a state are active."""
    return {layer.name: mask(layer, state) for layer in layout.layers}


def decided(layout: ThresholdLayout, state: Mapping[str, Floats], mask: Mask) -> dict[str, Floats]:
    """Returns `state` with thresholds that say `mask` whoever computes the scores, and in whatever order.

    A filter whose score is its threshold to the last bit may be active to one runtime and pruned to another.
    """
    thresholds = {
        layer.threshold: np.where(mask[layer.name], _ACTIVE, _PRUNED).astype(np.float32)
        for layer in layout.layers
    }
    return {**state, **thresholds}


def densities(layout: ThresholdLayout, tensors: Tensors) -> dict[str, float]:
    """Returns the share of active filters by layer name."""
    return {layer.name: float(mask(layer, tensors).mean()) for layer in layout.layers}


def apply_global(
    layout: ThresholdLayout, tensors: Tensors, base: Floats, target: Floats
) -> dict[str, Floats]:
    """Returns `tensors` caught up from the global thresholds `base` to `target`, both (size,); inputs stay as they are.

    The change of every round missed is applied at once (it telescopes): one step over many rounds equals one step
    per round for every filter whose sum of weights keeps its sign on the way.

    Source: the published code's client update; n_scale is kh*kw for its convolutions.
    """
    caught_up = dict(tensors)
    for layer in layout.layers:
        weight = tensors[layer.weight]
        change = (target - base)[layer.span] * np.float32(layer.scale / layer.n_scale)
        direction = np.sign(weight.reshape(layer.out, layer.n_in).sum(axis=1))
        step = (direction * change).astype(np.float32)
        caught_up[layer.weight] = weight - step.reshape(-1, *[1] * (weight.ndim - 1))
        caught_up[layer.threshold] = target[layer.span].astype(np.float32)
    return caught_up


def collapsed(layout: ThresholdLayout, tensors: Tensors) -> list[str]:
    """Returns the names of the layers whose density is at most `COLLAPSE_DENSITY`."""
    return [name for name, density in densities(layout, tensors).items() if density <= COLLAPSE_DENSITY]


def reset_collapsed(layout: ThresholdLayout, tensors: Tensors) -> tuple[dict[str, Floats], list[str]]:
    """Returns `tensors` with the thresholds of collapsed layers set to 0, and those layers' names."""
    names = collapsed(layout, tensors)
    reset = {f"{name}.threshold": np.zeros_like(tensors[f"{name}.threshold"]) for name in names}
    return {**tensors, **reset}, names


def thresholds_at(
    layout: ThresholdLayout, tensors: Tensors, density: float, draw: np.random.Generator
) -> Floats:
    """Returns thresholds (size,) that leave a random share `density` of each layer's filters active, at least one.

    For checks and measurements: active filters lie well above their threshold, pruned ones well below.
    """
    thresholds = np.empty(layout.size, np.float32)
    for layer in layout.layers:
        score = scores(layer, tensors[layer.weight])
        factor = np.full(layer.out, 1.2, np.float32)
        factor[draw.permutation(layer.out)[: max(1, round(density * layer.out))]] = 0.5
        thresholds[layer.span] = score * factor
    return thresholds
