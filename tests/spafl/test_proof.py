"""What a proof says, and when it says that two models are not equal."""

import dataclasses

import numpy as np
import pytest

from spafl.layout import Floats
from spafl.manifest import Compaction, Manifest
from spafl.proof import MAX_EXAMPLES, RELATIVE_TOLERANCE, Candidate, Proof, measure_precision, prove

X = np.random.default_rng(0).normal(size=(20, 3)).astype(np.float32)
WEIGHT = np.random.default_rng(1).normal(size=(3, 2)).astype(np.float32)
ACTIVE = {"conv": np.array([1, 0, 1, 0], bool), "fc": np.zeros(3, bool)}


def logits(x: Floats) -> Floats:
    return np.asarray(x @ WEIGHT)


def proof(manifest: Manifest, other: Floats, x: Floats = X) -> Proof:
    """Compares `logits` with themselves plus `other`."""
    compaction = tuple(
        Compaction(
            layer=layer,
            out=out,
            n_in=n_in,
            positions=positions,
            reads=reads,
            drops=True,
            live=((layer,),),
            reason="left out",
        )
        for layer, out, n_in, positions, reads in (("conv", 4, 9, 36, {}), ("fc", 3, 36, 1, {"conv": 9}))
    )
    small = Candidate(lambda x: logits(x) + other, logits, 100)
    whole = Candidate(logits, logits, 1000)
    return prove(
        dataclasses.replace(manifest, compaction=compaction),
        ACTIVE,
        x,
        masked=whole,
        compact=small,
        runtime="numpy",
        runs=3,
    )


def test_equal_models_are_equal(manifest: Manifest) -> None:
    told = proof(manifest, np.zeros(2, np.float32))
    assert (told.equal, told.max_difference, told.argmax_agreement, told.bundle) == (True, 0.0, 1.0, None)
    assert told.density == {"conv": 0.5, "fc": 0.0}
    assert [(layer.kept, layer.total) for layer in told.layers] == [(2, 4), (1, 3)]
    assert "one is kept, because runtimes" in told.layers[1].reason
    assert (told.masked.weights, told.compact.weights) == (4 * 9 + 3 * 36, 2 * 9 + 1 * 18)
    assert (told.masked.flops, told.compact.flops) == (2 * (36 * 36 + 108), 2 * (18 * 36 + 18))
    assert (told.masked.bytes, told.compact.bytes) == (1000, 100)
    assert 0 < told.compact.latency_median_ms <= told.compact.latency_p95_ms


@pytest.mark.parametrize(("factor", "equal"), [(0.5, True), (2.0, False)])
def test_the_tolerance_is_relative_to_the_largest_logit(
    factor: float, equal: bool, manifest: Manifest
) -> None:
    largest = np.abs(logits(X)).max()
    told = proof(manifest, np.array([factor * RELATIVE_TOLERANCE * largest, 0], np.float32))
    assert told.equal is equal
    assert told.relative_difference == pytest.approx(factor * RELATIVE_TOLERANCE, rel=0.1)
    if not equal:
        assert "differs from the masked one by 2.0e-05 of its largest logit" in told.refusal()


def test_another_label_is_told_and_a_near_tie_is_none(manifest: Manifest) -> None:
    assert proof(manifest, np.array([9.0, 0.0], np.float32)).argmax_agreement < 1
    direction = np.linalg.solve((WEIGHT.T @ WEIGHT), np.ones(2, np.float32))
    tie = np.asarray((WEIGHT @ direction)[None], np.float32)  # both logits 1
    assert proof(manifest, np.array([0.0, 1e-6], np.float32), tie).argmax_agreement == 1.0


def test_not_a_number_is_never_equal(manifest: Manifest) -> None:
    assert not proof(manifest, np.array([np.nan, 0.0], np.float32)).equal


def test_no_more_examples_than_the_most(manifest: Manifest) -> None:
    many = np.zeros((MAX_EXAMPLES + 1, 3), np.float32)
    assert proof(manifest, np.zeros(2, np.float32), many).examples == MAX_EXAMPLES


def test_the_price_of_a_conversion_is_measured_on_every_example_and_written() -> None:
    many = np.random.default_rng(2).normal(size=(MAX_EXAMPLES + 88, 3)).astype(np.float32)
    labels = logits(many).argmax(1)
    labels[:60] ^= 1  # of 600, a tenth is wrong before
    flipped = np.where(np.arange(600)[:, None] < 540, 1, -1).astype(np.float32)  # and the last 60 after, too
    told = measure_precision(
        "int8",
        many,
        labels,
        compact=Candidate(logits, logits, 100),
        converted=Candidate(lambda x: logits(x) * flipped, logits, 30),
        calibration=7,
        runs=3,
    )
    assert (told.kind, told.examples, told.calibration, told.bytes) == ("int8", 600, 7, 30)
    assert (told.accuracy_before, told.accuracy_after, told.argmax_agreement) == (0.9, 0.8, 0.9)
    worst = 2 * np.abs(logits(many)[540:]).max() / np.abs(logits(many)).max()
    assert told.relative_difference == pytest.approx(worst, rel=1e-6)
    assert 0 < told.latency_median_ms <= told.latency_p95_ms


def test_a_proof_with_a_price_survives_its_file(manifest: Manifest) -> None:
    plain = proof(manifest, np.zeros(2, np.float32))
    assert plain.precision is None
    same = Candidate(logits, logits, 1)
    cost = measure_precision("fp16", X, np.zeros(20, np.int64), compact=same, converted=same, runs=1)
    priced = dataclasses.replace(plain, precision=cost)
    assert Proof.from_text(priced.to_text()) == priced
    before = {key: value for key, value in plain.to_json().items() if key != "precision"}
    assert Proof.from_json(before) == plain  # as written before there were prices
