"""Thresholds as bytes: what is written is read back, and whatever is not exactly that is refused with a reason."""

import json
import math
import struct
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
import safetensors.numpy

from spafl.errors import WireError
from spafl.layout import Layer, ThresholdLayout
from spafl.wire import (
    MAX_HEADER_BYTES,
    MAX_VERSION,
    TENSOR,
    Precision,
    Thresholds,
    decode_thresholds,
    encode_thresholds,
    max_body_bytes,
)

VALUES = np.array([0, -0.5, 1.25, 3e-3, 5, -5, 0.125], np.float32)


def body(
    layout: ThresholdLayout, header: Any = None, values: bytes = VALUES.tobytes(), **changed: Any
) -> bytes:
    """A body with fields of its header replaced; `header` replaces all of it (bytes as they are)."""
    tensor = {"dtype": "F32", "shape": [7], "data_offsets": [0, 28]} | changed.pop("tensor", {})
    metadata = {"layout": layout.id, "version": "3"} | changed.pop("metadata", {})
    if header is None:
        header = {"__metadata__": metadata, TENSOR: tensor, **changed}
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + values


@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_round_trip(layout: ThresholdLayout, precision: Precision) -> None:
    sent = Thresholds(VALUES, 12)
    got = decode_thresholds(layout, encode_thresholds(layout, sent, precision))
    assert got.version == 12
    assert got.values.dtype == np.float32
    expected = VALUES if precision == "f32" else VALUES.astype(np.float16).astype(np.float32)
    np.testing.assert_array_equal(got.values, expected)


@pytest.mark.parametrize(("precision", "dtype"), [("f32", np.float32), ("f16", np.float16)])
def test_any_safetensors_reader_reads_it(layout: ThresholdLayout, precision: Precision, dtype: type) -> None:
    data = encode_thresholds(layout, Thresholds(VALUES, 1), precision)
    tensors = safetensors.numpy.load(data)
    assert list(tensors) == [TENSOR]
    assert tensors[TENSOR].dtype == dtype


def test_any_safetensors_writer_is_read(layout: ThresholdLayout) -> None:
    metadata = {"layout": layout.id, "version": "9", "client": "other"}
    data = safetensors.numpy.save({TENSOR: VALUES}, metadata)
    assert decode_thresholds(layout, data).version == 9


def test_equal_thresholds_are_equal_bytes_in_every_process(layout: ThresholdLayout) -> None:
    """An update is sent again after a restart: other bytes would be refused as another update."""
    program = (
        "import sys, numpy as np, json; from spafl.layout import ThresholdLayout; from spafl.wire import *;"
        "layout = ThresholdLayout.from_json(json.loads(sys.argv[1]));"
        "sys.stdout.write(encode_thresholds(layout, Thresholds(np.ones(7), 4)).hex())"
    )
    command = [sys.executable, "-c", program, json.dumps(layout.to_json())]
    runs = {subprocess.run(command, capture_output=True, check=True).stdout for _ in range(3)}
    assert runs == {encode_thresholds(layout, Thresholds(np.ones(7), 4)).hex().encode()}


