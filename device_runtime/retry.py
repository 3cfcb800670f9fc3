"""When to ask a server again: pure functions of the attempt, the answer and a random number."""

import math
import re
from dataclasses import dataclass
from datetime import UTC
from email.utils import parsedate_to_datetime

MAX_RETRY_AFTER = 86_400.0
"""No server can send a device to sleep for longer than a day."""


@dataclass(frozen=True, slots=True)
class Backoff:
    """Capped exponential backoff with full jitter: a uniform draw from 0 to min(cap, first * 2**attempt) seconds.

    Full jitter spreads clients that failed together over the whole interval, and costs the fewest calls of the usual
    variants: https://aws.amazon.com/blogs/architecture/exponential-backoff-and-jitter/
    """

    first: float = 0.5
    cap: float = 30.0
    attempts: int = 5

    def delay(self, attempt: int, draw: float, retry_after: float | None = None) -> float:
        """Returns the seconds to wait after failed 0-based `attempt`, never less than the server asked for.

        draw          uniform in [0, 1)
        retry_after   seconds the server named, None if it named none
        """
        jittered = draw * min(self.cap, self.first * 2.0 ** min(attempt, 64))
        return max(jittered, retry_after or 0.0)


def retry_after_seconds(value: str | None, now: float) -> float | None:
    """Returns the seconds a Retry-After header asks for, 0 to a day; None if it is absent or unreadable.

    value   delay-seconds or an HTTP-date (RFC 9110, section 10.2.3)
    now     seconds since the epoch, for a date
    """
    text = (value or "").strip()
    if re.fullmatch(r"[0-9]{1,12}(\.[0-9]{1,6})?", text):
        seconds = float(text)
    else:
        try:
            date = parsedate_to_datetime(text)
        except ValueError:
            return None
        # RFC 9110, section 5.6.7: an HTTP-date is in UTC; Python reads the asctime form of it without a zone
        seconds = math.ceil((date if date.tzinfo else date.replace(tzinfo=UTC)).timestamp() - now)
    return min(max(seconds, 0.0), MAX_RETRY_AFTER)
