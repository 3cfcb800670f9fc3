"""Small models that hold what the large ones do, and their exports, made once per test session."""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache, cached_property, partial
from typing import Any

import numpy as np
import onnx
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.build import ROLES, compaction_of
from export.compact import CompactModel
from export.depthwise import with_widths
from export.inference import infer_graph, masked_graph
from export.round import begin_round_graph, end_round_graph
from export.training import form, state_tensors, train_step_graph
from spafl.layout import ThresholdLayout
from spafl.manifest import Compaction, InputSpec, StateTensor, TrainStep
from trainer.graph import token_ids
from trainer.models import MLP, CNN1d, MobileNet, ResNet18, TextClassifier
from trainer.models.transformer import Block
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


class Separable(nn.Module):
    """Depthwise and pointwise convolutions with norms, as MobileNets stack them, and one in two groups."""

    shape = (3, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.stem, self.norm1 = nn.Conv2d(3, 6, 3, stride=2, padding=1, bias=False), nn.BatchNorm2d(6)
        self.depthwise = nn.Conv2d(6, 6, 3, padding=1, groups=6, bias=False)
        self.norm2 = nn.BatchNorm2d(6)
        self.pointwise, self.norm3 = nn.Conv2d(6, 8, 1, bias=False), nn.BatchNorm2d(8)
        self.paired = nn.Conv2d(8, 10, 3, groups=2)
        self.head = nn.Linear(10, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu6(self.norm1(self.stem(x)))  # 4
        x = F.relu6(self.norm2(self.depthwise(x)))
        x = F.relu6(self.norm3(self.pointwise(x)))
        return self.head(F.relu(self.paired(x)).mean((2, 3)))


class Attending(nn.Module):
    """A ViT of two narrow blocks."""

    shape = (2, 8, 8)

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(2, 8, 4, stride=4)
        self.blocks = nn.Sequential(Block(8, 2, 12), Block(8, 4, 10))
        self.head = nn.Linear(8, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.blocks(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


MODELS = {
    "plain": Plain,
    "normed": Normed,
    "residual": Residual,
    "separable": Separable,
    "attending": Attending,
    # those of `trainer.models`, as narrow as they can be
    "resnet": partial(ResNet18, LABELS, widths=(4, 6), blocks=1),
    "mlp": partial(MLP, LABELS, hidden=(9, 8)),
    "mobilenet": partial(MobileNet, LABELS, stem=4, stages=((4, 1, 1), (6, 1, 2)), expansion=2, last=7),
    "cnn1d": partial(CNN1d, LABELS, widths=(4, 6, 5), hidden=8),
    "text": partial(TextClassifier, LABELS, vocabulary=30, dim=8, depth=1, heads=2, hidden=12),
}


class Graphs(Mapping[str, bytes]):
    """The graphs as the build would write them, each made when it is first asked for: tracing takes seconds."""

    def __init__(self, model: nn.Module, layout: ThresholdLayout, shape: tuple[int, ...]) -> None:
        self._model, self._layout, self._shape = model, layout, shape
        self._training = CompactModel(model, shape, dropped=lambda group: group.exact, training=True)
        self.state, self.step = state_tensors(model, self._training), form(self._training)
        self._made: dict[str, bytes] = {}
        self._widths: dict[str, int] = {}

    @cached_property
    def inferring(self) -> CompactModel:
        return CompactModel(self._model, self._shape, dropped=lambda group: group.drops)

    @cached_property
    def compaction(self) -> tuple[Compaction, ...]:
        if self.inferring.depthwise:
            self["infer.onnx"]  # what is asked for is in its file
        return compaction_of(self.inferring, self._widths)

    def __getitem__(self, name: str) -> bytes:
        if name not in self._made:
            file = getattr(self, "_" + name.removesuffix(".onnx"))().SerializeToString()
            if name == "infer.onnx":
                file, self._widths = with_widths(file, self.inferring.depthwise)
            self._made[name] = file
        return self._made[name]

    def __iter__(self) -> Iterator[str]:
        return (f"{role}.onnx" for role in ROLES)

    def __len__(self) -> int:
        return len(ROLES)

    def _train_step(self) -> onnx.ModelProto:
        return train_step_graph(self._training, self.state, self._shape)

    def _begin_round(self) -> onnx.ModelProto:
        return begin_round_graph(self._layout, self.state, self._training.dropped)

    def _end_round(self) -> onnx.ModelProto:
        return end_round_graph(self._layout, self.state)

    def _infer(self) -> onnx.ModelProto:
        return infer_graph(self.inferring, self._layout, self.state, self._shape)

    def _masked(self) -> onnx.ModelProto:
        return masked_graph(self._model, self.state, self._shape)


@dataclass(frozen=True)
class Exported:
    """A sparsified model and its graphs; stands in for a manifest where only these fields are read."""

    model: nn.Module
    layout: ThresholdLayout
    files: Graphs

    @property
    def state(self) -> tuple[StateTensor, ...]:
        return self.files.state

    @property
    def compaction(self) -> tuple[Compaction, ...]:
        return self.files.compaction

    @property
    def step(self) -> TrainStep:
        return self.files.step

    @property
    def input(self) -> InputSpec:
        shape = self.model.shape  # type: ignore[union-attr]
        ids = token_ids(self.model)
        return InputSpec(shape=shape, mean=(0.0,) * shape[0], std=(1.0,) * shape[0], ids=ids)

    @property
    def labels(self) -> tuple[str, ...]:
        return tuple("abcde")


def exported(name: str, **options: Any) -> Exported:
    """The model `name`, sparsified with `options`; one and the same for the same options."""
    return _exported(name, **dict(sorted(options.items())))


@cache
def _exported(
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
    layout = layout_of(model)
    return Exported(model, layout, Graphs(model, layout, model.shape))
