"""Random networks: what a step is traced to is eager PyTorch's step, in float64, and its graph is in float32."""

import copy

import numpy as np
import pytest
import torch
from torch import Tensor

from export.compact import CompactModel
from export.decompositions import decompositions
from export.host import run, session
from export.lowering import trace
from export.training import FlatStep, flat_step, state_tensors, train_step_graph
from spafl.hyperparameters import Hyperparameters
from spafl.layout import ThresholdLayout
from tests.export.nets import Net
from tests.export.step_nets import LABELS, step_net
from trainer.local import sgd_step, zero_momenta
from trainer.sparsify import layout_of, masked_layers, sparsify

EXACT = 1e-7
"""Of each tensor's largest magnitude, in float64; torch's own Hardsigmoid has its sixth in float32."""
FLOAT32 = 2e-4
"""The same in float32."""
H = Hyperparameters(lr=0.05, threshold_lr=0.02, coeff=0.0, clip=1.0)


def sparse(seed: int) -> tuple[Net, ThresholdLayout]:
    """The network of a seed, half of its filters pruned."""
    model = sparsify(step_net(seed), gate=seed % 3 > 0, mask_head=seed % 5 == 0)
    for layer in masked_layers(model).values():
        distance = layer.distance().detach()
        layer.threshold.data += distance.sort().values[(len(distance) - 1) // 2] + 1e-3
    return model, layout_of(model)


def batch(model: Net, seed: int, size: int) -> tuple[Tensor, Tensor]:
    torch.manual_seed(seed)
    return torch.randn(size, *model.shape), torch.randint(0, LABELS, (size,))


def arguments(model: Net, step: FlatStep, x: Tensor, y: Tensor) -> dict[str, Tensor]:
    """What the step takes, momenta that are not 0 among it."""
    values = {
        **model.state_dict(),
        **{name: torch.tensor(value, dtype=torch.float64) for name, value in H.scalars().items()},
    }
    draw = torch.Generator().manual_seed(1)
    values |= {
        f"momentum.{name}": torch.randn(value.shape, generator=draw) / 100
        for name, value in model.named_parameters()
    }
    values |= {"x": x, "y": y}
    return {name: values[name] for name in step.inputs}


def eager(model: Net, given: dict[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    """The step's outputs, as PyTorch computes them."""
    model = copy.deepcopy(model).to(dtype)
    momenta = {name: given[f"momentum.{name}"].to(dtype).clone() for name in zero_momenta(model)}
    done = sgd_step(model, momenta, given["x"].to(dtype), given["y"], H)
    after = {f"next.{name}": value for name, value in model.state_dict().items()}
    after |= {f"next.momentum.{name}": value for name, value in momenta.items()}
    return {
        **after,
        "loss": torch.tensor(done.loss, dtype=torch.float64),
        "correct": torch.tensor(done.correct),
    }


def differences(got: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    # a bias before a norm has a gradient of 0 but for rounding, which is no measure of itself
    floor = {True: 1e-3 * max(float(v.abs().max()) for n, v in expected.items() if "momentum." in n)}
    found = {}
    for name, value in got.items():
        truth = expected[name].double()
        scale = max(float(truth.abs().max()), floor.get("momentum." in name, 0.0), 1e-12)
        found[name] = float((value.double() - truth).abs().max()) / scale
    return found


def flat(model: Net, dtype: torch.dtype) -> FlatStep:
    compact = CompactModel(model, model.shape, dropped=lambda group: False, training=True)
    step = flat_step(compact, state_tensors(model, compact), model.shape)
    compact.model.to(dtype)
    return step


@pytest.mark.parametrize("seed", range(12))
def test_a_traced_step_is_eager(seed: int) -> None:
    model, _ = sparse(seed)
    step = flat(model, torch.float64)
    examples = [value.double() if value.is_floating_point() else value for value in step.inputs.values()]
    traced = trace(step.function, examples, [()] * len(step.inputs), decompositions())
    given = arguments(model, step, *batch(model, seed, len(step.inputs["x"])))
    got = traced(*(value.double() if value.is_floating_point() else value for value in given.values()))
    found = differences(dict(zip(step.outputs, got, strict=True)), eager(model, given, torch.float64))
    assert max(found.values()) < EXACT, (model, max(found, key=found.__getitem__), max(found.values()))


@pytest.mark.parametrize("seed", [100, 101, 102])
def test_a_lowered_step_is_eager(seed: int) -> None:
    model, _ = sparse(seed)
    compact = CompactModel(model, model.shape, dropped=lambda group: False, training=True)
    tensors = state_tensors(model, compact)
    graph = train_step_graph(compact, tensors, model.shape)
    given = arguments(model, flat(model, torch.float32), *batch(model, seed, 5))
    feeds = {n: value.float() if value.is_floating_point() else value for n, value in given.items()}
    got = run(session(graph.SerializeToString()), {name: value.numpy() for name, value in feeds.items()})
    outputs = {name: torch.from_numpy(np.asarray(value)) for name, value in got.items()}
    found = differences(outputs, eager(model, given, torch.float32))
    assert max(found.values()) < FLOAT32, (model, max(found, key=found.__getitem__), max(found.values()))
