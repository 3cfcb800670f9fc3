"""What a device remembers of itself besides tensors: who it is, and how far it is in which round."""

from dataclasses import dataclass
from typing import Annotated, Literal

from spafl.protocol import BundleId, Lease
from spafl.record import Limits, Record
from spafl.secret import Secret

Phase = Literal["idle", "leased", "training", "trained"]
"""idle -> leased -> training -> trained -> idle; a round given up goes back to idle from anywhere."""

Count = Annotated[int, Limits(ge=0)]
StateFile = Annotated[str, Limits(pattern=r"^(state|checkpoint)-[0-9]{1,16}\.safetensors$")]


@dataclass(frozen=True, kw_only=True, slots=True)
class Identity(Record):
    """A device as one server knows it. The token shows as stars wherever this is printed."""

    server: str
    device: str
    token: Secret


@dataclass(frozen=True, kw_only=True, slots=True)
class Progress(Record):
    """How far local training is: the next batch is number `batch` of epoch `epoch`, both from 0.

    seed                      of the order of the batches, kept so that a resumed epoch is the same epoch
    examples, correct, loss   of the epoch so far; loss is the sum over its examples
    dropped                   examples left out so far, because one alone has no batch statistics
    seconds                   training time so far, in all processes
    collapsed                 layers whose thresholds the collapse guard reset when the round began
    """

    seed: Count = 0
    epoch: Count = 0
    batch: Count = 0
    examples: Count = 0
    correct: Count = 0
    loss: float = 0.0
    steps: Count = 0
    dropped: Count = 0
    seconds: Annotated[float, Limits(ge=0)] = 0.0
    collapsed: tuple[str, ...] = ()


@dataclass(frozen=True, kw_only=True, slots=True)
class Journal(Record):
    """The one small file that says which of the others count; replaced as a whole, never edited.

    state        file of the model at rest; None while it is still the bundle's initial state
    version      global thresholds the model at rest has caught up to: the `base` of its next catch-up
    checkpoint   file of the round being trained; None outside `training`
    metrics      the exact `Spafl-Metrics` header of the update to report; None outside `trained`
    sequence     grows by one with each write, and numbers the files
    skip         a round this device leaves out, because training in it diverged
    trained      rounds of local training whose result is in the weights
    updates      of them, those the server took
    late         of them, those it did not: the round was closed, or had an update of this device already
    diverged     rounds undone because training left the finite numbers
    """

    format: Literal["spafl-device"] = "spafl-device"
    format_version: Literal[1] = 1
    run: str
    bundle: BundleId
    phase: Phase = "idle"
    state: StateFile | None = None
    version: Count = 0
    lease: Lease | None = None
    checkpoint: StateFile | None = None
    progress: Progress | None = None
    metrics: str | None = None
    sequence: Count = 0
    skip: int | None = None
    trained: Count = 0
    updates: Count = 0
    late: Count = 0
    diverged: Count = 0
