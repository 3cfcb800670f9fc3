import json
import stat
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from device_runtime.errors import StateError, StateInUse
from device_runtime.journal import Identity, Progress
from device_runtime.state import DeviceState, read_identity, read_journal, snapshot
from spafl.bundle import Bundle
from tests.device_runtime.tiny import TOKEN, NumpyEngine, make_lease, tiny_bundle


def begin(state: DeviceState, bundle: Bundle) -> NumpyEngine:
    state.leased(make_lease(bundle))
    engine = NumpyEngine(bundle)
    tensors, base = state.rest(bundle)
    engine.begin_round(tensors, base, base)
    return engine


def files(state: DeviceState) -> set[str]:
    return {file.name for file in state.path.iterdir()}


def test_a_new_device_starts_from_the_bundle(state: DeviceState, bundle: Bundle) -> None:
    assert not state.begun
    state.leased(make_lease(bundle))
    tensors, base = state.rest(bundle)
    initial = bundle.initial_state()
    assert all(np.array_equal(tensors[name], initial[name]) for name in initial)
    assert np.array_equal(base, bundle.initial_thresholds())
    assert state.journal.version == 0


def test_what_is_written_is_what_is_read(state: DeviceState, bundle: Bundle) -> None:
    engine = begin(state, bundle)
    base = np.array([1, 2, 3, 4], np.float32)
    state.checkpointed(engine.checkpoint(), base, Progress(epoch=1, batch=2, loss=0.5))
    reopened = reopen(state)
    tensors, base_read, progress = reopened.resumed()
    assert np.array_equal(base_read, base)
    assert progress == Progress(epoch=1, batch=2, loss=0.5)
    expected = engine.checkpoint()
    assert set(tensors) == set(expected)
    assert all(np.array_equal(tensors[name], expected[name]) for name in expected)
    assert tensors["active.hidden"].dtype == np.int64


def reopen(state: DeviceState) -> DeviceState:
    state.close()
    state.__init__(state.path)  # type: ignore[misc]  # as a new process would
    return state


def test_tensors_in_any_memory_order_and_without_axes_survive(state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle))
    turned = np.arange(6, dtype=np.float32).reshape(2, 3).T
    state.checkpointed({"turned": turned, "count": np.array(7)}, np.zeros(4, np.float32), Progress())
    tensors, *_ = state.resumed()
    assert np.array_equal(tensors["turned"], turned)
    assert tensors["count"].shape == ()


def test_only_files_the_journal_names_remain(state: DeviceState, bundle: Bundle) -> None:
    engine = begin(state, bundle)
    base = np.zeros(4, np.float32)
    for _ in range(3):
        state.checkpointed(engine.checkpoint(), base, Progress())
    assert len([name for name in files(state) if name.endswith(".safetensors")]) == 1
    state.trained(engine.end_round(), base, "{}")
    assert len([name for name in files(state) if name.endswith(".safetensors")]) == 1
    (state.path / "state-99.safetensors").write_bytes(b"left by a kill")
    (state.path / "journal.json.part").write_bytes(b"left by a kill")
    reopened = reopen(state)
    assert "state-99.safetensors" not in files(reopened)
    assert "journal.json.part" not in files(reopened)


def test_after_a_round_base_is_what_it_began_from(state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle, version=5))
    target = np.array([0.5, 0, 0, 0], np.float32)
    tensors = {**bundle.initial_state(), "hidden.threshold": np.full(4, 9, np.float32)}
    state.trained(tensors, target, "{}")
    state.settled("late")
    read, base = state.rest(bundle)
    assert np.array_equal(base, target)
    assert np.array_equal(read["hidden.threshold"], np.full(4, 9))
    assert (state.journal.version, state.journal.phase) == (5, "idle")


def test_a_diverged_round_leaves_the_model_before_it(state: DeviceState, bundle: Bundle) -> None:
    engine = begin(state, bundle)
    state.trained(bundle.initial_state(), np.zeros(4, np.float32), "{}")
    state.settled("updates")
    before = state.journal.state
    state.leased(make_lease(bundle, number=2))
    state.checkpointed(engine.checkpoint(), np.zeros(4, np.float32), Progress())
    state.diverged()
    assert (state.journal.state, state.journal.checkpoint, state.journal.skip) == (before, None, 2)


