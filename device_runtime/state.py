"""A device's state directory: what survives kill -9 between any two writes.

    lock                      held by the one process that may write here
    identity.json             server, device id and token, mode 0600
    journal.json              which of the files below count, and how far the round is (`device_runtime.journal`)
    state-N.safetensors       the model at rest, and `base` (size,): the global thresholds it has caught up to
    checkpoint-N.safetensors  the round being trained: an engine's checkpoint, and the `base` it began from
    bundle/                   the run's bundle

Every file is written beside its place, flushed to the disk and renamed into it; a state file comes before the journal
that names it, and what a journal no longer names is removed after it. So each instant on disk is one journal with all
its files: either before a write or after it.

After a round trained from global version v, `version` is v and `base` the thresholds of v, whether or not the server
counted the update: the next catch-up moves the weights by what the *global* thresholds changed since v, and replaces
the local thresholds by the global ones.
"""

import fcntl
import json
import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from types import TracebackType
from typing import IO, Any, Literal, Self, TypeAlias, TypeVar

import numpy as np
import safetensors.numpy
from numpy.typing import NDArray
from safetensors import SafetensorError

from device_runtime.errors import StateError, StateInUse
from device_runtime.journal import Identity, Journal, Progress
from spafl.bundle import Bundle, check_state
from spafl.errors import BundleError
from spafl.layout import Floats
from spafl.protocol import Lease
from spafl.record import RecordError

BASE = "base"
_JOURNAL = "journal.json"
_IDENTITY = "identity.json"
_LOCK = "lock"
_PRIVATE = 0o600

_Model = TypeVar("_Model", Identity, Journal)

Outcome = Literal["updates", "late", "local"]
"""What became of a round: counted as an update, too late for it, or trained without a server."""

Checkpoint: TypeAlias = dict[str, NDArray[Any]]
"""An engine's mid-round tensors by name: the state's, `momentum.<name>` and `active.<layer>`."""


class DeviceState:
    """The state directory at `path`, opened for writing: one process at a time, until `close`.

    Raises:
        StateInUse: another process has it open.
        StateError: it is damaged, or not a state directory.
    """

    def __init__(self, path: Path | str) -> None:
        self.path = Path(path)
        try:
            self.path.mkdir(parents=True, exist_ok=True, mode=0o700)
        except OSError as error:
            raise StateError(f"cannot use {self.path} as state directory: {error}") from error
        self._lock = _locked(self.path / _LOCK)
        try:
            self.identity = read_identity(self.path)
            self._journal = read_journal(self.path)
            self._sweep()
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        """Returns nothing; another process may open the directory from now on."""
        self._lock.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    @property
    def bundle_path(self) -> Path:
        """Returns where the run's bundle lies, or will."""
        return self.path / "bundle"

    def enrolled(self, identity: Identity) -> None:
        """Returns nothing; the device is `identity` from now on."""
        secret = {**identity.to_json(), "token": identity.token.reveal()}
        _replace(self.path / _IDENTITY, json.dumps(secret, indent=1).encode())
        self.identity = identity

    def check_owner(self, run: str, bundle: str) -> None:
        """Returns nothing if the model here is one of `run` and `bundle`, or there is none yet.

        Raises:
            StateError: the state belongs to another run or bundle.
        """
        if self._journal is not None and (self._journal.run, self._journal.bundle) != (run, bundle):
            raise StateError(
                f"{self.path} holds the model of run {self._journal.run!r}, bundle {self._journal.bundle[:12]}, not of "
                f"{run!r}, bundle {bundle[:12]}: give another --state"
            )

    def leased(self, lease: Lease) -> None:
        """Returns nothing; phase is `leased`, in the state's first round with the bundle's initial state.

        Raises:
            StateError: the state belongs to another run or bundle.
        """
        self.check_owner(lease.run, lease.bundle)
        journal = self._journal or Journal(run=lease.run, bundle=lease.bundle)
        self._commit(journal, phase="leased", lease=lease)

    def checkpointed(self, tensors: Mapping[str, NDArray[Any]], base: Floats, progress: Progress) -> None:
        """Returns nothing; phase is `training`, to be resumed from `tensors` at `progress`."""
        journal = self.journal
        name = self._save(f"checkpoint-{journal.sequence}", tensors, base)
        self._commit(journal, phase="training", checkpoint=name, progress=progress)

    def trained(self, tensors: Mapping[str, Floats], base: Floats, metrics: str) -> None:
        """Returns nothing; phase is `trained`: `tensors` are the model at rest, their thresholds the update."""
        journal, lease = self.journal, self.lease
        name = self._save(f"state-{journal.sequence}", tensors, base)
        self._commit(
            journal,
            phase="trained",
            state=name,
            version=lease.version,
            checkpoint=None,
            progress=None,
            metrics=metrics,
            trained=journal.trained + 1,
        )

    def settled(self, outcome: Outcome) -> None:
        """Returns nothing; phase is `idle`. The training stays in the weights whatever the outcome."""
        journal = self.journal
        tally = {} if outcome == "local" else {outcome: getattr(journal, outcome) + 1}
        self._commit(journal, phase="idle", lease=None, metrics=None, **tally)

    def diverged(self) -> None:
        """Returns nothing; phase is `idle` and the model as it was before the round, which is left out from now on."""
        journal = self.journal
        self._commit(
            journal,
            phase="idle",
            lease=None,
            checkpoint=None,
            progress=None,
            skip=self.lease.round,
            diverged=journal.diverged + 1,
        )

    @property
    def begun(self) -> bool:
        """Returns whether there is a model here yet: a first lease was taken."""
        return self._journal is not None

    @property
    def journal(self) -> Journal:
        """Returns the journal.

        Raises:
            StateError: no lease was ever taken.
        """
        if self._journal is None:
            raise StateError(
                f"{self.path} holds no model yet: `spafl device run` or `spafl device train` makes one"
            )
        return self._journal

    @property
    def lease(self) -> Lease:
        """Returns the lease being worked on.

        Raises:
            StateError: there is none.
        """
        if self.journal.lease is None:
            raise StateError(f"{self.path} holds no lease: its phase is {self.journal.phase}")
        return self.journal.lease

    def rest(self, bundle: Bundle) -> tuple[dict[str, Floats], Floats]:
        """Returns the model at rest: its tensors by name, and the `base` (size,) they have caught up to."""
        return read_rest(self.path, self.journal, bundle)

    def resumed(self) -> tuple[Checkpoint, Floats, Progress]:
        """Returns the checkpoint of the round being trained, the `base` it began from, and how far it is."""
        journal = self.journal
        if journal.checkpoint is None or journal.progress is None:
            raise StateError(f"{self.path} holds no checkpoint: its phase is {journal.phase}")
        tensors, base = _load(self.path / journal.checkpoint)
        return tensors, base, journal.progress

    def _save(self, stem: str, tensors: Mapping[str, NDArray[Any]], base: Floats) -> str:
        name = f"{stem}.safetensors"
        part = self.path / f"{name}.part"
        # order="C": safetensors writes the memory as it lies
        arrays = {key: np.asarray(value, order="C") for key, value in {**tensors, BASE: base}.items()}
        safetensors.numpy.save_file(arrays, part)
        _settle(part, self.path / name)
        return name

    def _commit(self, journal: Journal, **changes: Any) -> None:
        self._journal = replace(journal, **changes, sequence=journal.sequence + 1)
        _replace(self.path / _JOURNAL, self._journal.to_text(indent=1).encode())
        self._sweep()

    def _sweep(self) -> None:
        named = {self._journal.state, self._journal.checkpoint} if self._journal else set()
        for file in [*self.path.glob("*.safetensors"), *self.path.glob("*.part")]:
            if file.is_file() and file.name not in named:
                file.unlink(missing_ok=True)


