"""What a demo is asked for."""

from dataclasses import dataclass
from pathlib import Path

import numpy as np

from spafl.hyperparameters import Hyperparameters

HYPERPARAMETERS = {
    # twice the published FMNIST rate: 15 rounds stand for 500, and filters have to be pruned in them
    "lenet5": Hyperparameters(epochs=5, batch_size=64, lr=0.02, coeff=0.002),
    # as published for CIFAR-10
    "conv4": Hyperparameters(epochs=5, batch_size=16, lr=0.01, coeff=0.00015, clip=3.0),
    "vit": Hyperparameters(epochs=1, batch_size=16, lr=0.01, coeff=0.0001),
}


@dataclass(frozen=True, slots=True)
class Plan:
    """What a demo is asked for.

    at_once   device processes that run at the same time
    limit     images of each label, where the dataset is class folders
    parity    have the export checked against PyTorch
    engines   what the devices train with, taking turns
    """

    out: Path
    model: str
    dataset: str
    devices: int
    rounds: int
    per_round: int
    alpha: float
    seed: int
    at_once: int
    hyperparameters: Hyperparameters
    limit: int | None = None
    parity: bool = True
    engines: tuple[str, ...] = ("onnx",)

    @property
    def work(self) -> Path:
        """Returns where everything lies that is not a result: logs, states, the server's store."""
        return self.out / "work"

    @property
    def pictured(self) -> tuple[int, ...]:
        """Returns the rounds after which the active filters are looked at: first, middle and last."""
        return tuple(sorted({1, (self.rounds + 1) // 2, self.rounds}))

    def cohorts(self) -> list[list[int]]:
        """Returns the devices of each round: those that took part least so far, ties broken at random."""
        draw = np.random.default_rng(self.seed)
        taken, cohorts = np.zeros(self.devices), []
        for _ in range(self.rounds):
            cohort = np.lexsort((draw.random(self.devices), taken))[: self.per_round]
            taken[cohort] += 1
            cohorts.append([int(device) for device in cohort])
        return cohorts
