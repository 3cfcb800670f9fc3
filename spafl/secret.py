"""Text that is never shown."""

from typing import Any, Self

_STARS = "**********"


class Secret:
    """A token or key: printed, formatted, logged or written as JSON it is stars; only `reveal` returns it."""

    __slots__ = ("_value",)

    def __init__(self, value: str) -> None:
        self._value = value

    def __repr__(self) -> str:
        return f"Secret('{_STARS}')"

    def __str__(self) -> str:
        return _STARS

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Secret) and self._value == other._value

    def __hash__(self) -> int:
        return hash(self._value)

    def reveal(self) -> str:
        """Returns the text itself, for the header or the file it belongs in."""
        return self._value

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Returns the secret JSON `value`.

        Raises:
            ValueError: it is not text.
        """
        # and no word about what was got
        if not isinstance(value, str):
            raise ValueError("expected text")
        try:
            value.encode()
        except UnicodeEncodeError:  # it holds the text, so it is no cause either
            raise ValueError("expected text, got half a surrogate pair") from None
        return cls(value)

    def to_json(self) -> str:
        """Returns stars."""
        return _STARS
