"""How a JSON value is read: annotations made into functions that return the value, or say what is wrong with it."""

import math
import operator
import re
from collections.abc import Callable, Iterable, Sequence
from itertools import repeat
from types import NoneType, UnionType
from typing import Annotated, Any, Literal, TypeAlias, Union, get_args, get_origin

from spafl.errors import SpaflError

Reader: TypeAlias = Callable[[Any], Any]

_TYPES = {bool: "true or false", int: "a whole number", float: "a number", str: "text", NoneType: "null"}
_GOT = {**_TYPES, list: "a list", tuple: "a list", dict: "an object"}


class RecordError(ValueError):
    """A value is not the record expected: `problem` in words, and the `path` of fields that leads there.

    Only values that broke a limit of their field are quoted: what is of a wrong type may be a secret gone astray.
    """

    def __init__(self, problem: str, path: tuple[str, ...] = ()) -> None:
        super().__init__(problem)
        self.problem = problem
        self.path = path

    def __str__(self) -> str:
        return f"{'.'.join(self.path)}: {self.problem}" if self.path else self.problem

    def under(self, name: object) -> None:
        """Returns nothing; the path now begins with `name`."""
        self.path = (str(name)[:80], *self.path)


class Limits:
    """What a field allows beyond its type, in pydantic's words; `pattern` must match from end to end."""

    def __init__(
        self,
        *,
        ge: float | None = None,
        gt: float | None = None,
        le: float | None = None,
        lt: float | None = None,
        multiple_of: int | None = None,
        min_length: int | None = None,
        max_length: int | None = None,
        pattern: str | None = None,
    ) -> None:
        named = {"ge": ge, "gt": gt, "le": le, "lt": lt, "multiple_of": multiple_of}
        named |= {"min_length": min_length, "max_length": max_length}
        self._limits = {name: limit for name, limit in named.items() if limit is not None}
        self._checks = [(*_LIMITS[name], limit) for name, limit in self._limits.items()]
        self._pattern = pattern

    def __get_pydantic_core_schema__(
        self, source: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        pattern = {} if self._pattern is None else {"pattern": self._pattern}
        return {**handler(source), **self._limits, **pattern}

    def check(self, value: Any) -> None:
        """Returns nothing if `value`, of the right type, keeps to them all.

        Raises:
            RecordError: naming the first that it breaks.
        """
        for holds, words, limit in self._checks:
            if not holds(value, limit):
                broken = len(value) if "length" in words else value
                raise RecordError(f"expected {words} {limit}, got {broken!r:.40}")
        if self._pattern is not None and not re.fullmatch(self._pattern, value):
            raise RecordError(f"expected text like {self._pattern}, got {value[:80]!r}")


_LIMITS: dict[str, tuple[Callable[[Any, Any], bool], str]] = {
    "ge": (operator.ge, "at least"),
    "gt": (operator.gt, "more than"),
    "le": (operator.le, "at most"),
    "lt": (operator.lt, "less than"),
    "multiple_of": (lambda value, limit: value % limit == 0, "a multiple of"),
    "min_length": (lambda value, limit: len(value) >= limit, "a length of at least"),
    "max_length": (lambda value, limit: len(value) <= limit, "a length of at most"),
}


def reader_of(kind: Any) -> Reader:
    """Returns what turns a value into one of the annotation `kind`, or raises RecordError."""
    origin, arguments = get_origin(kind), get_args(kind)
    if origin is Annotated:
        return _limited(reader_of(arguments[0]), [mark for mark in arguments[1:] if isinstance(mark, Limits)])
    if origin is Literal:
        return _one_of(arguments)
    if origin in (Union, UnionType):
        return _any_of(arguments)
    if origin is dict:
        return _object(reader_of(arguments[0]), reader_of(arguments[1]))
    if origin is list:
        return _list(list, reader_of(arguments[0]))
    if origin is tuple and arguments[-1] is ...:
        return _list(tuple, reader_of(arguments[0]))
    if origin is tuple:
        return _tuple([reader_of(argument) for argument in arguments])
    if kind in _TYPES:
        return {float: _float, str: _str}.get(kind, _exact(kind))
    return _spoken(kind)


def got(value: Any) -> str:
    """Returns what kind of value it is, in words, and nothing of what it holds."""
    return next((words for kind, words in _GOT.items() if isinstance(value, kind)), type(value).__name__)


def _exact(kind: type) -> Reader:
    def reader(value: Any) -> Any:
        if isinstance(value, kind) and (kind is bool or not isinstance(value, bool)):
            return value
        raise RecordError(f"expected {_TYPES[kind]}, got {got(value)}")

    return reader


def _float(value: Any) -> float:
    if not isinstance(value, float | int) or isinstance(value, bool):
        raise RecordError(f"expected a number, got {got(value)}")
    try:
        number = float(value)
    except OverflowError:
        number = math.inf
    if not math.isfinite(number):
        raise RecordError("expected a finite number")
    return number


def _str(value: Any) -> str:
    if not isinstance(value, str):
        raise RecordError(f"expected text, got {got(value)}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError:  # JSON can spell half a surrogate pair, UTF-8 cannot
            raise RecordError("expected text, got half a surrogate pair") from None
    return value


def _limited(reader: Reader, every: list[Limits]) -> Reader:
    def limited(value: Any) -> Any:
        value = reader(value)
        for limits in every:
            limits.check(value)
        return value

    return limited


def _one_of(allowed: tuple[Any, ...]) -> Reader:
    def reader(value: Any) -> Any:
        if any(type(value) is type(choice) and value == choice for choice in allowed):
            return value
        raise RecordError(f"expected {' or '.join(map(repr, allowed))}, got {_quoted(value)}")

    return reader


def _quoted(value: Any) -> str:
    return f"{value[:40]!r}" if isinstance(value, str) else got(value)


def _any_of(kinds: tuple[Any, ...]) -> Reader:
    readers = [reader_of(kind) for kind in kinds if kind is not NoneType]
    nullable = NoneType in kinds

    def reader(value: Any) -> Any:
        if value is None and nullable:
            return None
        if len(readers) == 1:  # its own error says more
            return readers[0](value)
        for each in readers:
            try:
                return each(value)
            except RecordError:
                continue
        raise RecordError(f"{got(value)} is not among the types allowed here")

    return reader


def _object(keys: Reader, values: Reader) -> Reader:
    def reader(value: Any) -> dict[Any, Any]:
        if not isinstance(value, dict):
            raise RecordError(f"expected an object, got {got(value)}")
        made, key = {}, None
        try:
            for key, item in value.items():
                made[keys(key)] = values(item)
        except RecordError as error:
            error.under(key)
            raise
        return made

    return reader


def _list(make: type, every: Reader) -> Reader:
    def reader(value: Any) -> Any:
        if not isinstance(value, list | tuple):
            raise RecordError(f"expected a list, got {got(value)}")
        return make(_items(repeat(every, len(value)), value))

    return reader


def _tuple(each: list[Reader]) -> Reader:
    def reader(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple):
            raise RecordError(f"expected a list, got {got(value)}")
        if len(value) != len(each):
            raise RecordError(f"expected {len(each)} items, got {len(value)}")
        return tuple(_items(each, value))

    return reader


def _items(readers: Iterable[Reader], values: Sequence[Any]) -> list[Any]:
    made: list[Any] = []
    try:
        for reader, value in zip(readers, values, strict=True):
            made.append(reader(value))
    except RecordError as error:
        error.under(len(made))
        raise
    return made


def _spoken(kind: Any) -> Reader:
    """Returns the reader of a class that has its own JSON: `from_json` and `to_json`."""

    def reader(value: Any) -> Any:
        if isinstance(value, kind):
            return value
        try:
            return kind.from_json(value)
        except RecordError:
            raise
        except (SpaflError, ValueError) as error:
            raise RecordError(str(error)) from error

    return reader
