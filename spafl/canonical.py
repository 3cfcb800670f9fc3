"""One spelling for one JSON value, so that its hash is an identity."""

import hashlib
import json
import math
from typing import Any


def canonical_json(value: Any) -> bytes:
    """Returns `value` as UTF-8 JSON with sorted keys, no spaces and whole floats written as integers.

    For the values we hash this is what RFC 8785 (JSON Canonicalization Scheme) prescribes, so clients in other
    languages get the same bytes: floats must be finite and either 0 or of magnitude 1e-4..1e15, the range in which
    Python and ECMAScript write the same shortest digits.

    Raises:
        ValueError: a float outside that range, or a key that is not a string.
    """
    return json.dumps(
        _plain(value), sort_keys=True, separators=(",", ":"), ensure_ascii=False, allow_nan=False
    ).encode()


def sha256_hex(data: bytes) -> str:
    """Returns the SHA-256 of `data` as 64 lower-case hex digits (FIPS 180-4)."""
    return hashlib.sha256(data).hexdigest()


def _plain(value: Any) -> Any:
    if isinstance(value, float):
        if not math.isfinite(value) or (value and not 1e-4 <= abs(value) <= 1e15):
            raise ValueError(
                f"{value!r} has no canonical spelling: expected 0 or a magnitude of 1e-4 to 1e15"
            )
        return int(value) if value.is_integer() else value
    if isinstance(value, dict):
        if not all(isinstance(key, str) for key in value):
            raise ValueError("canonical JSON needs string keys")
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value
