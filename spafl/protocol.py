"""The JSON both ends of the protocol speak: one model per message, the same words as PROTOCOL.md.

Times are seconds since the Unix epoch (float, UTC); durations are seconds.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Annotated, Any, ClassVar, Literal

from spafl.hyperparameters import Hyperparameters
from spafl.record import Limits, Record

PREFIX = "/v1"
METRICS_HEADER = "Spafl-Metrics"
"""Carries `Metrics` as one line of JSON beside an update's thresholds."""

RunState = Literal["created", "running", "paused", "finished", "stopped"]
RoundState = Literal["open", "aggregated", "failed"]
EventKind = Literal[
    "run.created",
    "run.started",
    "run.paused",
    "run.resumed",
    "run.stopped",
    "run.finished",
    "round.opened",
    "round.extended",
    "round.aggregated",
    "round.failed",
    "lease.granted",
    "lease.expired",
    "update.accepted",
]
Name = Annotated[str, Limits(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]{0,63}$")]
BundleId = Annotated[str, Limits(pattern=r"^[0-9a-f]{64}$")]
Seconds = Annotated[float, Limits(ge=0, le=1e12)]


@dataclass(
    frozen=True, kw_only=True
)  # no slots: pydantic puts the members it does not know beside the fields
class Problem(Record):
    """An error as RFC 9457 problem+json; `type` ends in a stable word, `detail` says what to do next."""

    __pydantic_config__: ClassVar[Mapping[str, Any]] = {**Record.__pydantic_config__, "extra": "allow"}

    type: str
    title: str
    status: int
    detail: str
    retry_after: float | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class Capabilities(Record):
    """What a device says about itself when it enrols or checks in."""

    engine: Annotated[str, Limits(max_length=64)] = "onnx"
    platform: Annotated[str, Limits(max_length=64)] = ""
    version: Annotated[str, Limits(max_length=64)] = ""


@dataclass(frozen=True, kw_only=True, slots=True)
class EnrolmentRequest(Record):
    """Body of POST /v1/devices, sent with an enrolment key as bearer token."""

    name: Name | None = None
    capabilities: Capabilities = Capabilities()


@dataclass(frozen=True, kw_only=True, slots=True)
class Enrolment(Record):
    """A new device: its id, and its token, shown this once."""

    device: str
    token: str = field(repr=False)


@dataclass(frozen=True, kw_only=True, slots=True)
class Policy(Record):
    """Conditions under which a device may train; a reading a device does not have counts as met."""

    min_battery_percent: Annotated[float, Limits(ge=0, le=100)] = 0
    require_charging: bool = False
    require_unmetered: bool = False
    require_idle: bool = False
    max_temperature_celsius: Annotated[float, Limits(ge=0, le=150)] | None = None


@dataclass(frozen=True, kw_only=True, slots=True)
class RunSettings(Record):
    """What an operator decides about a run.

    rounds           aggregations until the run is finished
    target           updates that close a round
    minimum          updates a round needs at its deadline (None: half of target, rounded up)
    over_selection   leases are granted up to ceil(over_selection * target)
    deadline         seconds a round stays open; extended once if fewer than minimum reported, then failed
    lease            seconds a device has to report; then its slot reopens
    weighting        "examples": mean weighted by example counts; "plain": the paper's mean
    precision        of the thresholds on the wire, both ways
    """

    name: Name
    bundle: BundleId
    rounds: Annotated[int, Limits(ge=1, le=100_000)] = 15
    target: Annotated[int, Limits(ge=1, le=100_000)] = 5
    minimum: Annotated[int, Limits(ge=1, le=100_000)] | None = None
    over_selection: Annotated[float, Limits(ge=1, le=10)] = 1.0
    deadline: Annotated[float, Limits(gt=0, le=30 * 86_400)] = 600.0
    lease: Annotated[float, Limits(gt=0, le=30 * 86_400)] = 300.0
    weighting: Literal["examples", "plain"] = "examples"
    precision: Literal["f32", "f16"] = "f32"
    hyperparameters: Hyperparameters = Hyperparameters()  # noqa: RUF009 - it is frozen
    policy: Policy = Policy()

    @property
    def least(self) -> int:
        """Returns the updates a round needs at its deadline, the default worked in."""
        return (self.target + 1) // 2 if self.minimum is None else self.minimum

    def check(self) -> None:
        """Returns nothing if the minimum is within the target."""
        if self.least > self.target:
            raise ValueError(f"minimum {self.minimum} is more than target {self.target}")


@dataclass(frozen=True, kw_only=True, slots=True)
class LeaseRequest(Record):
    """Body of a check-in: the global version the device has, and what it runs on."""

    version: Annotated[int, Limits(ge=0)] | None = None
    capabilities: Capabilities = Capabilities()


@dataclass(frozen=True, kw_only=True, slots=True)
class Lease(Record):
    """A device's slot in a round, its own until `expires`.

    version           global thresholds to catch up to before training
    hyperparameters   in force this round, schedules worked in
    """

    run: str
    round: int
    version: int
    bundle: BundleId
    layout: str
    expires: Seconds
    deadline: Seconds
    rounds: int
    precision: Literal["f32", "f16"]
    hyperparameters: Hyperparameters
    policy: Policy


@dataclass(frozen=True, kw_only=True, slots=True)
class Metrics(Record):
    """All a device tells about its training besides thresholds.

    examples   local training examples used; the aggregation weight under "examples"
    loss       mean task loss over the last epoch; accuracy on its held-out examples, None without any
    density    share of active filters by layer, in layout order
    seconds    local training time
    """

    examples: Annotated[int, Limits(ge=1, le=10**9)]
    loss: Annotated[float, Limits(ge=-1e6, le=1e6)] | None = None
    accuracy: Annotated[float, Limits(ge=0, le=1)] | None = None
    density: Annotated[tuple[Annotated[float, Limits(ge=0, le=1)], ...], Limits(max_length=4096)] = ()
    steps: Annotated[int, Limits(ge=0, le=10**9)] | None = None
    seconds: Annotated[float, Limits(ge=0, le=1e9)] | None = None
    collapsed: Annotated[tuple[Annotated[str, Limits(max_length=256)], ...], Limits(max_length=4096)] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RoundView(Record):
    """A round as operators see it: its devices start from `version`; aggregated, it makes `version + 1`."""

    run: str
    round: int
    state: RoundState
    version: int
    opened: Seconds
    deadline: Seconds
    closed: Seconds | None = None
    extended: bool = False
    leased: int
    reported: int
    target: int
    minimum: int
    reason: str | None = None
    loss: float | None = None
    accuracy: float | None = None
    density: tuple[float, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class RunView(Record):
    """A run as operators and devices see it."""

    run: str
    settings: RunSettings
    state: RunState
    layout: str
    round: int | None
    version: int
    created: Seconds
    rounds_done: int
    rounds_failed: int


@dataclass(frozen=True, kw_only=True, slots=True)
class BundleView(Record):
    """A bundle the server holds."""

    id: BundleId
    name: str
    layout: str
    thresholds: int
    bytes: int
    created: Seconds


@dataclass(frozen=True, kw_only=True, slots=True)
class DeviceView(Record):
    """A device as operators see it; never its token."""

    device: str
    name: str | None
    created: Seconds
    last_seen: Seconds | None
    capabilities: Capabilities
    updates: int


@dataclass(frozen=True, kw_only=True, slots=True)
class Event(Record):
    """Something that happened in a run; `id` grows by one per event and resumes a stream (Last-Event-ID)."""

    id: int
    time: Seconds
    run: str
    kind: EventKind
    round: int | None = None
    device: str | None = None
    data: dict[str, int | float | str | bool | list[float] | None] = field(default_factory=dict)


@dataclass(frozen=True, kw_only=True, slots=True)
class Versions(Record):
    """What runs where: package name -> version."""

    spafl: str
    protocol: str
    python: str
    packages: dict[str, str]
