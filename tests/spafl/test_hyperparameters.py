"""A lease carries the parameters in force: schedules are worked in once, on the server."""

import math
from dataclasses import replace
from typing import Any

import pytest

from spafl.errors import SettingsError
from spafl.hyperparameters import Hyperparameters
from spafl.record import RecordError


def test_defaults_come_out_as_they_are() -> None:
    given = Hyperparameters()
    assert given.at(0, 15) == replace(given, threshold_lr=given.lr)


def test_decay_reaches_both_learning_rates() -> None:
    given = Hyperparameters(lr=0.1, threshold_lr=0.02, lr_decay=0.5)
    assert (given.at(0, 5).lr, given.at(0, 5).threshold_lr) == (0.1, 0.02)
    assert given.at(3, 5).lr == pytest.approx(0.0125)
    assert given.at(3, 5).threshold_lr == pytest.approx(0.0025)


def test_a_threshold_rate_of_zero_is_not_an_absent_one() -> None:
    assert Hyperparameters(threshold_lr=0).at(0, 1).threshold_lr == 0


def test_the_ramp_is_the_published_one() -> None:
    given = Hyperparameters(coeff=0.002, ramp="fmnist")
    for round in (0, 250, 499):
        expected = 0.002 / (1 + math.exp(5 - 10 * round / 500))
        assert given.at(round, 500).coeff == pytest.approx(expected, rel=1e-12)
    assert given.at(250, 500).coeff == pytest.approx(0.001)


def test_what_a_lease_carries_holds_no_schedule_and_is_a_fixed_point() -> None:
    lease = Hyperparameters(lr_decay=0.9, ramp="fmnist").at(7, 10)
    assert (lease.lr_decay, lease.ramp) == (1.0, "none")
    assert lease.at(0, 1) == lease


@pytest.mark.parametrize("lr_decay", [1e-300, 0.5, 0.99])
def test_a_lease_stays_valid_when_the_rate_has_decayed_to_nothing(lr_decay: float) -> None:
    lease = Hyperparameters(lr_decay=lr_decay).at(99_999, 100_000)
    assert Hyperparameters.from_text(lease.to_text()) == lease


@pytest.mark.parametrize(("round", "rounds"), [(-1, 5), (5, 5), (6, 5), (0, 0)])
def test_a_round_outside_the_run_is_refused(round: int, rounds: int) -> None:
    with pytest.raises(SettingsError, match=f"round {round} "):
        Hyperparameters(ramp="fmnist").at(round, rounds)


@pytest.mark.parametrize(
    "wrong",
    [
        {"epochs": 0},
        {"epochs": 1.5},
        {"batch_size": 0},
        {"batch_size": 4097},
        {"lr": 0},
        {"lr": math.nan},
        {"lr": math.inf},
        {"lr_decay": 0},
        {"lr_decay": 1.1},
        {"threshold_lr": -1e-9},
        {"momentum": 1},
        {"momentum": -0.1},
        {"coeff": -1},
        {"ramp": "linear"},
        {"clip": 0},
        {"learning_rate": 0.1},
    ],
)
def test_values_out_of_range_and_unknown_names_are_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(RecordError):
        Hyperparameters.from_json(wrong)
