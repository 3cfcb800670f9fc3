"""Runs, rounds and leases as the protocol's messages."""

from server_api.rounds import Run
from server_api.store import RunRecord
from server_api.summary import summarise
from spafl.protocol import Lease, RoundView, RunView


def run_view(record: RunRecord) -> RunView:
    """Returns the run as operators and devices see it."""
    run = record.run
    return RunView(
        run=run.settings.name,
        settings=run.settings,
        state=run.state,
        layout=record.layout,
        round=run.round.number if run.round else None,
        version=run.version,
        created=record.created,
        rounds_done=run.rounds_done,
        rounds_failed=run.rounds_failed,
    )


def open_round(run: Run) -> RoundView | None:
    """Returns the run's open round with its figures so far, None if none is open."""
    round = run.round
    if round is None:
        return None
    summary = summarise(round.reports)
    return RoundView(
        run=run.settings.name,
        round=round.number,
        state="open",
        version=round.version,
        opened=round.opened,
        deadline=round.deadline,
        extended=round.extended,
        leased=round.taken,
        reported=len(round.reports),
        target=run.settings.target,
        minimum=run.settings.least,
        loss=summary.loss,
        accuracy=summary.accuracy,
        density=summary.density,
    )


def lease(run: Run, device: str, layout: str) -> Lease:
    """Returns the lease `device` holds in the run's open round."""
    settings, round = run.settings, run.round
    assert round is not None, "a lease is of an open round"
    return Lease(
        run=settings.name,
        round=round.number,
        version=round.version,
        bundle=settings.bundle,
        layout=layout,
        expires=round.leases[device],
        deadline=round.deadline,
        rounds=settings.rounds,
        precision=settings.precision,
        hyperparameters=settings.hyperparameters.at(run.rounds_done, settings.rounds),
        policy=settings.policy,
    )
