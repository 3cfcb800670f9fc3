"""Small models that hold what the large ones do, and exports of them made once per test session."""

from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.build import ROLES
from export.compact import CompactModel
from export.flow import ChannelFlows
from export.inference import infer_graph, masked_graph
from export.round import begin_round_graph, end_round_graph
from export.training import form, state_tensors, train_step_graph
from spafl.layout import ThresholdLayout
from spafl.manifest import InputSpec, StateTensor, TrainStep
from trainer.sparsify import layout_of, sparsify

LABELS = 5


class Plain(nn.Module):
    """No norms, no biases, ReLU everywhere: rows are exact with and without the gate."""

    shape = (1, 15, 15)

    def __init__(self) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(1, 6, 3, bias=False)
        self.conv2 = nn.Conv2d(6, 8, 3, bias=False)
        self.fc1 = nn.Linear(8 * 2 * 2, 14, bias=False)
        self.fc2 = nn.Linear(14, LABELS, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        x = F.max_pool2d(F.relu(self.conv1(x)), 2)  # 13 -> 6, an odd size
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)  # 4 -> 2
        return self.fc2(F.relu(self.fc1(torch.flatten(x, 1))))


class Normed(nn.Module):
    """Norms, biases, padding, a stride, an average pool, and activations that are not ReLU."""

    shape = (3, 9, 9)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(3, 6, 3, padding=1, bias=False), nn.BatchNorm2d(6)
        self.conv2, self.norm2 = nn.Conv2d(6, 8, 3, padding=1, stride=2), nn.BatchNorm2d(8)
        self.conv3 = nn.Conv2d(8, 7, 3, padding=1)
        self.fc1, self.norm3 = nn.Linear(7 * 2 * 2, 13), nn.BatchNorm1d(13)
        self.fc2 = nn.Linear(13, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))  # 9
        x = F.gelu(self.norm2(self.conv2(x)))  # 5
        x = F.avg_pool2d(torch.tanh(self.conv3(x)), 2)  # 5 -> 2
        return self.fc2(F.silu(self.norm3(self.fc1(x.flatten(1)))))


class Residual(nn.Module):
    """A shortcut that needs the first layer's channels, and a layer inside the branch that nothing else reads."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.inner = nn.Conv2d(6, 9, 3, padding=1)
        self.outer = nn.Conv2d(9, 6, 3, padding=1)
        self.head = nn.Linear(6 * 3 * 3, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.stem(x))
        x = x + self.outer(F.relu(self.inner(x)))
        return self.head(F.max_pool2d(x, 2).flatten(1))


MODELS = {"plain": Plain, "normed": Normed, "residual": Residual}


@dataclass(frozen=True)
class Exported:
    """A sparsified model, and its graphs as the build would write them."""

    model: nn.Module
    layout: ThresholdLayout
    state: tuple[StateTensor, ...]
    step: TrainStep
    files: dict[str, bytes]
    flows: ChannelFlows

    @property
    def input(self) -> InputSpec:
        shape = self.model.shape  # type: ignore[union-attr]
        return InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0])

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("abcde")


@cache
def exported(
    name: str, *, gate: bool = True, mask_head: bool = False, scale: str = "unit", ste: str = "identity"
) -> Exported:
    torch.manual_seed(3)
    model = sparsify(MODELS[name](), gate=gate, mask_head=mask_head, scale=scale, ste=ste)  # type: ignore[arg-type]
    with torch.no_grad():
        draw = np.random.default_rng(5)
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.add_(torch.from_numpy(draw.normal(0, 0.3, tensor.shape).astype(np.float32)))
    shape = model.shape
    layout = layout_of(model)
    training = CompactModel(model, shape, dropped=lambda flow: flow.exact)
    state, step = state_tensors(model, training), form(training)
    inferring = CompactModel(model, shape, dropped=lambda flow: flow.drops)
    graphs = {
        "train_step": train_step_graph(training.for_training(), state, shape),
        "begin_round": begin_round_graph(layout, state),
        "end_round": end_round_graph(layout, state),
        "infer": infer_graph(inferring.for_inference(), layout, state, shape),
        "masked": masked_graph(model, state, shape),
    }
    files = {f"{role}.onnx": graphs[role].SerializeToString() for role in ROLES}
    return Exported(model, layout, state, step, files, ChannelFlows(model, shape))
