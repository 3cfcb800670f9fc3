"""Compact models against masked ones, eagerly and in float64, on random small networks: no exporter, no rounding."""

import numpy as np
import torch
from hypothesis import HealthCheck, assume, given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from torch import Tensor, nn

from export.build import compaction_of
from export.compact import CompactModel
from export.step import StepTensors, training_step
from export.training import state_tensors
from spafl import algorithm
from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.rows import kept_rows, staying
from tests.export.nets import LABELS, Net, nets
from trainer.local import sgd_step, zero_momenta
from trainer.sparsify import layout_of, masked_layers, sparsify

TOLERANCE = 1e-9
"""Relative to the largest value: float64 sums of some hundred terms in another order, over three steps."""

PROPERTY = settings(
    max_examples=40,
    deadline=None,  # the first example of a shape may wait for torch
    derandomize=True,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

options = st.fixed_dictionaries(
    {
        "gate": st.booleans(),
        "mask_head": st.booleans(),
        "scale": st.sampled_from(["unit", "layer"]),
        "ste": st.sampled_from(["identity", "cifar-release"]),
    }
)
densities = st.sampled_from([1.0, 0.5, 0.3, 0.0])


def masked_model(net: Net, given_options: dict[str, object], density: float, seed: int) -> nn.Module:
    """Returns the sparsified net in float64: norms moved off their start, a share `density` of each layer active."""
    torch.manual_seed(seed)
    for module in net.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    try:
        model = sparsify(net, **given_options)  # type: ignore[arg-type]
    except SettingsError as error:
        assume("to mask" not in str(error))  # nothing but a head
        raise
    draw = np.random.default_rng(seed)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for name in ("weight", "bias", "running_mean"):
                    if (tensor := getattr(module, name)) is not None:
                        tensor.add_(torch.from_numpy(draw.normal(0, 0.4, tensor.shape).astype(np.float32)))
        layout = layout_of(model)
        state = {name: value.numpy() for name, value in model.state_dict().items()}
        thresholds = algorithm.thresholds_at(layout, state, density, draw)
        for layer in layout.layers:
            masked = masked_layers(model)[layer.name]
            masked.threshold.copy_(torch.from_numpy(thresholds[layer.span]))
            if density == 0.0:
                masked.threshold.fill_(9.0)
    return model


def masks(model: nn.Module) -> dict[str, NDArray[np.bool_]]:
    return {name: layer.active().numpy() > 0 for name, layer in masked_layers(model).items()}


def staying_rows(compact: CompactModel, model: nn.Module) -> dict[str, Tensor]:
    kept = kept_rows(compaction_of(compact), masks(model))
    return {name: torch.from_numpy(kept[name]) for name in compact.dropped}


def training_rows(compact: CompactModel, model: nn.Module) -> dict[str, Tensor]:
    active = masks(model)
    return {
        name: torch.from_numpy(
            staying(np.logical_or.reduce([active[layer] for layer in group.layers]), group.blocks)
        )
        for name, group in compact.dropped.items()
    }


def difference(got: Tensor, expected: Tensor) -> float:
    assert got.shape == expected.shape
    return float((got - expected).abs().max() / expected.abs().max().clamp_min(1e-6))


@PROPERTY
@given(nets(), options, densities, st.integers(0, 1000))
def test_compact_inference_is_masked_inference(
    net: Net, given_options: dict[str, object], density: float, seed: int
) -> None:
    model = masked_model(net, given_options, density, seed)
    compact = CompactModel(model, net.shape, dropped=lambda group: group.drops)
    compact.model.double()
    model.double().eval()
    compact.active = staying_rows(compact, model)
    x = torch.from_numpy(np.random.default_rng(seed).normal(size=(4, *net.shape)))
    with torch.no_grad():
        got = compact.run(model.state_dict(), x)
        expected = model(x)
    assert difference(got, expected) < TOLERANCE


@PROPERTY
@given(nets(), options, densities, st.integers(0, 1000), st.sampled_from([None, 0.1]))
def test_a_step_on_rows_is_a_step_of_the_whole_model(
    net: Net, given_options: dict[str, object], density: float, seed: int, clip: float | None
) -> None:
    model = masked_model(net, given_options, density, seed)
    compact = CompactModel(model, net.shape, dropped=lambda group: group.exact, training=True)
    tensors = state_tensors(model, compact)
    compact.model.double()
    model.double()
    active = training_rows(compact, model)
    whole = {tensor.name: model.state_dict()[tensor.name].clone() for tensor in tensors}
    state = {
        tensor.name: whole[tensor.name][active[str(tensor.layer)]] if tensor.rows else whole[tensor.name]
        for tensor in tensors
    }
    given_momenta = {
        tensor.name: torch.zeros_like(state[tensor.name]) for tensor in tensors if tensor.trained
    }
    momenta = zero_momenta(model)
    h = Hyperparameters(lr=0.05, threshold_lr=0.03, coeff=0.1, clip=clip)
    scalars = {
        "lr": h.lr,
        "threshold_lr": h.threshold_lr,
        "coeff": h.coeff,
        "momentum": h.momentum,
        "clip": clip or 3e38,
    }
    step = training_step(compact, tensors)
    draw = np.random.default_rng(seed)
    for size in (6, 4, 5):
        x = torch.from_numpy(draw.normal(size=(size, *net.shape)))
        y = torch.from_numpy(draw.integers(0, LABELS, size))
        result = step(
            x,
            y,
            {name: torch.tensor(value, dtype=torch.float64) for name, value in scalars.items()},
            StepTensors(active, state, given_momenta),
        )
        state, given_momenta = result.state, result.momenta
        expected = sgd_step(model, momenta, x, y, h)
        assert abs(float(result.loss) - expected.loss) < TOLERANCE * max(1, abs(expected.loss))
        assert int(result.correct) == expected.correct
    for tensor in tensors:
        got = state[tensor.name]
        if tensor.rows:
            got = whole[tensor.name].index_copy(0, active[str(tensor.layer)], got)
        assert difference(got, model.state_dict()[tensor.name]) < TOLERANCE, tensor.name
