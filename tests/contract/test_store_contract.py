"""What every store keeps, whichever database is underneath."""

import threading
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import pytest

from server_api import errors, rounds
from server_api.rounds import Run, Step
from server_api.sql_store import SqlStore
from server_api.store import Change, Decision, Journal, Principal, Store, Update
from server_api.summary import Report
from spafl.canonical import sha256_hex
from spafl.protocol import BundleView, Capabilities, Metrics, RunSettings

BUNDLE = BundleView(id="b" * 64, name="small", layout="f" * 16, thresholds=7, bytes=99, created=5.0)

Opener = Callable[[], Store]


def sqlite(directory: Path) -> Opener:
    return lambda: SqlStore(f"sqlite:///{directory / 'store.db'}")


STORES = {"sqlite": sqlite}


@pytest.fixture(params=list(STORES))
def opener(request: pytest.FixtureRequest, tmp_path: Path) -> Opener:
    return STORES[request.param](tmp_path)


@pytest.fixture
def store(opener: Opener) -> Iterator[Store]:
    store = opener()
    yield store
    store.close()


def settings(name: str = "run", **changes: object) -> RunSettings:
    return RunSettings.from_json(
        {"name": name, "bundle": BUNDLE.id, "target": 2, "rounds": 3, "deadline": 100, "lease": 30, **changes}
    )


def update(device: str, round: int = 1, body: bytes = b"body", examples: int = 4) -> Update:
    return Update(round, device, Report(f"digest of {body!r}", Metrics(examples=examples)), body)


def acting(act: Callable[[Run], Step], update: Update | None = None) -> Decision:
    """Returns a decision that applies `act`; the body of an aggregated version spells the journal."""

    def decide(run: Run, journal: Journal) -> Change:
        step = act(run)
        thresholds = None
        for effect in step.effects:
            if effect.kind == "round.aggregated" and effect.round is not None:
                counted = [entry.body for entry in journal.updates(effect.round)]
                thresholds = b"|".join([*counted, update.body if update else b""])
        return Change(step, update, thresholds)

    return decide


def with_run(store: Store, *devices: str, **changes: object) -> None:
    store.add_bundle(BUNDLE, b"{}")
    assert store.add_run(settings(**changes), BUNDLE.layout, b"version 0", 10.0)
    for device in devices:
        store.add_device(device, None, Capabilities(), sha256_hex(device.encode()), 10.0)
    store.change("run", 11.0, acting(lambda run: rounds.start(run, 11.0)))
    for device in devices:
        store.change("run", 12.0, acting(lambda run, device=device: rounds.check_in(run, device, 12.0)))


def report(store: Store, entry: Update, now: float = 13.0) -> Change:
    def act(run: Run) -> Step:
        return rounds.report(run, entry.round, entry.device, run.version, entry.report, now)

    return store.change("run", now, acting(act, entry))


def state(store: Store) -> Run:
    record = store.run("run")
    assert record is not None
    return record.run


def test_a_token_is_known_by_its_digest_and_by_nothing_like_it(store):
    digest = "0123456789abcdef" * 4
    store.add_device("d1", "phone", Capabilities(engine="onnx"), digest, 1.0)
    assert store.principal(digest) == Principal("device", "d1")
    for other in (digest[:-1] + "0", "1" + digest[1:], digest[:32], digest.upper(), "", "%", "_" * 64):
        assert store.principal(other) is None


def test_a_replaced_token_is_unknown(store):
    assert not store.has_token("admin")
    store.replace_tokens("admin", "a" * 64)
    store.replace_tokens("enrolment", "e" * 64)
    assert store.principal("a" * 64) == Principal("admin")
    store.replace_tokens("admin", "c" * 64)
    assert store.principal("a" * 64) is None
    assert store.principal("c" * 64) == Principal("admin")
    assert store.principal("e" * 64) == Principal("enrolment")
    assert store.has_token("admin")


def test_bundles_are_kept_once(store):
    assert store.add_bundle(BUNDLE, b'{"a":1}')
    assert not store.add_bundle(replace(BUNDLE, name="other"), b"{}")
    assert store.bundle(BUNDLE.id) == BUNDLE
    assert store.bundles() == [BUNDLE]
    assert store.manifest(BUNDLE.id) == b'{"a":1}'
    assert store.bundle("0" * 64) is None
    assert store.manifest("0" * 64) is None


