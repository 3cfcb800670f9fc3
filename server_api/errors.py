"""What the server refuses, and the problem (RFC 9457) each refusal becomes.

SpaflError
└── Refusal                  a request that is not granted: `word` ends the problem's type, `status` is HTTP's
    ├── Unauthorized         401  no token, or one nobody knows
    ├── Forbidden            403  a known token in the wrong role
    ├── NotFound             404  no such run, round, version, bundle or file
    ├── WrongState           409  a run cannot do this in its state
    ├── NameTaken            409  a run of this name has other settings
    ├── AlreadyReported      409  this round counted this device's update
    ├── UpdateDiffers        409  another update of this device was counted in this round
    ├── RunOver              410  the run is finished or stopped
    ├── RoundClosed          410  the round takes no more updates
    ├── LeaseExpired         410  the device's slot was given back
    ├── NotLeased            403  the device has no slot in this round
    ├── TooLarge             413  a body is longer than allowed
    ├── WrongMediaType       415  a body of another type than asked for
    ├── RangeNotSatisfiable  416  a byte range outside the file
    ├── BadThresholds        422  a body is not thresholds of this run
    ├── BadMetrics           422  the metrics beside an update are not what the protocol asks for
    ├── BadBundle            422  an upload is not a bundle
    ├── NotYet               503  nothing to do for this device now; the subclass says why
    │   ├── RoundFull, RunPaused, RunNotStarted
    └── StoreBusy            503  the database could not be written in time
"""

from spafl.errors import SpaflError


class Refusal(SpaflError):  # noqa: N818 - an answer, not a fault
    """A request that is not granted. Nothing changed.

    word         stable, ends the problem's `type`
    status       of the HTTP answer
    title        the same for every problem of this word
    again_later  whether the answer says when to come back (Retry-After)
    """

    word = "refused"
    status = 400
    title = "Refused"
    again_later = False

    @property
    def headers(self) -> dict[str, str]:
        """Returns the HTTP headers this answer must carry."""
        return {}


class Unauthorized(Refusal):
    """No token, or one nobody knows."""

    word, status, title = "unauthorized", 401, "Unauthorized"

    @property
    def headers(self) -> dict[str, str]:
        """Returns the challenge a 401 must carry (RFC 9110, section 11.6.1)."""
        return {"WWW-Authenticate": 'Bearer realm="spafl"'}


class Forbidden(Refusal):
    """A known token, in a role that may not do this."""

    word, status, title = "forbidden", 403, "Forbidden"


class NotFound(Refusal):
    """No such run, round, version, bundle or file."""

    word, status, title = "not-found", 404, "Not found"


class WrongState(Refusal):
    """A run cannot do what was asked in the state it is in."""

    word, status, title = "wrong-state", 409, "Impossible in this state"


class NameTaken(Refusal):
    """A run of this name exists with other settings."""

    word, status, title = "name-taken", 409, "Name taken"


class AlreadyReported(Refusal):
    """The device's update is counted in this round; the next round is for it too."""

    word, status, title, again_later = "already-reported", 409, "Already reported", True


class UpdateDiffers(Refusal):
    """Another update of this device was counted in this round: the first one stands."""

    word, status, title = "update-differs", 409, "Another update was counted"


class RunOver(Refusal):
    """The run is finished or stopped: no more rounds will come."""

    word, status, title = "run-over", 410, "Run over"


class RoundClosed(Refusal):
    """The round takes no more updates."""

    word, status, title = "round-closed", 410, "Round closed"


class LeaseExpired(Refusal):
    """The device reported after its lease ran out, and its slot was given back."""

    word, status, title = "lease-expired", 410, "Lease expired"


class NotLeased(Refusal):
    """The device has no slot in this round, or the update is another device's."""

    word, status, title = "not-leased", 403, "No lease in this round"


class TooLarge(Refusal):
    """A body is longer than allowed; it was not read."""

    word, status, title = "too-large", 413, "Content too large"


class WrongMediaType(Refusal):
    """A body of another media type than this resource takes."""

    word, status, title = "wrong-media-type", 415, "Unsupported media type"


class RangeNotSatisfiable(Refusal):
    """A byte range that is not one range within the file."""

    word, status, title = "range-not-satisfiable", 416, "Range not satisfiable"

    def __init__(self, message: str, size: int) -> None:
        super().__init__(message)
        self.size = size

    @property
    def headers(self) -> dict[str, str]:
        """Returns the file's size, which a 416 should carry (RFC 9110, section 15.5.17)."""
        return {"Content-Range": f"bytes */{self.size}"}


class BadThresholds(Refusal):
    """A body is not thresholds this run can use."""

    word, status, title = "bad-thresholds", 422, "Not thresholds of this run"


class BadMetrics(Refusal):
    """The metrics beside an update are missing or not what the protocol asks for."""

    word, status, title = "bad-metrics", 422, "Bad metrics"


class BadBundle(Refusal):
    """An upload is not a bundle, or is damaged or unsafe."""

    word, status, title = "bad-bundle", 422, "Not a bundle"


class NotYet(Refusal):
    """There is nothing for this device to do now: it should come back later."""

    status, again_later = 503, True


class RoundFull(NotYet):
    """Every slot of the round is taken."""

    word, title = "round-full", "Round full"


class RunPaused(NotYet):
    """The operator, or three failed rounds, paused the run."""

    word, title = "run-paused", "Run paused"


class RunNotStarted(NotYet):
    """The run is created but not started."""

    word, title = "run-not-started", "Run not started"


class StoreBusy(NotYet):
    """The database could not be read or written in time; nothing of the request was kept."""

    word, title = "store-busy", "Store busy"
