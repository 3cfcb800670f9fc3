"""A device's compact program: what it asks, what answers it refuses, and that nothing unproven is left behind."""

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from numpy.typing import NDArray

from device_runtime import program
from device_runtime.client import Client
from device_runtime.engines import EngineError
from device_runtime.errors import BadAnswer, Refused, Unauthorised, Unreachable
from device_runtime.program import MODEL, compact, fill, predict, service
from device_runtime.retry import Backoff
from spafl import algorithm
from spafl.algorithm import mask_of
from spafl.bundle import Bundle
from spafl.errors import BundleError, SettingsError
from spafl.layout import Floats
from spafl.program import (
    MASK_MEDIA_TYPE,
    MAX_BODY_BYTES,
    HollowProgram,
    decode_mask,
    encode_mask,
    encode_program,
    hollow,
    mask_digest,
)
from spafl.proof import PROOF, Candidate, Proof
from tests.device_runtime.tiny import LAYOUT

X = np.random.default_rng(0).normal(size=(9, 3)).astype(np.float32)
SKELETON = b"hollow model"
HOLE = 8


class FoldProgram:
    """Stands in for an opened fold program: the active rows, weight and head, as one flat array."""

    def __init__(self, mask: NDArray[np.bool_]) -> None:
        self._mask = mask

    def run(self, method: str, arrays: Sequence[Floats]) -> list[Floats]:
        weight, head = arrays
        return [np.concatenate([weight[self._mask].ravel(), head[:, self._mask].ravel()])]


class CompactProgram:
    """Stands in for an opened compact program: the tiny model with the weights in the hole of its file."""

    def __init__(self, file: bytes) -> None:
        assert file[:HOLE] + file[len(file) - 4 :] == SKELETON
        self._weights = np.frombuffer(file[HOLE:-4], np.float32)

    def largest(self, method: str, index: int) -> tuple[int, ...]:
        return (4, 3)

    def run(self, method: str, arrays: Sequence[Floats]) -> list[Floats]:
        (x,) = arrays
        assert len(x) <= 4
        count = len(self._weights) // 5
        weight, head = (
            self._weights[: 3 * count].reshape(count, 3),
            self._weights[3 * count :].reshape(2, count),
        )
        return [np.maximum(x @ weight.T, 0) @ head.T]


