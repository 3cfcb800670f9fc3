"""Events of a run, as they happen (server-sent events)."""

import asyncio
from collections.abc import AsyncIterator
from typing import Annotated

from fastapi import APIRouter, Depends, Header, Query, Request
from fastapi.sse import EventSourceResponse, ServerSentEvent
from starlette.concurrency import run_in_threadpool

from server_api.dependencies import Rounds, RunName, admin
from spafl.wire import MAX_VERSION

router = APIRouter(prefix="/runs/{run}/events", tags=["events"], dependencies=admin)

PAGE = 500
POLL_SECONDS = 0.25
"""How late an event may arrive. The store is asked, not this process: another process may have written it."""


async def _known_run(run: RunName, coordinator: Rounds) -> str:
    # before the stream begins, or a missing run could not be answered with 404 any more
    await run_in_threadpool(coordinator.record, run)
    return run


@router.get("", response_class=EventSourceResponse)
async def follow_events(
    request: Request,
    run: Annotated[str, Depends(_known_run)],
    coordinator: Rounds,
    follow: Annotated[bool, Query(description="False: end after the events so far.")] = True,
    last_event_id: Annotated[
        int,
        Header(alias="Last-Event-ID", ge=0, le=MAX_VERSION, description="Send what came after this event."),
    ] = 0,
) -> AsyncIterator[ServerSentEvent]:
    """Returns the run's events: `id`, `event` (the kind) and `data` (the protocol's Event as JSON)."""
    last = last_event_id
    while True:
        events = await run_in_threadpool(coordinator.store.events, run, last, PAGE)
        for event in events:
            yield ServerSentEvent(id=str(event.id), event=event.kind, raw_data=event.to_text())
            last = event.id
        if len(events) < PAGE:
            if not follow or request.app.state.stopping.is_set():
                return
            await asyncio.sleep(POLL_SECONDS)
