"""What a demo found out: the content of results.json."""

from collections.abc import Iterable, Mapping
from typing import Any, Literal, Self

from pydantic import BaseModel, ConfigDict, Field

from trainer.demo.meter import Kind, Traffic


class _Frozen(BaseModel):
    model_config = ConfigDict(frozen=True, extra="ignore", allow_inf_nan=False)


class ModelCost(_Frozen):
    """One model as a device runs it: bytes of the file, weights, FLOPs per example, milliseconds at batch 1."""

    bytes: int
    weights: int
    flops: int
    latency_median_ms: float
    latency_p95_ms: float


class Proof(_Frozen):
    """What `spafl device compact` proved: the compact model's logits against the masked one's on real inputs."""

    examples: int
    relative_difference: float
    argmax_agreement: float
    equal: bool
    density: dict[str, float]
    masked: ModelCost
    compact: ModelCost


class Device(_Frozen):
    """One device: accuracies are shares of its own held-out examples.

    rounds, steps   it took part in, and trained; local_only trained as many without exchange
    engine          what it trained with
    before          the initial model; after: its own model when it last trained
    """

    name: str
    engine: str = "onnx"
    examples: int
    held_out: int
    rounds: int
    steps: int
    before: float
    after: float
    local_only: float
    proof: Proof

    @property
    def density(self) -> float:
        """Returns the mean over layers of the share of active filters, as the paper reports it."""
        return mean(self.proof.density.values())


class Round(_Frozen):
    """One aggregated round, as the server reports it: example-weighted means over its devices."""

    round: int
    loss: float | None = None
    accuracy: float | None = None
    density: tuple[float, ...] = ()


class Wire(_Frozen):
    """Bytes the devices and the server exchanged: HTTP bodies alone, and everything with lines and headers."""

    exchanges: int
    body_up: int
    body_down: int
    total_up: int
    total_down: int

    @property
    def body(self) -> int:
        """Returns body bytes, both ways."""
        return self.body_up + self.body_down

    @property
    def total(self) -> int:
        """Returns all bytes, both ways."""
        return self.total_up + self.total_down


class Results(_Frozen):
    """A whole demo.

    layers         masked layers, in layout order, with their number of filters
    participations updates the server counted: `rounds` times `per_round`
    fedavg_body    body bytes FedAvg of the same model would have exchanged: every tensor but the thresholds in float32,
                   down and up for each participation
    seconds        by stage
    """

    model: str
    dataset: str
    alpha: float
    seed: int
    settings: dict[str, Any]
    layers: dict[str, int]
    weights: int
    participations: int
    rounds: tuple[Round, ...]
    devices: tuple[Device, ...]
    wire: dict[Kind, Wire]
    fedavg_body: int
    seconds: dict[str, float] = Field(default_factory=dict)

    def accuracy(self, when: Literal["before", "after", "local_only"]) -> float:
        """Returns the share of all devices' held-out examples that each device's own model labels right."""
        right = sum(float(getattr(device, when)) * device.held_out for device in self.devices)
        return right / sum(device.held_out for device in self.devices)

    def ratio(self, cost: Literal["bytes", "weights", "flops", "latency_median_ms"]) -> float:
        """Returns the masked over the compact models' cost, summed over the devices."""
        masked = sum(float(getattr(device.proof.masked, cost)) for device in self.devices)
        return masked / sum(float(getattr(device.proof.compact, cost)) for device in self.devices)

    @property
    def density(self) -> float:
        """Returns the mean of the devices' densities."""
        return mean(device.density for device in self.devices)

    @classmethod
    def of(cls, traffic: Mapping[Kind, Traffic], **fields: Any) -> Self:
        """Returns the results with `traffic` as their wire."""
        wire = {kind: Wire.model_validate(counted, from_attributes=True) for kind, counted in traffic.items()}
        return cls(wire=wire, **fields)


def mean(values: Iterable[float]) -> float:
    """Returns the arithmetic mean."""
    listed = list(values)
    return sum(listed) / len(listed)
