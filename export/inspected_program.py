"""An ExecuTorch program in figures: its methods, what they take and return, and what runs them.

The file is read as the flatbuffer it is, by its published schema (executorch/schema/program.fbs), without ExecuTorch:
nothing of it is loaded, let alone run, and no offset in it is followed out of it.
"""

import struct
from collections import Counter
from pathlib import Path
from typing import Any

from export.inspected_file import MAX_MODEL_BYTES, Facts, InspectError, proof_beside, read_bounded

MAX_METHODS = 64
MAX_VALUES = 4096
"""Inputs, or outputs, of a method."""
MAX_TABLES = 1_000_000
"""Instructions, operators, values ... of a whole file, each counted as often as it is referred to."""

# ExecuTorch's ScalarType (executorch/schema/scalar_type.fbs)
_DTYPES = ("uint8", "int8", "int16", "int32", "int64", "float16", "float32", "float64")
_BOOL = 11
# KernelTypes and InstructionArguments, unions of the schema: 0 is none, then in its order
_TENSOR, _KERNEL_CALL, _DELEGATE_CALL = 5, 1, 2
_KINDS = (
    "none",
    "null",
    "int",
    "bool",
    "float",
    "tensor",
    "string",
    "ints",
    "floats",
    "bools",
    "tensors",
    "tensors",
)


def program_facts(path: Path) -> Facts:
    """Returns what is to be known of the .pte file at `path`.

    Raises:
        InspectError: it is not an ExecuTorch program, damaged, or larger than 1 GiB.
    """
    data = read_bounded(path, MAX_MODEL_BYTES)
    if len(data) < 8 or data[4:6] != b"ET":
        raise InspectError(
            f"{path} is not an ExecuTorch program: expected 'ET..' as bytes 4 to 7, got {data[4:8]!r}"
        )
    proof, doubt = proof_beside(path, len(data))
    try:
        buffer, segments = _buffer(data)
        program = buffer.table(buffer.unpack("I", 0))
        methods = [_method(plan) for plan in program.tables(1, MAX_METHODS)]
        facts = {
            "kind": "executorch",
            "path": str(path),
            "bytes": len(data),
            "schema": data[4:8].decode("ascii"),
            "version": program.number(0, "I"),
            "release": _release(proof),
            "methods": methods,
            "program_bytes": len(buffer),
            "segment_bytes": segments,
        }
    except (struct.error, UnicodeDecodeError, _Damaged) as error:
        raise InspectError(f"{path} is a damaged or truncated ExecuTorch program: {error}") from None
    return {**facts, "proof": proof, "notes": [doubt] if doubt else []}


class _Damaged(Exception):  # noqa: N818 - caught above, and told as an InspectError
    """An offset, length or index leads out of the file, or more of something than there can be."""