class Service:
    """A program service behind a transport; `change` may spoil its answers."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle = bundle
        self.requests: list[httpx2.Request] = []
        self.change: Callable[[dict[str, Any]], object] = lambda header: None
        self.body: bytes | None = None
        self.status = 200

    def answer(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if self.status != 200:
            told = {"type": "urn:spafl:problem:x", "title": "x", "status": self.status, "detail": "in words"}
            return httpx2.Response(self.status, stream=httpx2.ByteStream(json.dumps(told).encode()))
        body = self.body or encode_program(self.program(request.read()))
        return httpx2.Response(200, stream=httpx2.ByteStream(body))

    def program(self, mask: bytes) -> HollowProgram:
        count = int(decode_mask(LAYOUT, mask)["hidden"].sum())
        header: dict[str, Any] = {
            "bundle": self.bundle.id,
            "layout": LAYOUT.id,
            "mask": mask_digest(mask),
            "executorch": "1.5.1",
            "inputs": ("hidden.weight", "head.weight"),
        }
        self.change(header)
        return hollow(
            SKELETON[:HOLE] + bytes(20 * count) + SKELETON[HOLE:], [(HOLE, 20 * count)], b"fold", **header
        )

    def client(self) -> Client:
        return Client(
            "http://programs",
            transport=httpx2.MockTransport(self.answer),
            backoff=Backoff(attempts=1),
        )


@pytest.fixture
def state(bundle: Bundle) -> dict[str, Floats]:
    state = bundle.initial_state()
    state["hidden.threshold"] = algorithm.thresholds_at(LAYOUT, state, 0.5, np.random.default_rng(1))
    return state


@pytest.fixture
def answers(bundle: Bundle) -> Service:
    return Service(bundle)


@pytest.fixture(autouse=True)
def runtime(state: dict[str, Floats], monkeypatch: pytest.MonkeyPatch) -> None:
    """ExecuTorch and the masked model, in numpy."""
    mask = mask_of(LAYOUT, state)["hidden"]

    def opened(file: bytes, data: bytes | None = None, *, threads: int = 1) -> FoldProgram | CompactProgram:
        return FoldProgram(mask) if file == b"fold" else CompactProgram(file)

    def masked(bundle: Bundle, given: dict[str, Floats], threads: int) -> Candidate:
        rows = algorithm.mask(LAYOUT.layers[0], given)[:, None]

        def logits(x: Floats) -> Floats:
            hidden = np.maximum(x @ (given["hidden.weight"] * rows).T, 0)
            return np.asarray(hidden @ given["head.weight"].T, np.float32)

        return Candidate(logits, logits, 1000)

    monkeypatch.setattr(program.executorch_program, "open_program", opened)
    monkeypatch.setattr(program.executorch_program, "require", lambda: None)
    monkeypatch.setattr(program, "_masked", masked)


def made(bundle: Bundle, state: dict[str, Floats], out: Path, answers: Service, x: Floats = X) -> Proof:
    with answers.client() as client:
        return compact(bundle, state, out, x, client, runs=1)


def test_a_mask_goes_out_and_a_proven_program_is_left(
    bundle: Bundle, state: dict[str, Floats], tmp_path: Path, answers: Service
) -> None:
    proof = made(bundle, state, tmp_path / "out", answers)
    (request,) = answers.requests
    assert (request.method, request.url.path) == ("POST", f"/v1/bundles/{bundle.id}/programs")
    assert request.headers["Content-Type"] == MASK_MEDIA_TYPE
    assert request.read() == encode_mask(LAYOUT, mask_of(LAYOUT, state))
    assert "Authorization" not in request.headers
    assert proof.equal
    assert (proof.bundle, proof.examples, proof.runtime) == (bundle.id, 9, "executorch 1.5.1")
    assert sorted(path.name for path in (tmp_path / "out").iterdir()) == [MODEL, PROOF]
    assert Proof.from_text((tmp_path / "out" / PROOF).read_text()) == proof
    assert predict(tmp_path / "out" / MODEL, X).shape == (9, 2)


@pytest.mark.parametrize(
    ("words", "change"),
    [
        ("of bundle 000000000000 or of another mask", lambda header: header.update(bundle="0" * 64)),
        ("of another mask than was asked for", lambda header: header.update(mask="0" * 64)),
        ("or of another mask", lambda header: header.update(layout="0" * 16)),
        (
            "made by ExecuTorch 1.6.0, this device runs 1.5.1",
            lambda header: header.update(executorch="1.6.0"),
        ),
        (r"does not have: \['other'\]", lambda header: header.update(inputs=("hidden.weight", "other"))),
    ],
)
def test_a_program_that_was_not_asked_for_is_refused(
    words: str,
    change: Callable[[dict[str, Any]], object],
    bundle: Bundle,
    state: dict[str, Floats],
    tmp_path: Path,
    answers: Service,
) -> None:
    answers.change = change
    with pytest.raises(BadAnswer, match=words):
        made(bundle, state, tmp_path / "out", answers)
    assert not (tmp_path / "out").exists()


def test_an_answer_that_is_no_program_is_refused(
    bundle: Bundle, state: dict[str, Floats], tmp_path: Path, answers: Service
) -> None:
    for body, words in {
        b"<html>": "truncated: 6 bytes",
        bytes(MAX_BODY_BYTES + 1): f"more than the {MAX_BODY_BYTES} bytes",
    }.items():
        answers.body = body
        with pytest.raises(BadAnswer, match=words):
            made(bundle, state, tmp_path / "out", answers)
    for status, kind in {401: Unauthorised, 422: Refused, 500: Unreachable, 503: Unreachable}.items():
        answers.status = status
        with pytest.raises(kind, match=f"{status} x: in words"):
            made(bundle, state, tmp_path / "out", answers)
    assert not (tmp_path / "out").exists()


def test_a_fold_that_returns_something_else_is_refused(
    bundle: Bundle, state: dict[str, Floats], answers: Service, monkeypatch: pytest.MonkeyPatch
) -> None:
    mask = mask_of(LAYOUT, state)
    hollowed = answers.program(encode_mask(LAYOUT, mask))
    monkeypatch.setattr(FoldProgram, "run", lambda self, method, arrays: [np.zeros(3, np.float32)])
    with pytest.raises(BadAnswer, match=r"returned 1 arrays of \[12\] bytes, the holes want \[40\]"):
        fill(bundle, state, mask, hollowed)


def test_a_difference_is_told_and_nothing_written(
    bundle: Bundle,
    state: dict[str, Floats],
    tmp_path: Path,
    answers: Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    run = CompactProgram.run
    monkeypatch.setattr(
        CompactProgram, "run", lambda self, method, arrays: [run(self, method, arrays)[0] * 1.001]
    )
    with pytest.raises(EngineError, match=r"differs from the masked one by 1\.0e-03 .* not written"):
        made(bundle, state, tmp_path / "out", answers)
    assert not (tmp_path / "out").exists()


def test_nothing_is_asked_before_it_can_be_used(
    bundle: Bundle,
    state: dict[str, Floats],
    tmp_path: Path,
    answers: Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    with pytest.raises(EngineError, match="at least one real example, got none: give --data"):
        made(bundle, state, tmp_path / "out", answers, X[:0])
    with pytest.raises(BundleError, match="missing or unknown"):
        made(bundle, {"hidden.weight": state["hidden.weight"]}, tmp_path / "out", answers)

    def missing() -> None:
        raise EngineError("engine executorch needs ExecuTorch")

    monkeypatch.setattr(program.executorch_program, "require", missing)
    with pytest.raises(EngineError, match="needs ExecuTorch"):
        made(bundle, state, tmp_path / "out", answers)
    assert not answers.requests


def test_a_model_never_stands_beside_another_ones_proof(
    bundle: Bundle,
    state: dict[str, Floats],
    tmp_path: Path,
    answers: Service,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """A full disk at either write: what was there stays."""
    out = tmp_path / "out"
    made(bundle, state, out, answers)
    before = {path.name: path.read_bytes() for path in out.iterdir()}

    def full(*arguments: object, **options: object) -> None:
        raise OSError("No space left on device")

    for write in ("write_text", "write_bytes"):
        with monkeypatch.context() as patch:
            patch.setattr(Path, write, full)
            with pytest.raises(OSError, match="No space left"):
                made(bundle, {**state, "head.weight": state["head.weight"] * 2}, out, answers)
        assert {path.name: path.read_bytes() for path in out.iterdir()} == before


def test_the_services_token_comes_from_the_environment_or_a_file(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file = tmp_path / "token"
    file.write_text("from-a-file\n")
    monkeypatch.setenv("SPAFL_PROGRAM_TOKEN", "from-the-environment")
    for given, token in ((None, "from-the-environment"), (file, "from-a-file")):
        with service("http://programs", given) as client:
            assert client._token is not None
            assert client._token.reveal() == token
    monkeypatch.delenv("SPAFL_PROGRAM_TOKEN")
    with service("http://programs") as client:
        assert client._token is None
    file.write_text(" \n")
    with pytest.raises(SettingsError, match="holds no token"):
        service("http://programs", file)
    with pytest.raises(SettingsError, match="cannot read the token"):
        service("http://programs", tmp_path / "nothing")


def test_without_a_model_there_is_a_word_how_to_make_one(tmp_path: Path) -> None:
    with pytest.raises(EngineError, match="spafl device compact --programs"):
        predict(tmp_path / MODEL, X)
