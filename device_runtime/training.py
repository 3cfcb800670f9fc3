"""One round of local training: from a lease to new thresholds, in steps that may be interrupted at any of them."""

import json
import math
import time
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from device_runtime.engines import Engine
from device_runtime.errors import DataError, Diverged
from device_runtime.examples import Examples, LocalData, batches
from device_runtime.journal import Progress
from device_runtime.report import Report
from device_runtime.state import DeviceState
from device_runtime.watch import Watch
from spafl import algorithm
from spafl.bundle import check_state
from spafl.errors import BundleError, WireError
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats
from spafl.manifest import Manifest
from spafl.protocol import Metrics
from spafl.wire import Precision, Thresholds, encode_thresholds

MAX_LOSS = 1e6
"""The protocol's bound on a reported loss; beyond it a model is lost, but not yet NaN."""

_PREDICTED_AT_ONCE = 2048
"""Examples: enough that opening the model hardly counts, few enough to fit in memory as floats."""

_ADVICE = (
    "scale the examples (bytes are scaled for you) or lower the run's lr; the model before the round is kept"
)


@dataclass(frozen=True, slots=True)
class Tempo:
    """How often a round is saved: after that many seconds, and, if given, after that many steps."""

    seconds: float = 15.0
    steps: int | None = None


