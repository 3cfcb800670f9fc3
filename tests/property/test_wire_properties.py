"""For all thresholds and all bytes: the codec loses nothing, and the decoder has one way to say no."""

import json
import struct

import numpy as np
import safetensors.numpy
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as arrays

from spafl.errors import WireError
from spafl.layout import Layer, ThresholdLayout
from spafl.wire import MAX_VERSION, TENSOR, Precision, Thresholds, decode_thresholds, encode_thresholds

LAYOUT = ThresholdLayout.of(
    [
        Layer("conv", "conv", out=5, n_in=9, n_scale=9, offset=0),
        Layer("fc", "linear", out=3, n_in=4, n_scale=4, offset=0),
    ]
)
VERSIONS = st.integers(0, MAX_VERSION)
PRECISIONS = st.sampled_from(["f32", "f16"])
F32 = arrays.arrays(
    np.float32, LAYOUT.size, elements=st.floats(width=32, allow_nan=False, allow_infinity=False)
)
F16 = arrays.arrays(
    np.float16, LAYOUT.size, elements=st.floats(width=16, allow_nan=False, allow_infinity=False)
)


@given(F32, VERSIONS)
def test_f32_round_trip_is_exact_to_the_bit(values: np.ndarray, version: int) -> None:
    got = decode_thresholds(LAYOUT, encode_thresholds(LAYOUT, Thresholds(values, version)))
    assert got.version == version
    assert got.values.tobytes() == values.tobytes()  # -0.0 and subnormals too


@given(F16, VERSIONS)
def test_f16_round_trip_is_exact_for_values_f16_has(values: np.ndarray, version: int) -> None:
    got = decode_thresholds(
        LAYOUT, encode_thresholds(LAYOUT, Thresholds(values.astype(np.float32), version), "f16")
    )
    assert got.values.tobytes() == values.astype(np.float32).tobytes()


@given(arrays.arrays(np.float32, LAYOUT.size, elements=st.floats(-65504, 65504, width=32)))
def test_f16_rounds_once_and_then_stays(values: np.ndarray) -> None:
    """Half precision keeps 11 significant bits: relative error at most 2**-11, absolute 2**-25 below 2**-14."""
    first = decode_thresholds(LAYOUT, encode_thresholds(LAYOUT, Thresholds(values, 0), "f16")).values
    again = decode_thresholds(LAYOUT, encode_thresholds(LAYOUT, Thresholds(first, 0), "f16")).values
    np.testing.assert_array_equal(first, again)
    np.testing.assert_allclose(first, values, rtol=2**-11, atol=2**-25)


@given(st.binary(max_size=600))
def test_arbitrary_bytes_are_thresholds_or_a_wire_error(data: bytes) -> None:
    _decode(data)


@given(st.binary(max_size=512), st.binary(max_size=40))
def test_arbitrary_headers_are_thresholds_or_a_wire_error(header: bytes, values: bytes) -> None:
    _decode(struct.pack("<Q", len(header)) + header + values)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=8),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=8), inner, max_size=3),
    max_leaves=6,
)
FIELD = JSON | st.sampled_from(["F32", "F16", [8], [0, 32], [0, 16], "[8]", LAYOUT.id, "3"])


@settings(max_examples=300)
@given(
    st.fixed_dictionaries(
        {
            "__metadata__": JSON | st.fixed_dictionaries({"layout": FIELD, "version": FIELD}),
            TENSOR: JSON | st.fixed_dictionaries({"dtype": FIELD, "shape": FIELD, "data_offsets": FIELD}),
        }
    ),
    st.sampled_from([16, 32]),
)
def test_headers_of_the_right_shape_are_thresholds_or_a_wire_error(header: object, values: int) -> None:
    text = json.dumps(header).encode()
    _decode(struct.pack("<Q", len(text)) + text + bytes(values))


@settings(max_examples=500)
@given(F32, PRECISIONS, st.data())
def test_mutated_bodies_are_thresholds_or_a_wire_error(
    values: np.ndarray, precision: Precision, data: st.DataObject
) -> None:
    with np.errstate(over="ignore"):
        values = np.clip(values, -65504, 65504)
    body = bytearray(encode_thresholds(LAYOUT, Thresholds(values, 3), precision))
    for _ in range(data.draw(st.integers(1, 4))):
        position = data.draw(st.integers(0, len(body) - 1))
        kind = data.draw(st.sampled_from(["set", "drop", "double", "swap"]))
        if kind == "set":
            body[position] = data.draw(st.integers(0, 255))
        elif kind == "drop" and len(body) > 1:
            del body[position]
        elif kind == "double":
            body.insert(position, body[position])
        else:
            body[position], body[-1 - position] = body[-1 - position], body[position]
    _decode(bytes(body))


def _decode(data: bytes) -> None:
    """Asserts that `data` is refused with WireError, or is what any other reader of safetensors reads too."""
    try:
        got = decode_thresholds(LAYOUT, data)
    except WireError:
        return
    np.testing.assert_array_equal(safetensors.numpy.load(data)[TENSOR].astype(np.float32), got.values)
    assert np.isfinite(got.values).all()
