"""Records: the frozen dataclasses that JSON is read into, strictly, and written from.

A record's annotations say everything: `Annotated[float, Limits(gt=0, le=10)]`. It is checked whenever one is made, from
JSON or in code. FastAPI reads the same classes through pydantic and describes them in OpenAPI; devices do without it:
importing it and building its models takes them 16 MB, and a third of their start.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import MISSING, Field, fields
from typing import Any, ClassVar, Self, get_type_hints

from spafl.reader import Limits, Reader, RecordError, got, reader_of

__all__ = ["Limits", "Record", "RecordError", "parsed_json"]


class Record:
    """What a frozen, keyword-only dataclass inherits from, so that its fields are what their annotations say.

    Lists become tuples and whole numbers floats where those are wanted; nothing else is converted.
    """

    __slots__ = ()
    __pydantic_config__: ClassVar[Mapping[str, Any]] = {
        "extra": "forbid",
        "strict": True,
        "allow_inf_nan": False,
    }

    @classmethod
    def __get_pydantic_core_schema__(
        cls, source: Any, handler: Callable[[Any], dict[str, Any]]
    ) -> dict[str, Any]:
        # strict in its fields, but made from an object: FastAPI hands over parsed JSON, never an instance
        return {**handler(source), "strict": False}

    def __post_init__(self) -> None:
        name = ""
        try:
            for name, reader in _readers(type(self)).items():
                given = getattr(self, name)
                value = reader(given)
                if value is not given:
                    object.__setattr__(self, name, value)
        except RecordError as error:
            error.under(name)
            raise
        try:
            self.check()
        except RecordError:
            raise
        except ValueError as error:
            raise RecordError(str(error)) from error

    def check(self) -> None:
        """Returns nothing if the fields agree with each other.

        Raises:
            ValueError: saying which do not.
        """

    @classmethod
    def from_json(cls, value: Any) -> Self:
        """Returns the record in `value`, an object as JSON has it.

        Raises:
            RecordError: fields are unknown, missing or not what they should be.
        """
        if not isinstance(value, dict):
            raise RecordError(f"expected an object, got {got(value)}")
        known = _readers(cls)
        if missing := [name for name in _required(cls) if name not in value]:
            raise RecordError("missing", (missing[0],))
        unknown = [name for name in value if name not in known]
        if unknown and cls.__pydantic_config__["extra"] == "forbid":
            raise RecordError("unknown field", (str(unknown[0])[:80],))
        return cls(**{name: value[name] for name in known if name in value})

    @classmethod
    def from_text(cls, text: bytes | str) -> Self:
        """Returns the record in JSON `text`; bytes are UTF-8.

        Raises:
            RecordError: it is not JSON, or not such a record.
        """
        return cls.from_json(parsed_json(text))

    def to_json(self) -> dict[str, Any]:
        """Returns the record as JSON has it: objects, lists, text and numbers."""
        return {name: _plain(getattr(self, name)) for name in _readers(type(self))}

    def present(self) -> dict[str, Any]:
        """Returns `to_json` without the fields that are null."""
        return {name: value for name, value in self.to_json().items() if value is not None}

    def to_text(self, indent: int | None = None) -> str:
        """Returns the record as JSON text, without spaces or indented."""
        separators = (",", ":") if indent is None else None
        return json.dumps(
            self.to_json(), indent=indent, separators=separators, ensure_ascii=False, allow_nan=False
        )


def parsed_json(text: bytes | str) -> Any:
    """Returns the value in JSON `text`; bytes are UTF-8.

    Raises:
        RecordError: it is not JSON, or nested too deeply.
    """
    try:
        # decoded here: left to itself, json takes UTF-16 and UTF-32 as well
        return json.loads(text.decode() if isinstance(text, bytes) else text)
    except RecursionError:
        problem = "not JSON: nested too deeply"
    except ValueError as error:
        problem = f"not JSON: {getattr(error, 'msg', None) or type(error).__name__}"
    raise RecordError(problem)  # not from the error above: that one holds the text, which may hold a secret


def _plain(value: Any) -> Any:
    if value is None or isinstance(value, str | int | float):
        return value
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(item) for item in value]
    return value.to_json()


_READERS: dict[type[Record], dict[str, Reader]] = {}
"""By record, made when the first one is: annotations are looked at once."""


def _readers(kind: type[Record]) -> dict[str, Reader]:
    if kind not in _READERS:
        hints = get_type_hints(kind, include_extras=True)
        _READERS[kind] = {field.name: reader_of(hints[field.name]) for field in _fields(kind)}
    return _READERS[kind]


def _fields(kind: Any) -> tuple[Field[Any], ...]:
    return fields(kind)


def _required(kind: type[Record]) -> list[str]:
    return [
        field.name for field in _fields(kind) if field.default is MISSING and field.default_factory is MISSING
    ]
