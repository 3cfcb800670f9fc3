"""Errors of the device room, one branch of `spafl.errors.SpaflError`.

DeviceError               anything that keeps this device from its work
├── StateError            the state directory is damaged, of another version, or not what was asked for
│   └── StateInUse        another process works in the state directory
├── DataError             the local examples cannot be read, or do not fit the model
├── Diverged              local training left the finite numbers; the state before the round is kept
├── Stopped               a signal asked this process to stop; everything done so far is on disk
└── ServerError           the server's answer, or that there was none
    ├── Unreachable       no usable answer after all retries: try again at the next window
    ├── BadAnswer         an answer that breaks the protocol: too large, not JSON, a wrong hash
    ├── Unauthorised      401, 403: the token or key is unknown, or has another role
    ├── NotFound          404: no such run, bundle or version
    ├── Busy              409, 503 with Retry-After: nothing to do now, come back later
    ├── RunOver           410: the run is finished or stopped
    └── Refused           a request the server will never take
        ├── NotLeased     403: this device holds no lease of that round
        ├── RoundClosed   410: the round closed, or the lease expired, before the update came
        └── UpdateDiffers 409: this round already counted another update of this device
"""

# ruff: noqa: N818 - named for what happened, as the protocol names it: RoundClosed, not RoundClosedError
from spafl.errors import SpaflError


class DeviceError(SpaflError):
    """Something keeps this device from its work."""


class StateError(DeviceError):
    """A state directory is damaged, of another version, or belongs to something else."""


class StateInUse(StateError):
    """Another process works in this state directory."""


class DataError(DeviceError):
    """Local examples cannot be read, or do not fit the model."""


class Diverged(DeviceError):
    """Local training produced NaN or infinity. Nothing of that round is kept."""


class Stopped(DeviceError):
    """A signal asked this process to stop, and it does: its state is on disk."""


class ServerError(DeviceError):
    """What a server answered, or that it did not.

    retry_after   seconds the server asks to wait, None if it names none
    """

    def __init__(self, text: str, retry_after: float | None = None) -> None:
        super().__init__(text)
        self.retry_after = retry_after


class Unreachable(ServerError):
    """No usable answer after all retries."""


class BadAnswer(ServerError):
    """An answer that breaks the protocol. Nothing of it was used."""


class Unauthorised(ServerError):
    """The token or enrolment key is unknown to the server, or may not do this."""


class NotFound(ServerError):
    """The server has no such run, bundle, file or version."""


class Busy(ServerError):
    """There is nothing for this device to do now; `retry_after` says when there may be."""


class RunOver(ServerError):
    """The run is finished or stopped: there will be no more rounds."""


class Refused(ServerError):
    """The server will never take this request as it is."""


class NotLeased(Refused):
    """This device holds no lease of the round it reports to."""


class RoundClosed(Refused):
    """The round closed, or this device's lease expired, before its update arrived."""


class UpdateDiffers(Refused):
    """The round already counted an update of this device, with other bytes."""
