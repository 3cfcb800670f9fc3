"""Runs: create, look at and steer them."""

from fastapi import APIRouter, Response

from server_api import rounds, views
from server_api.dependencies import Rounds, RunName, admin, member
from spafl.protocol import RunSettings, RunView

router = APIRouter(prefix="/runs", tags=["runs"])


@router.post(
    "",
    status_code=201,
    dependencies=admin,
    responses={200: {"model": RunView, "description": "There already, with these very settings."}},
)
def create_run(settings: RunSettings, coordinator: Rounds, response: Response) -> RunView:
    """Returns the run with these settings; its id is their name."""
    run, new = coordinator.create(settings)
    if not new:
        response.status_code = 200
    return run


@router.get("", dependencies=member)
def list_runs(coordinator: Rounds) -> list[RunView]:
    """Returns every run, the newest first."""
    return [views.run_view(record) for record in coordinator.store.runs()]


@router.get("/{run}", dependencies=member)
def show_run(run: RunName, coordinator: Rounds) -> RunView:
    """Returns one run."""
    return views.run_view(coordinator.record(run))


@router.post("/{run}/start", dependencies=admin)
def start_run(run: RunName, coordinator: Rounds) -> RunView:
    """Returns the run with its first round open; a running run stays as it is."""
    return coordinator.steer(run, rounds.start)


@router.post("/{run}/pause", dependencies=admin)
def pause_run(run: RunName, coordinator: Rounds) -> RunView:
    """Returns the run granting no more leases; devices at work may still report."""
    return coordinator.steer(run, rounds.pause)


@router.post("/{run}/resume", dependencies=admin)
def resume_run(run: RunName, coordinator: Rounds) -> RunView:
    """Returns the run going on; its round's deadline moves by the time it was paused."""
    return coordinator.steer(run, rounds.resume)


@router.post("/{run}/stop", dependencies=admin)
def stop_run(run: RunName, coordinator: Rounds) -> RunView:
    """Returns the run ended for good."""
    return coordinator.steer(run, rounds.stop)
