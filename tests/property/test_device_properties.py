from datetime import UTC, datetime
from email.utils import format_datetime

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from device_runtime.conditions import Reading, unmet
from device_runtime.examples import Examples, batches, split
from device_runtime.retry import MAX_RETRY_AFTER, Backoff, retry_after_seconds
from spafl.protocol import Policy

seeds = st.integers(0, 2**32)


@given(st.integers(1, 500), st.integers(1, 64), seeds, st.integers(0, 10_000), st.integers(0, 1000))
def test_an_epoch_holds_every_example_once_and_is_the_same_each_time(
    count: int, size: int, seed: int, round: int, epoch: int
) -> None:
    order = batches(count, size, seed, round, epoch)
    assert sorted(np.concatenate(order).tolist()) == list(range(count))
    assert all(len(batch) == size for batch in order[:-1])
    assert 1 <= len(order[-1]) <= size
    again = batches(count, size, seed, round, epoch)
    assert all(np.array_equal(one, other) for one, other in zip(order, again, strict=True))


@given(seeds, st.integers(0, 100), st.integers(0, 100))
def test_epochs_and_rounds_have_orders_of_their_own(seed: int, round: int, epoch: int) -> None:
    order = np.concatenate(batches(64, 8, seed, round, epoch))
    for other in (batches(64, 8, seed, round, epoch + 1), batches(64, 8, seed, round + 1, epoch)):
        assert not np.array_equal(order, np.concatenate(other))


@given(st.integers(0, 300), st.floats(0, 0.99), seeds)
def test_a_split_loses_and_repeats_nothing(count: int, share: float, seed: int) -> None:
    examples = Examples(np.arange(count, dtype=np.float32)[:, None], np.arange(count))
    data = split(examples, share, seed)
    assert sorted([*data.train.y.tolist(), *data.validation.y.tolist()]) == list(range(count))
    assert len(data.validation) == int(count * share)
    assert np.array_equal(data.train.x[:, 0], data.train.y)
    assert np.array_equal(split(examples, share, seed).validation.y, data.validation.y)


@given(st.floats(0, 1, exclude_max=True), st.integers(0, 10_000), st.none() | st.floats(0, MAX_RETRY_AFTER))
def test_a_wait_is_bounded_and_never_shorter_than_asked(
    draw: float, attempt: int, asked: float | None
) -> None:
    backoff = Backoff(first=0.5, cap=30)
    delay = backoff.delay(attempt, draw, asked)
    assert (asked or 0) <= delay <= max(30, asked or 0)
    assert backoff.delay(attempt, draw) <= 0.5 * 2 ** min(attempt, 30)


@given(st.text(max_size=60), st.floats(0, 4e9))
def test_any_retry_after_is_a_bounded_wait_or_none(value: str, now: float) -> None:
    seconds = retry_after_seconds(value, now)
    assert seconds is None or 0 <= seconds <= MAX_RETRY_AFTER


@given(st.integers(0, int(MAX_RETRY_AFTER)), st.integers(0, 4_000_000_000))
def test_a_date_and_its_seconds_mean_the_same(ahead: int, now: int) -> None:
    date = format_datetime(datetime.fromtimestamp(now + ahead, UTC), usegmt=True)
    assert retry_after_seconds(date, now) == retry_after_seconds(str(ahead), now) == ahead
    assert retry_after_seconds(date, now + ahead + 1) == 0


optional_flags = st.none() | st.booleans()
readings = st.builds(
    Reading,
    st.none() | st.floats(0, 100),
    optional_flags,
    optional_flags,
    optional_flags,
    st.none() | st.floats(-40, 149),
)
policies = st.builds(
    Policy,
    min_battery_percent=st.floats(0, 100),
    require_charging=st.booleans(),
    require_unmetered=st.booleans(),
    require_idle=st.booleans(),
    max_temperature_celsius=st.none() | st.floats(0, 150),
)


@given(policies, readings)
def test_knowing_less_is_never_a_reason_and_a_policy_without_demands_never_refuses(
    policy: Policy, reading: Reading
) -> None:
    assert unmet(policy, Reading()) == []
    assert unmet(Policy(), reading) == []
    known = [
        reading.battery_percent is not None,
        reading.charging is False,
        reading.unmetered is False,
        reading.idle is False,
        reading.temperature_celsius is not None,
    ]
    assert len(unmet(policy, reading)) <= sum(known)