def test_a_run_starts_with_version_0_and_one_event(store):
    store.add_bundle(BUNDLE, b"{}")
    assert store.add_run(settings(), BUNDLE.layout, b"version 0", 10.0)
    assert not store.add_run(settings(target=5), BUNDLE.layout, b"other", 11.0)
    assert state(store) == Run(settings())
    assert store.thresholds("run", 0) == b"version 0"
    assert store.thresholds("run", 1) is None
    events = store.events("run", 0, 10)
    assert [(event.id, event.kind, event.time) for event in events] == [(1, "run.created", 10.0)]


def test_a_run_needs_its_bundle(store):
    with pytest.raises(Exception, match=r"(?i)foreign key"):
        store.add_run(settings(), BUNDLE.layout, b"version 0", 10.0)
    assert store.run("run") is None
    assert store.events("run", 0, 10) == []


def test_runs_are_listed_the_newest_first_and_live_ones_alone(store):
    store.add_bundle(BUNDLE, b"{}")
    for number, name in enumerate(("one", "two", "three")):
        store.add_run(settings(name), BUNDLE.layout, b"0", float(number))
    store.change("two", 5.0, acting(lambda run: rounds.stop(run, 5.0)))
    assert [record.run.settings.name for record in store.runs()] == ["three", "two", "one"]
    assert [record.run.settings.name for record in store.runs(live=True)] == ["three", "one"]


def test_a_counted_update_keeps_its_bytes(store):
    with_run(store, "d1", "d2")
    entry = update("d1", body=bytes(range(256)))
    report(store, entry)
    assert list(store.updates("run", 1)) == [entry]
    assert store.counted("run", 1, "d1") == entry.report.digest
    assert store.counted("run", 1, "d2") is None
    assert store.counted("run", 2, "d1") is None


def test_the_journal_ascends_by_device_whoever_came_first(store):
    devices = ["d10", "d9", "D1", "d1", "e", "d_1", "d-1"]
    with_run(store, *devices, target=9, minimum=1)
    for device in devices:
        report(store, update(device, body=device.encode()))
    assert [entry.device for entry in store.updates("run", 1)] == sorted(devices)


def test_aggregation_sees_the_journal_inside_the_change(store):
    with_run(store, "d1", "d2")
    report(store, update("d1", body=b"one"))
    change = report(store, update("d2", body=b"two"))
    assert change.step.run.version == 1
    assert store.thresholds("run", 1) == b"one|two"
    (view,) = store.rounds("run", 0, 10)
    assert (view.state, view.reported, view.leased, view.version, view.closed) == (
        "aggregated",
        2,
        2,
        0,
        13.0,
    )
    assert store.rounds("run", 1, 10) == []


def test_a_refused_change_changes_nothing(store):
    with_run(store, "d1")
    before, events = store.run("run"), store.events("run", 0, 100)
    with pytest.raises(errors.NotLeased):
        report(store, update("nobody"))
    assert store.run("run") == before
    assert store.events("run", 0, 100) == events
    assert list(store.updates("run", 1)) == []


def test_a_change_of_no_run(store):
    with pytest.raises(errors.NotFound, match="no run 'run'"):
        store.change("run", 1.0, acting(lambda run: Step(run)))


def test_events_count_from_one_without_gaps(store):
    with_run(store, "d1", "d2")
    report(store, update("d1"))
    report(store, update("d2"))
    events = store.events("run", 0, 100)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events][-3:] == ["update.accepted", "round.aggregated", "round.opened"]
    assert store.events("run", 3, 2) == events[3:5]
    record = store.run("run")
    assert record is not None
    assert record.revision == len(events)


def test_devices_tell_when_they_were_seen_and_how_often_counted(store):
    with_run(store, "d1", "d2", target=3)
    report(store, update("d1"), now=20.0)
    one, two = store.devices("", 10)
    assert (one.device, one.created, one.last_seen, one.updates) == ("d1", 10.0, 20.0, 1)
    assert (two.device, two.created, two.last_seen, two.updates) == ("d2", 10.0, 12.0, 0)
    assert store.devices("d1", 10) == [two]
    assert store.devices("", 1) == [one]


def test_what_a_device_says_at_check_in_is_kept(store):
    with_run(store)
    store.add_device("d1", "phone", Capabilities(engine="onnx"), "1" * 64, 10.0)
    newer = Capabilities(engine="onnx", version="2")
    store.change("run", 12.0, lambda run, _: Change(rounds.check_in(run, "d1", 12.0), capabilities=newer))
    assert store.devices("", 10)[0].capabilities == newer


