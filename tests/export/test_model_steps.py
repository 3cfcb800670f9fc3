"""One step of each model we know, narrowed, against PyTorch eager: from the same state each time, float64 the judge.

Not ten steps in a row as for the models of `test_train_step`: behind batch norms of so few channels a rounding grows
tenfold from one step to the next.
"""

import copy

import numpy as np
import pytest
import torch

from export.host import GraphHost
from export.parity import _batch, _shake_norms, _threshold_gradients, check_step
from spafl import algorithm
from spafl.hyperparameters import Hyperparameters
from tests.export.models import Exported, exported
from trainer.local import begin_round, zero_momenta
from trainer.masked import Masked

VARIANTS = {
    "resnet": {"name": "resnet"},
    "resnet, as published": {"name": "resnet", "gate": False, "mask_head": True},
    "mlp": {"name": "mlp"},
    "mobilenet": {"name": "mobilenet"},
    "1-D": {"name": "cnn1d"},
    "1-D, as published": {"name": "cnn1d", "gate": False},
    "text": {"name": "text", "mask_head": True},
}
WORST_CONDITION = 1e-3
"""The most that float64 may leave open: beyond it a comparison says nothing."""


def begun(made: Exported, density: float) -> tuple[torch.nn.Module, GraphHost, np.random.Generator]:
    """The model and its graphs after the same beginning of a round, at a density."""
    draw = np.random.default_rng(0)
    eager = copy.deepcopy(made.model)
    _shake_norms(eager, draw)
    state = {tensor.name: eager.state_dict()[tensor.name].numpy().copy() for tensor in made.state}
    target = algorithm.thresholds_at(made.layout, state, density, draw)
    base = (target - draw.normal(0, 0.01, len(target))).astype(np.float32)
    host = GraphHost(made, made.files)  # type: ignore[arg-type]
    host.begin_round(state, base, target)
    begin_round(eager, base, target)
    return eager, host, draw


# not fewer: of layers this narrow one filter is left, whose norm sees a mean many times its deviation
@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_steps_are_eager_training(variant: str, density: float) -> None:
    made = exported(**VARIANTS[variant])
    eager, host, draw = begun(made, density)
    momenta = zero_momenta(eager)
    h = Hyperparameters(lr=0.02, threshold_lr=0.01, coeff=0.01, clip=1.0)
    for size in (12, 5, 12, 3):
        batch = _batch(made, size, draw, None)  # type: ignore[arg-type]
        check = check_step(eager, momenta, host, made, density, batch, h)  # type: ignore[arg-type]
        assert check.difference <= check.tolerance < WORST_CONDITION, check


@pytest.mark.parametrize("density", [1.0, 0.5])
@pytest.mark.parametrize("variant", VARIANTS)
def test_threshold_gradients_without_the_regulariser(variant: str, density: float) -> None:
    made = exported(**VARIANTS[variant])
    eager, host, draw = begun(made, density)
    batch = _batch(made, 12, draw, None)  # type: ignore[arg-type]
    check = _threshold_gradients(eager, host, made, density, batch)  # type: ignore[arg-type]
    assert check.difference <= check.tolerance < WORST_CONDITION, check
    moved = {name for name in host.momenta if name.endswith(".threshold") and host.momenta[name].any()}
    assert moved, "no threshold got a gradient"


def test_what_the_text_model_trains_and_masks() -> None:
    made = exported("text", mask_head=True)
    roles = {tensor.name: tensor.role for tensor in made.state}
    assert roles["embed.weight"] == roles["position"] == "parameter"
    masked = {name for name, module in made.model.named_modules() if isinstance(module, Masked)}
    block = {f"blocks.0.{leaf}" for leaf in ("query", "key", "value", "out", "fc1", "fc2")}
    assert masked == {*block, "head"}
    assert made.input.ids == 30


def test_an_embeddings_gradient_is_added_up_in_torchs_order() -> None:
    """A token that comes a hundred times: float32 sums of another order would differ in their last digits."""
    made = exported("text", mask_head=True)
    eager, host, draw = begun(made, 1.0)
    momenta = zero_momenta(eager)
    batch = _batch(made, 12, draw, None)  # type: ignore[arg-type]
    batch[0][:] = np.minimum(batch[0], 3)
    check = check_step(eager, momenta, host, made, 1.0, batch)  # type: ignore[arg-type]
    assert check.difference <= check.tolerance
    assert not host.momenta["embed.weight"][4:].any(), "rows that no token named"
    assert host.momenta["embed.weight"][:4].any(axis=1).all()