def test_views_and_other_dtypes_are_written_by_value(layout: ThresholdLayout) -> None:
    expected = encode_thresholds(layout, Thresholds(np.arange(7, dtype=np.float32), 0))
    backwards = np.arange(7, dtype=">f8")[::-1].copy()[::-1]
    assert encode_thresholds(layout, Thresholds(backwards, 0)) == expected
    assert encode_thresholds(layout, Thresholds(np.arange(0, 14)[::2] // 2, 0)) == expected


def test_values_start_at_a_multiple_of_4(layout: ThresholdLayout) -> None:
    for version in (0, 9, 10, 12345, MAX_VERSION):
        data = encode_thresholds(layout, Thresholds(VALUES, version))
        assert struct.unpack_from("<Q", data)[0] % 4 == 0
        assert decode_thresholds(layout, data).version == version


@pytest.mark.parametrize(("precision", "most"), [("f32", 2500), ("f16", 1300)])
def test_lenet5_fits_its_bars_at_every_version_a_run_can_have(precision: Precision, most: int) -> None:
    """The paper's 580 thresholds; RunSettings allows 100,000 rounds."""
    rows = [
        ("conv1", "conv", 20, 25),
        ("conv2", "conv", 50, 500),
        ("fc1", "linear", 500, 800),
        ("fc2", "linear", 10, 500),
    ]
    layout = ThresholdLayout.of([Layer(name, kind, out, n_in, 25, 0) for name, kind, out, n_in in rows])
    for digits in range(6):
        assert len(encode_thresholds(layout, Thresholds(np.zeros(580), 10**digits), precision)) <= most


def test_the_largest_body_fits_the_limits() -> None:
    layout = ThresholdLayout.of([Layer("all", "linear", out=16_777_216, n_in=1, n_scale=1, offset=0)])
    data = encode_thresholds(layout, Thresholds(np.zeros(layout.size, np.float32), MAX_VERSION))
    assert struct.unpack_from("<Q", data)[0] <= MAX_HEADER_BYTES
    assert len(data) <= max_body_bytes(layout)


@pytest.mark.parametrize("wrong", [math.nan, math.inf, -math.inf])
@pytest.mark.parametrize("precision", ["f32", "f16"])
def test_not_finite_is_not_sent(layout: ThresholdLayout, wrong: float, precision: Precision) -> None:
    values = VALUES.copy()
    values[3] = wrong
    with pytest.raises(WireError, match="1 thresholds are not finite"):
        encode_thresholds(layout, Thresholds(values, 0), precision)


def test_too_large_for_f16_is_not_sent(layout: ThresholdLayout) -> None:
    values = VALUES.copy()
    values[0] = 65519  # rounds to the largest f16, 65504; 65520 rounds to infinity
    encode_thresholds(layout, Thresholds(values, 0), "f16")
    values[0] = 65520
    with pytest.raises(WireError, match="f16"):
        encode_thresholds(layout, Thresholds(values, 0), "f16")


def test_float64_too_large_for_f32_is_not_sent(layout: ThresholdLayout) -> None:
    with pytest.raises(WireError, match="7 thresholds are not finite"):
        encode_thresholds(layout, Thresholds(np.full(7, 1e300), 0))


@pytest.mark.parametrize("shape", [(), (6,), (8,), (7, 1)])
def test_other_shapes_are_not_sent(layout: ThresholdLayout, shape: tuple[int, ...]) -> None:
    with pytest.raises(WireError, match="has 7 thresholds"):
        encode_thresholds(layout, Thresholds(np.zeros(shape, np.float32), 0))


@pytest.mark.parametrize("version", [-1, MAX_VERSION + 1])
def test_versions_out_of_range_are_not_sent(layout: ThresholdLayout, version: int) -> None:
    with pytest.raises(WireError, match="version"):
        encode_thresholds(layout, Thresholds(VALUES, version))


def test_the_body_of_these_tests_is_valid(layout: ThresholdLayout) -> None:
    np.testing.assert_array_equal(decode_thresholds(layout, body(layout)).values, VALUES)


def test_every_truncation_and_every_extension_is_refused(layout: ThresholdLayout) -> None:
    whole = encode_thresholds(layout, Thresholds(VALUES, 3))
    for cut in range(len(whole)):
        with pytest.raises(WireError):
            decode_thresholds(layout, whole[:cut])
    for extra in (b"\0", b"\0" * 4, b"\0" * max_body_bytes(layout)):
        with pytest.raises(WireError):
            decode_thresholds(layout, whole + extra)


def test_an_oversized_body_is_refused_before_it_is_read(layout: ThresholdLayout) -> None:
    with pytest.raises(WireError, match=r"expected at most 548 for this layout"):
        decode_thresholds(layout, b"\xff" * (max_body_bytes(layout) + 1))
    assert max_body_bytes(layout) == 548


@pytest.mark.parametrize(
    ("changed", "text"),
    [
        ({"tensor": {"dtype": "F64"}}, "dtype"),
        ({"tensor": {"dtype": "BF16"}}, "dtype"),
        ({"tensor": {"dtype": "f32"}}, "dtype"),
        ({"tensor": {"dtype": None}}, "dtype"),
        ({"tensor": {"dtype": ["F32"]}}, "dtype"),
        ({"tensor": {"dtype": "F16"}}, "shape"),
        ({"tensor": {"shape": [6]}}, "shape"),
        ({"tensor": {"shape": [7, 1]}}, "shape"),
        ({"tensor": {"shape": [7.0]}}, "shape"),
        ({"tensor": {"shape": ["7"]}}, "shape"),
        ({"tensor": {"shape": 7}}, "shape"),
        ({"tensor": {"shape": "[7]"}}, "shape"),
        ({"tensor": {"data_offsets": [4, 32]}}, r"\[4, 32\]"),
        ({"tensor": {"data_offsets": [False, 28]}}, "False"),
        ({"tensor": {"data_offsets": [-28, 0]}}, "-28"),
        ({"tensor": {"data_offsets": [0, 2**63]}}, "at"),
        ({"tensor": {"data_offsets": None}}, "at"),
        ({"metadata": {"layout": "0" * 16}}, "fetch the run's bundle"),
        ({"metadata": {"layout": None}}, "layout None"),
        ({"metadata": {"layout": ["a"]}}, "layout"),
        ({"metadata": {"version": 3}}, "version"),
        ({"metadata": {"version": None}}, "version"),
        ({"metadata": {"version": ""}}, "version"),
        ({"metadata": {"version": "-1"}}, "version"),
        ({"metadata": {"version": "1.0"}}, "version"),
        ({"metadata": {"version": "1e3"}}, "version"),
        ({"metadata": {"version": " 1"}}, "version"),
        ({"metadata": {"version": "1_0"}}, "version"),
        ({"metadata": {"version": "\u0663"}}, "version"),  # a digit to str.isdigit, not to the protocol
        ({"metadata": {"version": str(MAX_VERSION + 1)}}, "version"),
        ({"metadata": {"version": "9" * 300}}, "version"),
        ({"weights": {"dtype": "F32", "shape": [0], "data_offsets": [28, 28]}}, "exactly one tensor"),
        ({"header": {TENSOR: None}}, "got None"),
        ({"header": {TENSOR: []}}, "got None"),
        ({"header": b"{" + b" " * 511 + b"}", "values": b""}, "header of 513 bytes"),
        ({"__metadata__": None}, "layout None"),
        ({"__metadata__": []}, "layout None"),
        ({"header": {}}, "exactly one tensor"),
        ({"header": {"__metadata__": {}}}, "exactly one tensor"),
        ({"header": b"[]"}, "JSON object"),
        ({"header": b"null"}, "JSON object"),
        ({"header": b""}, "JSON object"),
        ({"header": b'{"a":'}, "not JSON"),
        ({"header": b' {"a": 1}'}, "JSON object"),
        ({"header": b"{\xff}"}, "not JSON"),
        ({"header": "{}".encode("utf-16-le")}, "not JSON"),
        ({"header": b'{"a":' + b"[" * 400 + b"]" * 100 + b"}"}, "not JSON"),
        ({"header": b'{"a":' + b"9" * 480 + b"}"}, "exactly one tensor"),
        ({"header": b'{"thresholds":{},"thresholds":{}}'}, "twice"),
        ({"header": b'{"\\ud800":1}'}, "exactly one tensor"),
        ({"values": b""}, "0"),
        ({"values": VALUES[:6].tobytes()}, "expected 28 bytes of values, got 24"),
        ({"values": VALUES.tobytes() + b"\0"}, "expected 28 bytes of values, got 29"),
        ({"values": np.full(7, np.nan, "<f4").tobytes()}, "7 of 7 thresholds are NaN"),
        ({"values": b"\x00\x00\x80\x7f" * 7}, "infinite"),
        ({"values": b"\x01\x00\x80\x7f" * 7}, "NaN"),  # a signalling NaN
    ],
)
def test_what_is_not_exactly_thresholds_is_refused(
    layout: ThresholdLayout, changed: dict[str, Any], text: str
) -> None:
    with pytest.raises(WireError, match=text) as caught:
        decode_thresholds(layout, body(layout, **changed))
    assert str(caught.value).isprintable()
    str(caught.value).encode()  # goes into a problem and a log: no lone surrogates
    assert len(str(caught.value)) < 700


def test_a_header_length_that_lies_is_refused(layout: ThresholdLayout) -> None:
    valid = body(layout)
    for length in (0, 1, len(valid), 2**31, 2**63, 2**64 - 1):
        with pytest.raises(WireError):
            decode_thresholds(layout, struct.pack("<Q", length) + valid[8:])


def test_thresholds_of_another_model_of_the_same_size_are_refused(layout: ThresholdLayout) -> None:
    other = ThresholdLayout.of([Layer("only", "linear", out=7, n_in=9, n_scale=9, offset=0)])
    with pytest.raises(WireError, match=layout.id):
        decode_thresholds(layout, encode_thresholds(other, Thresholds(VALUES, 0)))


def test_what_was_decoded_is_its_own_copy(layout: ThresholdLayout) -> None:
    got = decode_thresholds(layout, body(layout))
    got.values[0] = 9
    assert decode_thresholds(layout, body(layout)).values[0] == 0
