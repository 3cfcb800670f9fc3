"""A file somebody wants to know about: read within bounds, and the proof that lies beside a model."""

from pathlib import Path
from typing import Any

from spafl.errors import SpaflError
from spafl.proof import PROOF, Proof
from spafl.record import RecordError

MAX_MODEL_BYTES = 1 << 30
MAX_PROOF_BYTES = 1 << 20

Facts = dict[str, Any]
"""What `spafl inspect --json` prints: plain JSON values by name, the names of docs/inspect.md."""


class InspectError(SpaflError):
    """A file is not what it is taken for, is damaged or too large. Nothing of it was run."""


def read_bounded(path: Path, limit: int) -> bytes:
    """Returns the content of the file at `path`, at most `limit` bytes of it.

    Raises:
        InspectError: no plain file there, longer than `limit`, or it cannot be read.
    """
    if not path.is_file():  # a device or a pipe would never end
        raise InspectError(f"no file at {path}: give a bundle, a .onnx or a .pte")
    try:
        with path.open("rb") as stream:
            data = stream.read(limit + 1)
    except OSError as error:
        raise InspectError(f"cannot read {path}: {error.strerror or error}") from error
    if len(data) > limit:
        raise InspectError(
            f"{path} has {path.stat().st_size:,} bytes, expected at most {limit:,}: not read further"
        )
    return data


def proof_beside(path: Path, size: int) -> tuple[Facts | None, str | None]:
    """Returns the proof that lies beside the model at `path`, None if none does; and what is wrong with it, or None.

    size   of the model's file: a proof of another one is told to be so, not shown as this one's
    """
    for file in (path.with_name(f"{path.stem}.{PROOF}"), path.with_name(PROOF)):
        if not file.is_file():
            continue
        try:
            proof = Proof.from_text(read_bounded(file, MAX_PROOF_BYTES))
        except RecordError:
            return None, f"{file.name} beside it is not a proof this version reads"
        except InspectError as error:
            return None, str(error)
        proven = proof.precision.bytes if proof.precision else proof.compact.bytes
        if proven != size:
            return None, f"{file.name} beside it is of another model, of {proven:,} bytes"
        return proof.to_json(), None
    return None, None
