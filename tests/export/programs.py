"""Program services of test models, reached without a network; each program is made once per test session."""

import copy
import functools
from pathlib import Path

import httpx2
import numpy as np
import torch
import torch.nn.functional as F
from starlette.testclient import TestClient
from torch import Tensor, nn

from device_runtime.client import Client
from export.program_service import ProgramMaker, create_app
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.layout import Floats
from spafl.secret import Secret
from tests.export.bundles import bundle_of, state_of
from tests.export.models import LABELS, Exported, Graphs
from trainer.models import LeNet5
from trainer.sparsify import layout_of, sparsify

NOTHING = 0.0
"""Stands for a density at which one layer has no active filter left, the others half of theirs."""


class Padded(nn.Module):
    """Norms whose pruned channels are constants, behind a padding and a flatten: the hardest to fold."""

    shape = (2, 7, 7)

    def __init__(self) -> None:
        super().__init__()
        self.conv1, self.norm1 = nn.Conv2d(2, 10, 3, padding=1, bias=False), nn.BatchNorm2d(10)
        self.conv2, self.norm2 = nn.Conv2d(10, 12, 3, padding=1, stride=2), nn.BatchNorm2d(12)
        self.head = nn.Linear(12 * 4, LABELS)

    def forward(self, x: Tensor) -> Tensor:
        x = F.relu(self.norm1(self.conv1(x)))  # 7
        x = F.gelu(self.norm2(self.conv2(x)))  # 4
        return self.head(F.max_pool2d(x, 2).flatten(1))


MODELS = {"lenet5": LeNet5, "padded": Padded}


@functools.cache
def made(name: str, gate: bool) -> Exported:
    torch.manual_seed(8)
    model = sparsify(MODELS[name](), gate=gate)
    draw = np.random.default_rng(8)
    with torch.no_grad():
        for module in model.modules():
            if isinstance(module, nn.BatchNorm1d | nn.BatchNorm2d):
                for tensor in (module.weight, module.bias, module.running_mean):
                    tensor.add_(torch.from_numpy(draw.normal(0, 0.4, tensor.shape).astype(np.float32)))
    layout = layout_of(model)
    return Exported(model, layout, Graphs(model, layout, model.shape))


class Recording(httpx2.BaseTransport):
    """The way to a service in this process; remembers each request and the answer's body."""

    def __init__(self, maker: ProgramMaker, token: str | None = None) -> None:
        app = create_app(maker, Secret(token) if token else None)
        self._transport = TestClient(app, raise_server_exceptions=False)._transport
        self.seen: list[tuple[httpx2.Request, bytes]] = []

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        response = self._transport.handle_request(request)
        body = response.read()
        self.seen.append((request, body))
        headers = [(name, value) for name, value in response.headers.items() if name != "content-length"]
        return httpx2.Response(response.status_code, headers=headers, stream=httpx2.ByteStream(body))


class Served:
    """A test model's bundle and its program service."""

    def __init__(self, name: str, gate: bool, path: Path) -> None:
        self.made = made(name, gate)
        self.bundle: Bundle = bundle_of(self.made, path, ("masked",))
        self.maker = ProgramMaker(self.made.model, self.bundle)
        self.x = np.random.default_rng(0).normal(size=(70, *self.made.input.shape)).astype(np.float32)

    def state(self, density: float, seed: int = 1, weights: int = 0) -> dict[str, Floats]:
        """A state with a random share `density` of each layer active, chosen by `seed`; its weights by `weights`."""
        state, layout, draw = state_of(self.made), self.made.layout, np.random.default_rng(weights)
        if weights:
            for name, value in state.items():
                if not name.endswith("running_var"):
                    state[name] = (value + 0.2 * value.std() * draw.normal(size=value.shape)).astype(
                        np.float32
                    )
        thresholds = algorithm.thresholds_at(layout, state, density or 0.5, np.random.default_rng(seed))
        if density == NOTHING:
            thresholds[layout.layers[1].span] = 99.0
        return {**state, **layout.split(thresholds)}

    def eager(self, state: dict[str, Floats]) -> Floats:
        """Logits of `x` by the masked model in PyTorch."""
        model = copy.deepcopy(self.made.model).eval()
        model.load_state_dict({n: torch.from_numpy(v.copy()) for n, v in state.items()}, strict=False)
        with torch.no_grad():
            return np.asarray(model(torch.from_numpy(self.x)).numpy())

    def client(self, maker: ProgramMaker | None = None) -> tuple[Client, Recording]:
        """A device's connection to the service, and what goes over it."""
        transport = Recording(maker or self.maker)
        return Client("http://programs", transport=transport), transport
