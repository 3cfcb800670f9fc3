"""A partition gives every example to exactly one client, gives each enough, and is the same for the same seed."""

import json
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from typer.testing import CliRunner

from spafl.errors import SettingsError
from trainer.data import Dataset, Partition, Split, load_arrays, open_dataset, partition
from trainer.data.command import app
from trainer.errors import DataError


def made_up(train: int, test: int, labels: int, seed: int = 0) -> Split:
    draw = np.random.default_rng(seed)
    names = tuple(map(str, range(labels)))

    def part(n: int) -> Dataset:
        return Dataset(draw.integers(0, 256, (n, 2), np.uint8), draw.integers(0, labels, n), names)

    return Split(part(train), part(test))


@settings(deadline=None, max_examples=60)
@given(
    clients=st.integers(1, 12),
    alpha=st.one_of(st.none(), st.floats(1e-3, 100)),
    seed=st.integers(0, 2**32),
    minimum=st.integers(1, 6),
    labels=st.integers(2, 7),
)
def test_every_example_once_and_the_minimum_holds(clients, alpha, seed, minimum, labels) -> None:
    split = made_up(clients * minimum + seed % 50, clients + seed % 7, labels)
    dealt = partition(split, clients, alpha=alpha, seed=seed, minimum=minimum)
    assert sorted(i for client in dealt.clients for i in client.train) == list(range(len(split.train)))
    assert sorted(i for client in dealt.clients for i in client.test) == list(range(len(split.test)))
    assert min(len(client.train) for client in dealt.clients) >= minimum
    assert min(len(client.test) for client in dealt.clients) >= 1
    assert partition(split, clients, alpha=alpha, seed=seed, minimum=minimum) == dealt


def test_another_seed_is_another_partition() -> None:
    split = made_up(200, 50, 5)
    assert partition(split, 4, seed=0) != partition(split, 4, seed=1)


def test_train_and_test_are_dealt_in_the_same_shares() -> None:
    split = made_up(20_000, 20_000, 5)
    dealt = partition(split, 6, alpha=0.3, seed=3).of(split)
    for part in dealt:
        own, held = (
            data.counts() / split_data.counts()
            for data, split_data in ((part.train, split.train), (part.test, split.test))
        )
        # both are the same shares rounded to whole examples of some 4,000 per label
        np.testing.assert_allclose(own, held, atol=2 / 3500)


def test_alpha_decides_how_unlike_clients_are() -> None:
    split = made_up(5_000, 500, 10)

    def largest_label(alpha: float | None) -> float:
        parts = partition(split, 10, alpha=alpha, seed=0).of(split)
        return float(np.mean([part.train.counts().max() / len(part.train) for part in parts]))

    assert largest_label(None) < largest_label(1.0) < largest_label(0.05)


def test_saved_and_loaded(tmp_path: Path) -> None:
    split = made_up(100, 20, 3)
    dealt = partition(split, 4, seed=5)
    dealt.save(tmp_path / "p.json")
    assert Partition.load(tmp_path / "p.json") == dealt
    with pytest.raises(DataError, match="made from dataset"):
        dealt.of(made_up(100, 20, 3, seed=1))


@pytest.mark.parametrize(
    "change",
    [
        {"format": "other"},
        {"format_version": 2},
        {"source": "abc"},
        {"clients": []},
        {"clients": [{"train": [0, 1], "test": []}, {"train": [1], "test": []}]},
        {"clients": [{"train": [-1], "test": []}]},
        {"clients": [{"train": ["1"], "test": []}]},
        {"extra": 1},
    ],
)
def test_a_file_that_is_no_partition_is_refused(tmp_path: Path, change: dict[str, object]) -> None:
    path = tmp_path / "p.json"
    partition(made_up(60, 20, 3), 2).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(DataError, match="is not a partition"):
        Partition.load(path)


def test_impossible_numbers_are_refused() -> None:
    split = made_up(100, 20, 3)
    for options in (
        {"clients": 11},
        {"clients": 0},
        {"clients": 2, "alpha": 0.0},
        {"clients": 2, "seed": -1},
    ):
        with pytest.raises(SettingsError):
            partition(split, **options)


def test_the_command_writes_what_a_device_reads(tmp_path: Path) -> None:
    arguments = ["split", "digits", "--clients", "3", "--out", str(tmp_path / "out"), "--json"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    written = json.loads(result.stdout)
    digits = open_dataset("digits")
    parts = Partition.load(Path(written["partition"])).of(digits)
    for client, part in zip(written["clients"], parts, strict=True):
        saved = load_arrays(Path(client["file"]))
        np.testing.assert_array_equal(saved.train.x, part.train.x)
        np.testing.assert_array_equal(saved.test.y, part.test.y)
        assert saved.train.labels == digits.train.labels
        assert sum(client["train"]) == len(part.train)
    assert len(np.load(written["test"])["y"]) == len(digits.test)
    again = CliRunner().invoke(app, arguments)
    assert isinstance(again.exception, SettingsError)


@pytest.mark.parametrize(
    "arguments", [["show", "digits"], ["split", "digits", "--clients", "14", "--out", "x"]]
)
def test_the_command_prints_tables(tmp_path: Path, monkeypatch, arguments: list[str]) -> None:
    monkeypatch.chdir(tmp_path)
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "examples by" in result.stdout
