"""Byte ranges (RFC 9110, section 14): one range per request."""

import re

from server_api.errors import RangeNotSatisfiable

_RANGE = re.compile(r"bytes=(\d{1,18})?-(\d{1,18})?", re.ASCII)


def check_range(header: str, size: int) -> None:
    """Returns nothing if `header` asks for one range that begins within a file of `size` bytes.

    Raises:
        RangeNotSatisfiable: anything else; several ranges among it, which no client of ours needs.
    """
    found = _RANGE.fullmatch(header.strip())
    first, last = found.groups() if found else (None, None)
    if first is not None:
        good = int(first) < size and (last is None or int(first) <= int(last))
    else:
        good = last is not None and int(last) > 0 and size > 0
    if not good:
        raise RangeNotSatisfiable(f"range {header[:80]!r} is not one range within {size} bytes", size)