class LocalRound:
    """The round whose lease `state` holds, trained by `engine` on `data`: `begin` or `resume`, then `run`."""

    def __init__(
        self,
        engine: Engine,
        state: DeviceState,
        data: LocalData,
        *,
        watch: Watch,
        report: Report,
        tempo: Tempo | None = None,
    ) -> None:
        self._engine = engine
        self._manifest = engine.manifest
        self._state = state
        self._data = data
        self._watch = watch
        self._report = report
        self._tempo = tempo or Tempo()
        self._lease = state.lease
        self._base: Floats = np.empty(0, np.float32)
        self._progress = Progress()
        self._saved_at = time.monotonic()

    def begin(self, tensors: dict[str, Floats], base: Floats, target: Floats, seed: int) -> None:
        """Returns nothing; the model `tensors` has caught up from thresholds `base` to `target`, and may train.

        seed   of the order of the batches
        """
        start = self._engine.begin_round(tensors, base, target)
        self._base = target
        self._progress = Progress(seed=seed, collapsed=start.collapsed)
        self._report.event(
            "round.begun",
            round=self._lease.round,
            version=self._lease.version,
            density=start.density,
            collapsed=start.collapsed,
        )

    def resume(self) -> None:
        """Returns nothing; the engine is where the last checkpoint left it."""
        checkpoint, self._base, self._progress = self._state.resumed()
        self._engine.resume(checkpoint)
        at = self._progress
        self._report.event(
            "round.resumed", round=self._lease.round, epoch=at.epoch, batch=at.batch, steps=at.steps
        )

    def run(self) -> None:
        """Returns nothing; the state's phase is `trained`.

        Raises:
            Diverged: a loss, weight or threshold is not finite.
            Stopped: a signal came; the round is saved.
            DataError: no batch has the two examples that batch statistics need.
        """
        hyperparameters = self._lease.hyperparameters
        for epoch in range(self._progress.epoch, hyperparameters.epochs):
            self._epoch(epoch, hyperparameters)
        tensors = self._engine.end_round()
        self._check(tensors)
        metrics = self._metrics(tensors).present()
        # ASCII, as a header must be: layer names need not be
        self._state.trained(tensors, self._base, json.dumps(metrics, separators=(",", ":")))
        self._report.event(
            "round.trained", round=self._lease.round, dropped=self._progress.dropped, **metrics
        )

    def _epoch(self, epoch: int, hyperparameters: Hyperparameters) -> None:
        train, lease = self._data.train, self._lease
        if epoch != self._progress.epoch:
            self._advance(epoch=epoch, batch=0, examples=0, correct=0, loss=0.0)
        order = batches(len(train), hyperparameters.batch_size, self._progress.seed, lease.round, epoch)
        # one example alone has no variance, and the statistics of a norm would be divided by zero
        least = 2 if any(tensor.role == "statistic" for tensor in self._manifest.state) else 1
        if len(order[0]) < least:
            raise DataError(
                f"{len(train)} examples in batches of {hyperparameters.batch_size}: a model with batch norm trains on "
                f"batches of at least {least}"
            )
        title = f"round {lease.round}, epoch {epoch + 1} of {hyperparameters.epochs}"
        for number, indices in enumerate(order[self._progress.batch :], self._progress.batch + 1):
            if self._watch.disturbed(lease.policy):
                self._save()
                self._watch.hold(lease.policy)
            if len(indices) < least:
                self._advance(batch=number, dropped=self._progress.dropped + len(indices))
            else:
                loss = self._step(train.take(indices), number, hyperparameters)
                self._report.step(title, number, len(order), loss)
        at = self._progress
        self._report.event(
            "epoch",
            round=lease.round,
            epoch=epoch,
            loss=at.loss / at.examples,
            accuracy=at.correct / at.examples,
            examples=at.examples,
            seconds=round(at.seconds, 3),
        )

    def _step(self, batch: Examples, number: int, hyperparameters: Hyperparameters) -> float:
        started = time.monotonic()
        result = self._engine.step(batch.inputs(self._manifest.input), batch.y, hyperparameters)
        if not math.isfinite(result.loss):
            raise Diverged(f"the loss is {result.loss} after {self._progress.steps} steps: {_ADVICE}")
        at = self._progress
        self._advance(
            batch=number,
            examples=at.examples + len(batch),
            correct=at.correct + result.correct,
            loss=at.loss + result.loss * len(batch),
            steps=at.steps + 1,
            seconds=at.seconds + time.monotonic() - started,
        )
        every = self._tempo.steps
        if time.monotonic() - self._saved_at >= self._tempo.seconds or (
            every and (at.steps + 1) % every == 0
        ):
            self._save()
        return result.loss

    def _save(self) -> None:
        self._state.checkpointed(self._engine.checkpoint(), self._base, self._progress)
        self._saved_at = time.monotonic()
        self._report.event("checkpoint", round=self._lease.round, steps=self._progress.steps)

    def _check(self, tensors: dict[str, Floats]) -> None:
        try:
            check_state(self._manifest, tensors)
            update_body(self._manifest, tensors, self._lease.version, self._lease.precision)
        except (BundleError, WireError) as error:
            raise Diverged(f"{error} after {self._progress.steps} steps: {_ADVICE}") from error

    def _metrics(self, tensors: dict[str, Floats]) -> Metrics:
        at, validation = self._progress, self._data.validation
        density = algorithm.densities(self._manifest.layout, tensors).values()
        return Metrics(
            examples=len(self._data.train),
            loss=min(at.loss / at.examples, MAX_LOSS),
            accuracy=accuracy(self._engine, tensors, validation) if len(validation) else None,
            density=tuple(round(share, 6) for share in density),
            steps=at.steps,
            seconds=round(at.seconds, 3),
            collapsed=at.collapsed,
        )

    def _advance(self, **changes: Any) -> None:
        self._progress = replace(self._progress, **changes)


def update_body(manifest: Manifest, tensors: dict[str, Floats], version: int, precision: Precision) -> bytes:
    """Returns the thresholds of `tensors`, trained from global `version`, as bytes for the wire: the same each time.

    Raises:
        WireError: a threshold is not finite in `precision`.
    """
    return encode_thresholds(manifest.layout, Thresholds(manifest.layout.join(tensors), version), precision)


def accuracy(engine: Engine, tensors: dict[str, Floats], examples: Examples) -> float:
    """Returns the share of `examples` that the model with state `tensors` labels right."""
    right = 0
    for start in range(0, len(examples), _PREDICTED_AT_ONCE):
        batch = examples.take(np.arange(start, min(start + _PREDICTED_AT_ONCE, len(examples))))
        logits = engine.predict(tensors, batch.inputs(engine.manifest.input))
        right += int((logits.argmax(axis=1) == batch.y).sum())
    return right / len(examples)
