"""The models we know by name: what they take, what is masked in them, and that all of it learns."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from trainer.graph import token_ids
from trainer.models import MODELS
from trainer.sparsify import layout_of, masked_layers, sparsify

SHAPES = {
    "lenet5": (1, 28, 28),
    "conv4": (3, 32, 32),
    "vit": (3, 32, 32),
    "resnet18": (3, 32, 32),
    "mlp": (1, 28, 28),
    "mobilenet": (3, 32, 32),
    "cnn1d": (9, 128),
    "text": (64,),
}
WEIGHTS = {"lenet5": 430_500, "conv4": 804_800, "resnet18": 11_164_352, "mlp": 177_800, "cnn1d": 89_888}
"""In masked and head layers: a change of an architecture is a change of every bundle made of it."""


def test_every_model_has_a_shape_here() -> None:
    assert {name: make().shape for name, make in MODELS.items()} == SHAPES


@pytest.mark.parametrize("name", MODELS)
def test_every_parameter_of_a_sparsified_model_gets_a_gradient(name: str) -> None:
    torch.manual_seed(0)
    model = sparsify(MODELS[name](7))
    ids = token_ids(model)
    assert (ids is not None) == (name == "text")
    x = torch.randn(4, *SHAPES[name]) if ids is None else torch.randint(0, ids, (4, *SHAPES[name])).float()
    logits = model(x)
    assert logits.shape == (4, 7)
    F.cross_entropy(logits, torch.arange(4)).backward()
    for parameter, value in model.named_parameters():
        assert value.grad is not None, parameter
        assert value.grad.any(), parameter


@pytest.mark.parametrize("name", WEIGHTS)
def test_weights(name: str) -> None:
    model = MODELS[name]()
    layers = [m for m in model.modules() if isinstance(m, nn.Conv1d | nn.Conv2d | nn.Linear)]
    assert sum(layer.weight.numel() for layer in layers) == WEIGHTS[name]


def test_resnets_layers_are_gated_by_their_norms() -> None:
    sparse = sparsify(MODELS["resnet18"]())
    assert len(masked_layers(sparse)) == 20
    assert not any(layer.gate for layer in masked_layers(sparse).values())
    assert layout_of(sparse).size == 4800


def test_mobilenets_depthwise_filters_have_thresholds_too() -> None:
    layers = {layer.name: layer for layer in layout_of(sparsify(MODELS["mobilenet"]())).layers}
    assert (layers["blocks.1.depthwise"].out, layers["blocks.1.depthwise"].n_in) == (64, 9)