class _Buffer:
    """The bytes of a flatbuffer, and how many more tables of it may be looked at."""

    def __init__(self, data: memoryview) -> None:
        self._data, self._left = data, MAX_TABLES

    def __len__(self) -> int:
        return len(self._data)

    def unpack(self, form: str, at: int) -> int:
        """Returns the scalar of struct's format `form` at byte `at`."""
        if at < 0:  # which struct takes for a place counted from the end
            raise _Damaged("an offset leads out of it")
        number: int = struct.unpack_from("<" + form, self._data, at)[0]
        return number

    def text(self, start: int, length: int) -> str:
        """Returns the text of so many bytes; it counts as parts too, or a small file could hold gigabytes of names."""
        self._spend(length // 16)
        return bytes(self._data[start : start + length]).decode()

    def table(self, at: int) -> "_Table":
        """Returns the table at byte `at`."""
        self._spend(1)
        return _Table(self, at)

    def _spend(self, parts: int) -> None:
        self._left -= parts
        if self._left < 0:
            raise _Damaged(f"more than {MAX_TABLES:,} parts")


class _Table:
    """A flatbuffer table at byte `at`: https://flatbuffers.dev/internals."""

    def __init__(self, buffer: _Buffer, at: int) -> None:
        self._buffer, self._at = buffer, at
        self._vtable = at - buffer.unpack("i", at)
        self._fields = (buffer.unpack("H", self._vtable) - 4) // 2

    def number(self, field: int, form: str) -> int:
        """Returns a scalar field of struct's format `form`; 0, its default, where it is not there."""
        at = self._place(field)
        return 0 if at is None else self._buffer.unpack(form, at)

    def table(self, field: int) -> "_Table | None":
        """Returns the table a field refers to; None where it is not there."""
        at = self._place(field)
        return None if at is None else self._buffer.table(at + self._buffer.unpack("I", at))

    def text(self, field: int) -> str:
        """Returns a string field, "" where it is not there."""
        start, length = self._vector(field, 1, 4096)
        return self._buffer.text(start, length)

    def numbers(self, field: int, form: str, most: int) -> list[int]:
        """Returns a vector of scalars, at most `most` of them."""
        size = struct.calcsize("<" + form)
        start, length = self._vector(field, size, most)
        return [self._buffer.unpack(form, start + size * i) for i in range(length)]

    def tables(self, field: int, most: int) -> list["_Table"]:
        """Returns a vector of tables, at most `most` of them."""
        start, length = self._vector(field, 4, most)
        return [self._element(start, i) for i in range(length)]

    def pick(self, field: int, indices: list[int]) -> list["_Table"]:
        """Returns the tables at `indices` of a vector."""
        start, length = self._vector(field, 4, MAX_TABLES)
        if not all(0 <= index < length for index in indices):
            raise _Damaged("an input or output is none of the method's values")
        return [self._element(start, index) for index in indices]

    def _element(self, start: int, index: int) -> "_Table":
        at = start + 4 * index
        return self._buffer.table(at + self._buffer.unpack("I", at))

    def _vector(self, field: int, size: int, most: int) -> tuple[int, int]:
        at = self._place(field)
        if at is None:
            return 0, 0
        start = at + self._buffer.unpack("I", at)
        length = self._buffer.unpack("I", start)
        if length > most or start + 4 + size * length > len(self._buffer):
            raise _Damaged(f"a list of {length:,} at byte {start:,}")
        return start + 4, length

    def _place(self, field: int) -> int | None:
        offset = self._buffer.unpack("H", self._vtable + 4 + 2 * field) if field < self._fields else 0
        return self._at + offset if offset else None


def _buffer(data: bytes) -> tuple[_Buffer, int]:
    """Returns the part of a file that is the flatbuffer, and the bytes behind it: constants, delegates' data.

    Where there are some, a header after the first 8 bytes says where they begin:
    `eh00`, its length, u64 size of the flatbuffer, u64 offset of the first segment.
    """
    if data[8:12] != b"eh00":
        return _Buffer(memoryview(data)), 0
    length, size, segments = struct.unpack_from("<IQQ", data, 12)
    if length < 24 or not 8 <= size <= len(data) or segments > len(data):
        raise _Damaged(f"its header tells of {size:,} bytes of program, {len(data):,} are there")
    return _Buffer(memoryview(data)[:size]), len(data) - segments if segments else 0


def _method(plan: _Table) -> Facts:
    """Returns an ExecutionPlan's name, inputs, outputs, operators with their counts, and memory."""
    names = [
        ".".join(filter(None, (operator.text(0), operator.text(1))))
        for operator in plan.tables(6, MAX_VALUES)
    ]
    backends = [delegate.text(0) for delegate in plan.tables(7, MAX_VALUES)]
    operators: Counter[str] = Counter()
    delegates: Counter[str] = Counter()
    for chain in plan.tables(5, MAX_VALUES):
        for instruction in chain.tables(2, MAX_TABLES):
            kind, called = instruction.number(0, "B"), instruction.table(1)
            if called is not None and kind in (_KERNEL_CALL, _DELEGATE_CALL):
                known, counts = (names, operators) if kind == _KERNEL_CALL else (backends, delegates)
                index = called.number(0, "i")
                if not 0 <= index < len(known):
                    raise _Damaged(f"it calls operator {index} of {len(known)}")
                counts[known[index]] += 1
    return {
        "name": plan.text(0),
        "inputs": _values(plan, 3),
        "outputs": _values(plan, 4),
        "operators": dict(sorted(operators.items())),
        "delegates": dict(sorted(delegates.items())),
        "memory_bytes": sum(plan.numbers(8, "q", MAX_VALUES)),
    }


def _values(plan: _Table, field: int) -> list[Facts]:
    return [_value(value) for value in plan.pick(2, plan.numbers(field, "i", MAX_VALUES))]


def _value(value: _Table) -> Facts:
    """Returns dtype and shape of an EValue; a shape that varies is its largest. What is no tensor has no shape."""
    kind, tensor = value.number(0, "B"), value.table(1)
    if kind != _TENSOR or tensor is None:
        return {
            "dtype": _KINDS[kind] if kind < len(_KINDS) else f"type {kind}",
            "shape": None,
            "varies": False,
        }
    number = tensor.number(0, "b")
    return {
        "dtype": _DTYPES[number]
        if 0 <= number < len(_DTYPES)
        else "bool"
        if number == _BOOL
        else f"type {number}",
        "shape": tensor.numbers(2, "i", 64),
        "varies": tensor.number(8, "b") != 0,
    }


def _release(proof: Facts | None) -> str | None:
    """Returns the release of ExecuTorch that ran the program for its proof: the file itself does not say any."""
    runtime: Any = proof["runtime"] if proof else None
    return runtime.removeprefix("executorch ") if runtime and runtime.startswith("executorch ") else None
