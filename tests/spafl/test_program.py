"""Masks and hollow programs as bytes: what is in them, and everything that is refused."""

import json
import struct
from collections.abc import Callable

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from spafl import algorithm
from spafl.algorithm import decided, mask_of
from spafl.errors import WireError
from spafl.layout import Floats, Layer, ThresholdLayout
from spafl.program import (
    MAX_BODY_BYTES,
    MAX_HEADER_BYTES,
    HollowProgram,
    decode_mask,
    decode_program,
    encode_mask,
    encode_program,
    hollow,
    mask_bytes,
    mask_digest,
)

NAMED: dict[str, str | tuple[str, ...]] = {
    "bundle": "b" * 64,
    "layout": "1" * 16,
    "mask": "c" * 64,
    "executorch": "1.5.1",
    "inputs": ("conv.weight", "fc.weight"),
}
MODEL = bytes(range(100))
HOLES = ((8, 12), (20, 4), (96, 4))


@pytest.fixture
def program() -> HollowProgram:
    return hollow(MODEL, HOLES, b"fold", **NAMED)


def filters(*counts: int) -> ThresholdLayout:
    return ThresholdLayout.of(
        [Layer(f"l{n}", "linear", out=out, n_in=2, n_scale=2, offset=0) for n, out in enumerate(counts)]
    )


def test_a_mask_is_the_layouts_id_and_one_bit_per_filter(layout: ThresholdLayout) -> None:
    mask = {"conv": np.array([1, 0, 1, 1], bool), "fc": np.array([0, 1, 0], bool)}
    body = encode_mask(layout, mask)
    assert body == bytes.fromhex(layout.id) + bytes([0b10110100])
    assert len(body) == mask_bytes(layout) == 8 + 1


