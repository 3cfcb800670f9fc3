"""Any sequence of events, stored: what another process reads is what the pure machine says."""

import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

from hypothesis import settings
from hypothesis.stateful import invariant

from server_api import errors
from server_api.rounds import Run, Step
from server_api.sql_store import SqlStore
from server_api.store import Change, Journal, Update
from server_api.summary import Report
from spafl.protocol import BundleView, Capabilities
from tests.property.test_round_machine import BUNDLE, DEVICES, RoundMachine


class StoredRoundMachine(RoundMachine):
    def __init__(self) -> None:
        super().__init__()
        self.directory = tempfile.TemporaryDirectory()
        url = f"sqlite:///{Path(self.directory.name) / 'store.db'}"
        self.store, self.reader = SqlStore(url), SqlStore(url)
        self.store.add_bundle(
            BundleView(id=BUNDLE, name="small", layout="f" * 16, thresholds=1, bytes=1, created=0), b"{}"
        )
        for device in DEVICES:
            self.store.add_device(device, None, Capabilities(), device, 0.0)

    def teardown(self) -> None:
        self.store.close()
        self.reader.close()
        self.directory.cleanup()

    def take(self, act: Callable[..., Step], *arguments: Any) -> Step | None:
        """Returns the step if it is granted, taken by the pure machine and by the store alike."""
        if self.reader.run("run") is None:
            self.store.add_run(self.settings, "f" * 16, b"0", 0.0)
        before, now = self.run, self.now
        pure = super().take(act, *arguments)

        def decide(run: Run, _: Journal) -> Change:
            assert run == before
            step = act(run, *arguments, now)
            report = next((argument for argument in arguments if isinstance(argument, Report)), None)
            update = Update(arguments[0], arguments[1], report, b"") if report else None
            return Change(step, update, b"thresholds")

        try:
            stored = self.store.change("run", now, decide).step
        except errors.Refusal:
            stored = None
        assert stored == pure
        return pure

    @invariant()
    def another_process_reads_the_same_run(self) -> None:
        record = self.reader.run("run")
        assert record is None or record.run == self.run


StoredRoundMachine.TestCase.settings = settings(max_examples=25, stateful_step_count=30, deadline=None)
TestStoredRoundMachine = StoredRoundMachine.TestCase