STORY: list[tuple[float, Callable[[Run, float], Step]]] = [
    (11.0, rounds.start),
    (12.0, lambda run, now: rounds.check_in(run, "d1", now)),
    (20.0, lambda run, now: rounds.check_in(run, "d2", now)),
    (43.0, rounds.settle),
    (44.0, lambda run, now: rounds.check_in(run, "d1", now)),
    (50.0, rounds.pause),
    (60.0, rounds.resume),
    (121.0, rounds.settle),
    (122.0, lambda run, now: rounds.check_in(run, "d2", now)),
    (230.0, rounds.settle),
    (231.0, lambda run, now: rounds.close(run, 2, now)),
    (232.0, lambda run, now: rounds.close(run, 3, now)),
    (233.0, rounds.resume),
    (234.0, lambda run, now: rounds.check_in(run, "d2", now)),
    (240.0, rounds.stop),
]


def test_a_reopened_store_knows_the_run_after_every_event(opener):
    store = opener()
    store.add_bundle(BUNDLE, b"{}")
    store.add_run(settings(minimum=1), BUNDLE.layout, b"version 0", 10.0)
    for device in ("d1", "d2"):
        store.add_device(device, None, Capabilities(), sha256_hex(device.encode()), 10.0)
    expected, kinds = Run(settings(minimum=1)), set()
    for now, act in STORY:
        step = act(expected, now)
        assert store.change("run", now, acting(lambda run, act=act, now=now: act(run, now))).step == step
        expected = step.run
        kinds |= {effect.kind for effect in step.effects}
        store.close()
        store = opener()
        assert state(store) == expected
    store.close()
    assert {"lease.expired", "round.extended", "round.failed", "run.paused", "run.resumed"} <= kinds


def test_reports_survive_a_reopened_store(opener):
    store = opener()
    with_run(store, "d1", "d2", target=3)
    expected = report(store, update("d1", examples=7)).step.run
    store.close()
    store = opener()
    assert state(store) == expected
    store.close()


def test_two_stores_on_one_database_see_each_others_changes(opener):
    one, other = opener(), opener()
    with_run(one, "d1", "d2", target=3)
    assert state(other) == state(one)
    report(one, update("d1"))
    assert state(other).round.reports.keys() == {"d1"}
    report(other, update("d2"))
    assert state(one).round.reports.keys() == {"d1", "d2"}
    one.close()
    other.close()


def test_concurrent_changes_are_all_kept_and_each_device_counts_once(opener):
    devices = [f"d{number:03}" for number in range(60)]
    stores = [opener(), opener()]
    with_run(stores[0], *devices, target=len(devices))
    barrier, accepted = threading.Barrier(12), []

    def send(number: int) -> None:
        barrier.wait(30)
        # every device's update is sent by three threads on two stores
        for device in devices[number % 4 :: 4]:
            change = report(stores[number % 2], update(device, body=device.encode()))
            if change.step.effects:
                accepted.append(device)

    with ThreadPoolExecutor(12) as pool:
        results = [pool.submit(send, number) for number in range(12)]
        failures = {repr(result.exception()) for result in results if result.exception()}
    # only those who came after the round was complete may have been refused
    assert failures <= {repr(errors.RoundClosed("round 1 of run run is closed: check in for another"))}
    assert sorted(accepted) == devices
    # the one that closed the round comes last; which it was the threads cannot tell
    *counted, last = stores[0].thresholds("run", 1).decode().split("|")
    assert counted == sorted(counted)
    assert sorted([*counted, last]) == devices
    events = stores[0].events("run", 0, 1000)
    assert [event.id for event in events] == list(range(1, len(events) + 1))
    assert [event.kind for event in events].count("update.accepted") == len(devices)
    for store in stores:
        store.close()


def test_one_bad_change_does_not_spoil_those_written_with_it(opener, monkeypatch):
    store = opener()
    with_run(store, "d1", "d2", target=3)
    gate = threading.Event()

    def wait(run: Run, _: Journal) -> Change:
        gate.wait(30)
        return Change(Step(run))

    def unknown_device(run: Run, _: Journal) -> Change:
        return Change(rounds.check_in(run, "never enrolled", 13.0))

    with ThreadPoolExecutor(3) as pool:
        first = pool.submit(store.change, "run", 13.0, wait)
        bad = pool.submit(store.change, "run", 13.0, unknown_device)
        good = pool.submit(report, store, update("d1"))
        gate.set()
        assert first.result(30).step.effects == ()
        with pytest.raises(Exception, match=r"(?i)foreign key"):
            bad.result(30)
        assert good.result(30).step.effects[0].kind == "update.accepted"
    assert store.counted("run", 1, "d1")
    assert state(store).round.leases.keys() == {"d2"}
    store.close()