def read_identity(path: Path) -> Identity | None:
    """Returns who the device at `path` is, None before it enrolled.

    Raises:
        StateError: the file is damaged.
    """
    return _read(path / _IDENTITY, Identity)


def read_journal(path: Path) -> Journal | None:
    """Returns the journal of the state directory at `path`, None before its first lease. Takes no lock.

    Raises:
        StateError: the journal is damaged, or of another format version.
    """
    return _read(path / _JOURNAL, Journal)


def read_rest(path: Path, journal: Journal, bundle: Bundle) -> tuple[dict[str, Floats], Floats]:
    """Returns the model at rest `journal` names: its tensors by name, and the `base` (size,) they have caught up to.

    Raises:
        StateError: the file is missing or damaged, or not a state of `bundle`'s model.
    """
    if bundle.id != journal.bundle:
        raise StateError(f"{path} holds a model of bundle {journal.bundle[:12]}, not {bundle.id[:12]}")
    if journal.state is None:
        initial = bundle.initial_state()
        return initial, bundle.manifest.layout.join(initial)
    tensors, base = _load(path / journal.state)
    try:
        check_state(bundle.manifest, tensors)
    except BundleError as error:
        raise StateError(
            f"{path / journal.state} is not a state of {bundle.manifest.name}: {error}"
        ) from error
    return tensors, base


def snapshot(path: Path) -> tuple[Journal, Bundle, dict[str, Floats]]:
    """Returns journal, bundle and model at rest of the state directory at `path`, while an agent may work in it.

    Raises:
        StateError: there is no model there yet, or it is damaged.
    """
    journal = read_journal(path)
    while journal is not None and (path / "bundle").is_dir():
        bundle = Bundle.open(path / "bundle")
        try:
            return journal, bundle, read_rest(path, journal, bundle)[0]
        except StateError:
            before, journal = journal, read_journal(path)
            if journal == before:  # not just an agent that replaced the file between the two readings
                raise
    raise StateError(f"{path} holds no model yet: `spafl device run` or `spafl device train` makes one")


def _read(file: Path, model: type[_Model]) -> _Model | None:
    try:
        return model.from_text(file.read_bytes())
    except FileNotFoundError:
        return None
    except OSError as error:
        raise StateError(f"cannot read {file}: {error}") from error
    except RecordError as error:
        raise StateError(
            f"{file} is damaged or of another version ({error}): restore it, or move the state directory away and "
            "enrol again"
        ) from None


def _load(file: Path) -> tuple[dict[str, NDArray[Any]], Floats]:
    try:
        tensors = safetensors.numpy.load_file(file)
        return tensors, tensors.pop(BASE)
    except (OSError, SafetensorError, KeyError, ValueError) as error:
        raise StateError(f"{file} is missing or damaged: {error}") from error


def _replace(file: Path, content: bytes) -> None:
    part = file.with_name(f"{file.name}.part")
    with os.fdopen(os.open(part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, _PRIVATE), "wb") as stream:
        stream.write(content)
    _settle(part, file)


def _settle(part: Path, file: Path) -> None:
    """Renames `part` to `file` so that a power cut leaves the old content or the new, whole."""
    _flush(part)
    part.replace(file)
    _flush(file.parent)  # the rename itself


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _locked(file: Path) -> IO[str]:
    stream = file.open("a+")
    try:
        fcntl.flock(stream, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        stream.seek(0)
        holder = stream.read(16).strip() or "another process"
        stream.close()
        raise StateInUse(
            f"{file.parent} is in use by process {holder}: two devices need two state directories"
        ) from None
    stream.truncate(0)
    stream.write(str(os.getpid()))
    stream.flush()
    return stream
