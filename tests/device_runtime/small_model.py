"""A model that trains in milliseconds and has what is hard: a norm, a pooled convolution, a masked linear layer.

python -m tests.device_runtime.small_model OUT [ENGINE ...]
"""

import sys

import torch
from torch import nn

from export.build import export_bundle
from spafl.manifest import InputSpec
from trainer.sparsify import sparsify


def small_model() -> nn.Module:
    torch.manual_seed(5)
    return nn.Sequential(
        nn.Conv2d(1, 6, 3),
        nn.BatchNorm2d(6),
        nn.ReLU(),
        nn.MaxPool2d(2),
        nn.Flatten(),
        nn.Linear(54, 8),
        nn.ReLU(),
        nn.Linear(8, 3),
    )


if __name__ == "__main__":
    spec = InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,))
    export_bundle(
        sparsify(small_model()),
        sys.argv[1],
        name="small",
        input=spec,
        labels=("a", "b", "c"),
        engines=tuple(sys.argv[2:]),
        parity=False,
    )
