"""What a run asks of local training, with the paper's symbols."""

import math
from dataclasses import dataclass, replace
from typing import Annotated, Literal, Self

from spafl.errors import SettingsError
from spafl.record import Limits, Record
from spafl.step import NO_CLIP

MIN_LR = 1e-30
"""Where a decaying learning rate stops: still a float32 above 0, so that a lease stays valid in round 100,000."""


@dataclass(frozen=True, kw_only=True, slots=True)
class Hyperparameters(Record):
    """How a device trains for one round. The defaults are the published FMNIST settings, but for `lr` and `ramp`.

    epochs         passes over the local examples
    batch_size     examples per step; the last batch of an epoch may be smaller
    lr             learning rate of the weights
    lr_decay       the round's factor: lr * lr_decay**round (published CIFAR code)
    threshold_lr   learning rate of the thresholds; None means lr
    momentum       of SGD, for weights and thresholds; starts at 0 each round
    coeff          weight of the regulariser sum_i exp(-tau_i)
    ramp           "fmnist" multiplies coeff by 1 / (1 + exp(5 - 10 round / rounds)) (published FMNIST code)
    clip           largest global gradient norm; None means no clipping
    """

    epochs: Annotated[int, Limits(ge=1, le=1000)] = 5
    batch_size: Annotated[int, Limits(ge=1, le=4096)] = 64
    lr: Annotated[float, Limits(gt=0, le=10)] = 0.01
    lr_decay: Annotated[float, Limits(gt=0, le=1)] = 1.0
    threshold_lr: Annotated[float, Limits(ge=0, le=10)] | None = None
    momentum: Annotated[float, Limits(ge=0, lt=1)] = 0.9
    coeff: Annotated[float, Limits(ge=0, le=10)] = 0.002
    ramp: Literal["none", "fmnist"] = "none"
    clip: Annotated[float, Limits(gt=0, le=1e6)] | None = None

    def scalars(self) -> dict[str, float]:
        """Returns the inputs of a training step by name, as in `spafl.step.SCALARS`."""
        return {
            "lr": self.lr,
            "threshold_lr": self.lr if self.threshold_lr is None else self.threshold_lr,
            "coeff": self.coeff,
            "momentum": self.momentum,
            "clip": NO_CLIP if self.clip is None else self.clip,
        }

    def at(self, round: int, rounds: int) -> Self:
        """Returns the parameters in force in 0-based `round` of `rounds`: decay and ramp worked in, threshold_lr set.

        What a lease carries, so that devices hold no schedule.

        Raises:
            SettingsError: the round is not one of the run's.
        """
        if not 0 <= round < rounds:
            raise SettingsError(f"round {round} is not one of 0 to {rounds - 1}")
        decay = self.lr_decay**round
        threshold_lr = self.lr if self.threshold_lr is None else self.threshold_lr
        ramp = 1 / (1 + math.exp(5 - 10 * round / rounds)) if self.ramp == "fmnist" else 1.0
        return replace(
            self,
            lr=max(self.lr * decay, MIN_LR),
            threshold_lr=threshold_lr * decay,
            coeff=self.coeff * ramp,
            lr_decay=1.0,
            ramp="none",
        )
