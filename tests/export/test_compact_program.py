"""Compact programs from mask to prediction: what goes over the wire, what comes back, and that it computes the same."""

import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
import torch

from device_runtime.program import METHOD, MODEL, Program, ask, compact, fill, predict
from export import compact_program
from export.compact_program import (
    MAX_BATCH,
    proof_path,
    source_manifest,
    write_program,
)
from export.decompositions import LoweringError
from export.program_service import ProgramMaker
from spafl.algorithm import mask_of
from spafl.errors import BundleError
from spafl.layout import Floats
from spafl.program import decode_program, encode_mask
from spafl.proof import PROOF, Proof
from tests.export.programs import NOTHING, Served

RELATIVE = 1e-5
"""Of the largest logit: sums of some hundred float32 terms in another order."""


@pytest.fixture(scope="module")
def lenet(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served("lenet5", True, tmp_path_factory.mktemp("lenet") / "b")


@pytest.fixture(scope="module")
def padded(tmp_path_factory: pytest.TempPathFactory) -> Served:
    return Served("padded", False, tmp_path_factory.mktemp("padded") / "b")


@pytest.fixture(params=["lenet", "padded"])
def served(request: pytest.FixtureRequest) -> Iterator[Served]:
    return request.getfixturevalue(request.param)


def test_two_devices_with_one_mask(served: Served, tmp_path: Path) -> None:
    """Other weights: the same question, the same bytes, and each device's own exact model."""
    states = [served.state(0.5, weights=1), served.state(0.5, weights=2)]
    layout = served.bundle.manifest.layout
    masks = [encode_mask(layout, mask_of(layout, state)) for state in states]
    assert masks[0] == masks[1], "the test's own states differ in their masks"
    answers = []
    for number, state in enumerate(states):
        client, wire = served.client()
        proof = compact(served.bundle, state, tmp_path / str(number), served.x, client, runs=1)
        ((request, answer),) = wire.seen
        # all a device tells: 8 bytes that name the layout, and a bit per filter
        body = request.read()
        assert body == masks[number]
        assert len(body) == 8 + -(-layout.size // 8)
        assert request.url.query == b""
        assert set(request.headers) == {
            *("host", "user-agent", "accept", "accept-encoding", "connection"),
            *("content-type", "content-length"),
        }
        answers.append(answer)
        expected = served.eager(state)
        got = predict(tmp_path / str(number) / MODEL, served.x)
        np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())
        assert proof.equal
        assert proof.relative_difference <= RELATIVE
        assert Proof.from_text((tmp_path / str(number) / PROOF).read_text()) == proof
        assert sorted(path.name for path in (tmp_path / str(number)).iterdir()) == [MODEL, PROOF]
    assert answers[0] == answers[1]
    files = [(tmp_path / number / MODEL).read_bytes() for number in "01"]
    assert files[0] != files[1]
    assert len(files[0]) == len(files[1]) == decode_program(answers[0]).header.whole


def test_another_service_gives_the_same_bytes(padded: Served) -> None:
    """Nothing is remembered between the two: it is the mask alone that decides."""
    layout = padded.bundle.manifest.layout
    body = encode_mask(layout, mask_of(layout, padded.state(0.5, weights=1)))
    assert ProgramMaker(padded.made.model, padded.bundle).program(body) == padded.maker.program(body)


@pytest.mark.parametrize(
    ("name", "density"),
    [("lenet", 1.0), ("lenet", 0.1), ("padded", 1.0), ("padded", 0.1), ("padded", NOTHING)],
)
def test_the_program_is_the_masked_model(
    name: str, density: float, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    served: Served = request.getfixturevalue(name)
    state = served.state(density, weights=3)
    client, _ = served.client()
    proof = compact(served.bundle, state, tmp_path, served.x, client, runs=2)
    expected = served.eager(state)
    got = predict(tmp_path / MODEL, served.x)
    np.testing.assert_allclose(got, expected, rtol=0, atol=RELATIVE * np.abs(expected).max())
    assert proof.equal
    assert (proof.bundle, proof.runtime, proof.examples) == (
        served.bundle.id,
        "executorch 1.5.1",
        len(served.x),
    )
    assert proof.compact.bytes == (tmp_path / MODEL).stat().st_size
    kept = {layer.layer: layer.kept for layer in proof.layers}
    for layer in served.bundle.manifest.layout.layers:
        share = 0.5 if density == NOTHING else density
        assert kept[layer.name] == max(1, round(share * layer.out)) or density == NOTHING
    if density == NOTHING:
        emptied = served.bundle.manifest.layout.layers[1].name
        assert (kept[emptied], proof.density[emptied]) == (1, 0.0)
    weights = 4 * proof.compact.weights
    assert weights < proof.compact.bytes < weights + 12_000, "holds other weights than those that are left"


def test_xnnpack_runs_all_of_it_in_one_piece(served: Served) -> None:
    """A convolution by portable kernels takes eighty times as long; a model cut in two a third longer."""
    client, _ = served.client()
    program = ask(client, served.bundle, mask_of(served.made.layout, served.state(0.5, weights=1)))
    assert b"XnnpackBackend" in program.model
    assert b"aten::" not in program.model
    assert b"aten::" in program.fold, "the test looks for the wrong thing"


def test_what_the_service_answers_holds_no_weights(served: Served) -> None:
    """Neither the placeholders it was made with, nor those of the model the service holds."""
    state = served.state(0.5, weights=1)
    client, wire = served.client()
    program = ask(client, served.bundle, mask_of(served.made.layout, state))
    answer = wire.seen[0][1]
    assert sum(size for _, size in program.header.holes) == program.header.whole - len(program.model)
    for source in (state, {name: value.numpy() for name, value in served.made.model.state_dict().items()}):
        for name, value in source.items():
            if name.endswith("weight") and value.dtype == np.float32:
                assert value.tobytes()[:16] not in answer, name
                assert value.tobytes()[-16:] not in answer, name
    # what is left of the model is structure: far fewer bytes than weights were cut out
    placeholders = np.frombuffer(program.model[: len(program.model) // 4 * 4], np.float32)
    with np.errstate(invalid="ignore"):
        ordinary = np.isfinite(placeholders) & (abs(placeholders) > 1e-3) & (abs(placeholders) < 10)
    assert ordinary.sum() < 40, "looks like float32 weights"


def test_filled_programs_keep_their_own_weights(lenet: Served) -> None:
    """Both name their weights alike: a runtime that remembers weights by name would mix them up."""
    states = [lenet.state(0.5, weights=1), lenet.state(0.5, weights=2)]
    client, _ = lenet.client()
    mask = mask_of(lenet.made.layout, states[0])
    program = ask(client, lenet.bundle, mask)
    opened = [Program(fill(lenet.bundle, state, mask, program), 1) for state in states]
    for _ in range(2):
        for state, model in zip(states, opened, strict=True):
            expected = lenet.eager(state)
            np.testing.assert_allclose(
                model.logits(lenet.x), expected, rtol=0, atol=RELATIVE * np.abs(expected).max()
            )


def test_any_batch_up_to_the_largest(lenet: Served) -> None:
    """Exported with a small example batch, XNNPACK plans for fewer than asked."""
    state = lenet.state(0.5, weights=1)
    client, _ = lenet.client()
    mask = mask_of(lenet.made.layout, state)
    model = Program(fill(lenet.bundle, state, mask, ask(client, lenet.bundle, mask)), 1)
    assert model._program.largest(METHOD, 0) == (MAX_BATCH, 1, 28, 28)
    expected = lenet.eager(state)
    for count in (1, MAX_BATCH, 2, 15, 33):
        got = model.once(lenet.x[:count])
        np.testing.assert_allclose(got, expected[:count], rtol=0, atol=RELATIVE * np.abs(expected).max())
    assert len(model.logits(lenet.x)) == len(lenet.x) > MAX_BATCH


def test_a_filter_on_its_edge_is_what_the_mask_says(lenet: Served, tmp_path: Path) -> None:
    """Its score is its threshold: numpy, PyTorch and ExecuTorch may each round it to another side."""
    state = lenet.state(0.5, weights=1)
    layer = lenet.made.layout.layers[0]
    mask = mask_of(lenet.made.layout, state)
    pruned = int(np.flatnonzero(~mask[layer.name])[0])
    score = np.abs(state[layer.weight][pruned]).mean()
    state[layer.threshold][pruned] = np.nextafter(np.float32(score), np.float32(1))
    assert not mask_of(lenet.made.layout, state)[layer.name][pruned]
    client, _ = lenet.client()
    assert compact(lenet.bundle, state, tmp_path, lenet.x, client, runs=1).equal


def test_a_program_that_computes_something_else_is_not_handed_out(lenet: Served) -> None:
    mask = mask_of(lenet.made.layout, lenet.state(0.1, weights=3))
    client, _ = lenet.client()
    program = ask(client, lenet.bundle, mask)
    compact_program._check(program, lenet.made.model, lenet.bundle.manifest, mask)
    other = {name: rows.copy() for name, rows in mask.items()}
    other["fc1"][np.flatnonzero(mask["fc1"])[0]] = False
    with pytest.raises(LoweringError, match=r"differs from PyTorch by .*e-0. of the largest logit"):
        compact_program._check(program, lenet.made.model, lenet.bundle.manifest, other)


class _Folding:
    """Stands in for two weights, without a model."""

    shapes = ((2, 3), (1,))

    def model(self, weights: list[torch.Tensor]) -> list[torch.Tensor]:
        return weights


def test_weights_are_found_in_any_order_of_their_axes_and_drawn_again_where_they_repeat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    draws = []

    def lower(weights: list[torch.Tensor], shape: tuple[int, ...]) -> bytes:
        draws.append(weights)
        first, second = (weight.numpy() for weight in weights)
        again = second.tobytes() if len(draws) == 1 else b""
        return b"pte." + second.tobytes() + again + first.T.tobytes() + b"end"

    monkeypatch.setattr(compact_program, "_lower_model", lower)
    program, places = compact_program._lowered_with_places(_Folding(), ())  # type: ignore[arg-type]
    assert [(place.offset, place.bytes, place.number, place.axes) for place in places] == [
        (4, 4, 1, (0,)),
        (8, 24, 0, (1, 0)),
    ]
    assert len(draws) == 2
    assert program[8:32] == draws[1][0].numpy().T.tobytes()


def test_a_compiler_that_changes_weights_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(compact_program, "_lower_model", lambda weights, shape: b"nothing like them")
    with pytest.raises(LoweringError, match=r"changed a weight of shape \(2, 3\)"):
        compact_program._lowered_with_places(_Folding(), ())  # type: ignore[arg-type]


def test_a_weight_that_always_repeats_is_told_of(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(
        compact_program,
        "_lower_model",
        lambda weights, shape: b"".join(weight.numpy().tobytes() for weight in [*weights, *weights]),
    )
    with pytest.raises(LoweringError, match="more than once, 5 times"):
        compact_program._lowered_with_places(_Folding(), ())  # type: ignore[arg-type]


def test_a_program_with_its_weights_and_its_proof(lenet: Served, tmp_path: Path) -> None:
    state = lenet.state(0.1, weights=3)
    manifest = source_manifest(lenet.made.model, lenet.made.input, lenet.made.labels)
    out = tmp_path / "new" / "compact.pte"
    proof = write_program(lenet.made.model, manifest, state, out, lenet.x, runs=1)
    expected = lenet.eager(state)
    np.testing.assert_allclose(
        predict(out, lenet.x), expected, rtol=0, atol=RELATIVE * np.abs(expected).max()
    )
    assert proof.equal
    assert proof.bundle is None
    assert proof_path(out).name == "compact.proof.json"
    assert sorted(path.name for path in out.parent.iterdir()) == ["compact.proof.json", "compact.pte"]
    assert json.loads(proof_path(out).read_text())["compact"]["bytes"] == out.stat().st_size
    # the whole masked model, as the same kind of program: all its weights
    assert proof.masked.weights == 430_500
    assert 4 * 430_500 < proof.masked.bytes < 4 * 430_500 + 12_000
    client, _ = lenet.client()
    mask = mask_of(lenet.made.layout, state)
    assert out.stat().st_size == ask(client, lenet.bundle, mask).header.whole


def test_what_is_not_equal_is_not_written(
    lenet: Served, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    state = lenet.state(0.1, weights=3)
    client, _ = lenet.client()
    mask = mask_of(lenet.made.layout, state)
    small = fill(lenet.bundle, state, mask, ask(client, lenet.bundle, mask))
    other: dict[str, Floats] = {**state, "fc2.weight": state["fc2.weight"] * np.float32(1.001)}
    monkeypatch.setattr(compact_program, "whole_program", lambda *arguments: small)
    with pytest.raises(LoweringError, match=r"differs from the masked one by 1\.0e-03 .* not written"):
        write_program(lenet.made.model, lenet.bundle.manifest, other, tmp_path / "c.pte", lenet.x, runs=1)
    del other["fc1.weight"]
    with pytest.raises(BundleError, match="missing or unknown"):
        write_program(lenet.made.model, lenet.bundle.manifest, other, tmp_path / "c.pte", lenet.x, runs=1)
    assert not list(tmp_path.iterdir())
