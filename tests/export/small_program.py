"""A small ExecuTorch program, made without spafl: two layers on portable kernels, for batches of up to 16."""

import warnings

import torch
from torch import Tensor, nn


class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.second = nn.Linear(6, 5), nn.Linear(5, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.relu(self.first(x)))


def small_program() -> bytes:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # executorch reads its own files in a deprecated way
        from executorch.exir import to_edge

        batch = torch.export.Dim("batch", max=16)
        exported = torch.export.export(Net(), (torch.zeros(4, 6),), dynamic_shapes=({0: batch},))
        return bytes(to_edge(exported).to_executorch().buffer)