@given(st.lists(st.integers(1, 40), min_size=1, max_size=5), st.randoms(use_true_random=False))
def test_any_mask_comes_back(counts: list[int], random: "np.random.Generator") -> None:
    layout = filters(*counts)
    mask = {
        layer.name: np.array([random.choice((True, False)) for _ in range(layer.out)])
        for layer in layout.layers
    }
    body = encode_mask(layout, mask)
    assert len(body) == 8 + -(-sum(counts) // 8)
    got = decode_mask(layout, body)
    assert list(got) == list(mask)
    for name, rows in mask.items():
        np.testing.assert_array_equal(got[name], rows)


def test_a_mask_of_anything_else_is_refused(layout: ThresholdLayout) -> None:
    body = encode_mask(layout, mask_of(layout, {**_state(layout)}))
    said = {
        "mask of 8 bytes, expected 9 for 7 filters": body[:-1],
        "mask of 10 bytes, expected 9": body + b"\0",
        "mask of 0 bytes": b"",
        f"is of layout ffffffffffffffff, expected {layout.id}": b"\xff" * 8 + body[8:],
        "active filters beyond the layout's 7": body[:-1] + b"\x01",
    }
    for words, wrong in said.items():
        with pytest.raises(WireError, match=words):
            decode_mask(layout, wrong)


def _state(layout: ThresholdLayout) -> dict[str, Floats]:
    draw = np.random.default_rng(0)
    return {
        name: draw.normal(size=shape).astype(np.float32)
        for layer in layout.layers
        for name, shape in ((layer.weight, (layer.out, layer.n_in)), (layer.threshold, (layer.out,)))
    }


def test_decided_thresholds_say_the_mask_where_scores_are_ties(layout: ThresholdLayout) -> None:
    state = _state(layout)
    for layer in layout.layers:  # each filter on its edge, or a rounding beside it
        state[layer.threshold] = algorithm.scores(layer, state[layer.weight])
        state[layer.threshold][::2] -= np.float32(1e-7)
    mask = mask_of(layout, state)
    assert not all(rows.all() for rows in mask.values())
    moved = decided(layout, state, mask)
    for layer in layout.layers:
        score = algorithm.scores(layer, state[layer.weight])
        for nearly in (score * np.float32(0.999), score * np.float32(1.001)):
            np.testing.assert_array_equal(nearly > moved[layer.threshold], mask[layer.name])
        assert moved[layer.weight] is state[layer.weight]
        assert moved[layer.threshold].dtype == np.float32


def test_what_was_cut_out_fills_the_holes(program: HollowProgram) -> None:
    assert program.model == MODEL[:8] + MODEL[24:96]
    assert (program.header.whole, program.header.holes) == (100, HOLES)
    weights = [np.frombuffer(MODEL, np.float32, size // 4, offset) for offset, size in HOLES]
    assert program.filled(weights) == MODEL


def test_weights_that_do_not_fit_are_refused(program: HollowProgram) -> None:
    fitting = [np.zeros(size // 4, np.float32) for _, size in HOLES]
    for wrong in (
        fitting[:2],
        [*fitting, fitting[0]],
        fitting[::-1],
        [fitting[0].astype(np.int32), *fitting[1:]],
    ):
        with pytest.raises(WireError, match=r"returned . arrays of .*, the holes want \[12, 4, 4\]"):
            program.filled(wrong)


def test_a_program_comes_back_and_equal_ones_are_equal_bytes(program: HollowProgram) -> None:
    body = encode_program(program)
    assert decode_program(body) == program
    assert encode_program(hollow(MODEL, HOLES, b"fold", **dict(reversed(NAMED.items())))) == body
    (length,) = struct.unpack_from("<Q", body)
    assert body[8 + length :] == b"fold" + program.model
    assert json.loads(body[8 : 8 + length])["holes"] == [list(hole) for hole in HOLES]


def _changed(body: bytes, change: Callable[[dict[str, object]], object]) -> bytes:
    (length,) = struct.unpack_from("<Q", body)
    header = json.loads(body[8 : 8 + length])
    change(header)
    text = json.dumps(header).encode()
    return struct.pack("<Q", len(text)) + text + body[8 + length :]


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("overlap", lambda header: header.update(holes=[[8, 12], [16, 8]])),
        ("overlap, or are not in order", lambda header: header.update(holes=[[20, 4], [8, 12]])),
        ("reach beyond", lambda header: header.update(holes=[[96, 12]])),
        ("reach beyond", lambda header: header.update(holes=[[0, 1 << 30], [1 << 30, 1 << 30]])),
        ("holes", lambda header: header.update(holes=[[-4, 4]])),
        ("holes", lambda header: header.update(holes=[[0, 3]])),
        ("holes", lambda header: header.update(holes=[])),
        ("inputs", lambda header: header.update(inputs=[])),
        ("bundle", lambda header: header.update(bundle="x")),
        ("expected 5 and 80 bytes of programs, got 84", lambda header: header.update(fold=5)),
        ("extra", lambda header: header.update(extra=1)),
        ("model", lambda header: header.pop("model")),
    ],
)
def test_a_header_that_describes_something_else_is_refused(
    words: str, change: Callable[[dict[str, object]], object], program: HollowProgram
) -> None:
    with pytest.raises(WireError, match=words):
        decode_program(_changed(encode_program(program), change))


def test_bytes_that_are_no_program_are_refused(program: HollowProgram) -> None:
    body = encode_program(program)
    said = {
        "truncated: 7 bytes": body[:7],
        "header of": struct.pack("<Q", len(body)) + body[8:],
        f"expected at most {MAX_HEADER_BYTES}": struct.pack("<Q", MAX_HEADER_BYTES + 1)
        + bytes(MAX_HEADER_BYTES + 9),
        "not the header of a program": struct.pack("<Q", 3) + b"{[}" + body[11:],
        "not the header": struct.pack("<Q", 3) + b"\xff\xff\xff" + body[11:],
        "bytes of programs, got": body[:-1],
        "bytes of programs": body + b"\0",
        f"expected at most {MAX_BODY_BYTES}": bytes(MAX_BODY_BYTES + 1),
    }
    for words, wrong in said.items():
        with pytest.raises(WireError, match=words):
            decode_program(wrong)


def test_the_digest_is_the_masks_sha256() -> None:
    assert mask_digest(b"") == "e3b0c44298fc1c149afbf4c8996fb92427ae41e4649b934ca495991b7852b855"
