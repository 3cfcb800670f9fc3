"""What a run asks of local training, with the paper's symbols."""

import math
from typing import Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from spafl.errors import SettingsError
from spafl.step import NO_CLIP

MIN_LR = 1e-30
"""Where a decaying learning rate stops: still a float32 above 0, so that a lease stays valid in round 100,000."""


class Hyperparameters(BaseModel):
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

    model_config = ConfigDict(frozen=True, extra="forbid", allow_inf_nan=False, strict=True)

    epochs: int = Field(5, ge=1, le=1000)
    batch_size: int = Field(64, ge=1, le=4096)
    lr: float = Field(0.01, gt=0, le=10)
    lr_decay: float = Field(1.0, gt=0, le=1)
    threshold_lr: float | None = Field(None, ge=0, le=10)
    momentum: float = Field(0.9, ge=0, lt=1)
    coeff: float = Field(0.002, ge=0, le=10)
    ramp: Literal["none", "fmnist"] = "none"
    clip: float | None = Field(None, gt=0, le=1e6)

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
        return self.model_copy(
            update={
                "lr": max(self.lr * decay, MIN_LR),
                "threshold_lr": threshold_lr * decay,
                "coeff": self.coeff * ramp,
                "lr_decay": 1.0,
                "ramp": "none",
            }
        )
