"""Rounds of a run: list, show, close now."""

from typing import Annotated

from fastapi import APIRouter, Query

from server_api.dependencies import Limit, RoundNumber, Rounds, RunName, admin
from spafl.protocol import RoundView

router = APIRouter(prefix="/runs/{run}/rounds", tags=["rounds"], dependencies=admin)


@router.get("")
def list_rounds(
    run: RunName,
    coordinator: Rounds,
    limit: Limit = 1000,
    after: Annotated[int, Query(ge=0, le=2**31 - 1, description="List from above this number.")] = 0,
) -> list[RoundView]:
    """Returns the rounds by number, a page at a time; the open one is the last."""
    return coordinator.rounds(run, after, limit)


@router.get("/{round}")
def show_round(run: RunName, round: RoundNumber, coordinator: Rounds) -> RoundView:
    """Returns one round."""
    return coordinator.round(run, round)


@router.post("/{round}/close")
def close_round(run: RunName, round: RoundNumber, coordinator: Rounds) -> RoundView:
    """Returns the round closed now: aggregated if any device reported, else failed. A closed one stays as it is."""
    return coordinator.close_round(run, round)