def test_one_process_at_a_time(state: DeviceState) -> None:
    with pytest.raises(StateInUse, match="in use by process"):
        DeviceState(state.path)
    state.close()
    DeviceState(state.path).close()


def test_a_lock_ends_with_its_process(tmp_path: Path) -> None:
    script = (
        f"import os, signal; from device_runtime.state import DeviceState; DeviceState({str(tmp_path)!r});"
        "os.kill(os.getpid(), signal.SIGKILL)"
    )
    assert subprocess.run([sys.executable, "-c", script], check=False).returncode == -9
    DeviceState(tmp_path).close()


def test_the_token_is_private_and_masked(state: DeviceState, identity: Identity) -> None:
    file = state.path / "identity.json"
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert stat.S_IMODE(state.path.stat().st_mode) == 0o700
    read = read_identity(state.path)
    assert read == identity
    assert read.token.reveal() == TOKEN
    assert TOKEN not in repr(read) + str(read) + read.to_text()
    assert TOKEN not in repr(state) + repr(vars(state))


def test_a_damaged_identity_is_refused_without_showing_the_token(state: DeviceState) -> None:
    file = state.path / "identity.json"
    file.write_text(json.dumps({"server": 7, "device": "d1", "token": TOKEN}))
    with pytest.raises(StateError, match=r"identity\.json is damaged") as caught:
        read_identity(state.path)
    assert TOKEN not in str(caught.value)


def test_a_damaged_journal_is_refused_in_words(state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle))
    journal = state.path / "journal.json"
    journal.write_bytes(journal.read_bytes()[:-20])
    with pytest.raises(StateError, match=r"journal\.json is damaged or of another version"):
        read_journal(state.path)


@pytest.mark.parametrize("name", ["../../etc/passwd", "state-1.safetensors/../x", "/tmp/state-1.safetensors"])
def test_a_journal_names_no_file_elsewhere(state: DeviceState, bundle: Bundle, name: str) -> None:
    state.leased(make_lease(bundle))
    journal = state.path / "journal.json"
    journal.write_text(json.dumps({**json.loads(journal.read_text()), "state": name}))
    with pytest.raises(StateError, match="state"):
        read_journal(state.path)


def test_a_damaged_state_file_is_refused_in_words(state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle))
    state.trained(bundle.initial_state(), np.zeros(4, np.float32), "{}")
    file = state.path / str(state.journal.state)
    for content in (b"", file.read_bytes()[:-1]):
        file.write_bytes(content)
        with pytest.raises(StateError, match="missing or damaged"):
            state.rest(bundle)
    file.unlink()
    with pytest.raises(StateError, match="missing or damaged"):
        state.rest(bundle)


def test_a_state_of_another_model_is_refused(state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle))
    state.trained({"other.weight": np.zeros(3, np.float32)}, np.zeros(4, np.float32), "{}")
    with pytest.raises(StateError, match="is not a state of tiny"):
        state.rest(bundle)


def test_a_state_belongs_to_one_run(state: DeviceState, bundle: Bundle) -> None:
    state.leased(make_lease(bundle))
    with pytest.raises(StateError, match="give another --state"):
        state.leased(replace(make_lease(bundle), run="other"))


def test_a_snapshot_needs_no_lock(state: DeviceState, bundle: Bundle) -> None:
    with pytest.raises(StateError, match="holds no model yet"):
        snapshot(state.path)
    tiny_bundle(state.bundle_path)
    state.leased(make_lease(bundle))
    journal, held, tensors = snapshot(state.path)
    assert journal == state.journal
    assert held.id == bundle.id
    assert set(tensors) == set(bundle.initial_state())


def test_a_file_is_no_state_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(StateError, match="cannot use"):
        DeviceState(tmp_path / "file")
