"""The operator's half of the demo, over HTTP: upload, create, start, follow, read thresholds."""

from collections.abc import AsyncIterator
from pathlib import Path
from types import TracebackType
from typing import Self

import httpx2

from spafl.layout import Floats, ThresholdLayout
from spafl.protocol import PREFIX, BundleView, Event, RunSettings
from spafl.wire import MEDIA_TYPE, decode_thresholds, max_body_bytes
from trainer.errors import DemoError


class Operator:
    """The admin of the server at `url`; inside an `async with`."""

    def __init__(self, url: str, token: str) -> None:
        self._http = httpx2.AsyncClient(
            base_url=url + PREFIX, headers={"Authorization": f"Bearer {token}"}, timeout=60.0
        )

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self._http.aclose()

    async def upload(self, bundle: Path) -> str:
        """Returns the id of the bundle in the .zip, now on the server."""
        content = bundle.read_bytes()
        answer = await self._ask(
            "POST", "/bundles", content=content, headers={"Content-Type": "application/zip"}
        )
        return BundleView.from_text(answer.content).id

    async def start(self, settings: RunSettings) -> None:
        """Returns nothing; the run of `settings` is created and started."""
        headers = {"Content-Type": "application/json"}
        await self._ask("POST", "/runs", content=settings.to_text().encode(), headers=headers)
        await self._ask("POST", f"/runs/{settings.name}/start")

    async def thresholds(self, run: str, version: int, layout: ThresholdLayout) -> Floats:
        """Returns the global thresholds (size,) of `version`."""
        answer = await self._ask("GET", f"/runs/{run}/thresholds/{version}", headers={"Accept": MEDIA_TYPE})
        return decode_thresholds(layout, answer.content[: max_body_bytes(layout) + 1]).values

    async def events(self, run: str) -> AsyncIterator[Event]:
        """Yields the run's events as they happen, up to the last one.

        Raises:
            DemoError: the server ended the stream before the run was over.
        """
        async with self._http.stream("GET", f"/runs/{run}/events", timeout=None) as answer:
            if answer.status_code != 200:
                raise DemoError(f"GET /runs/{run}/events answered {answer.status_code}")
            # server-sent events: our data is one line of JSON (WHATWG HTML, section 9.2)
            async for line in answer.aiter_lines():
                if line.startswith("data:"):
                    event = Event.from_text(line[5:])
                    yield event
                    if event.kind in ("run.finished", "run.stopped", "run.paused"):
                        return
        raise DemoError(f"the server ended the events of run {run} before the run was over")

    async def _ask(
        self, method: str, path: str, *, content: bytes | None = None, headers: dict[str, str] | None = None
    ) -> httpx2.Response:
        try:
            answer = await self._http.request(method, path, content=content, headers=headers)
        except httpx2.TransportError as error:
            raise DemoError(f"{method} {path}: no answer from the server: {error!r}") from error
        if answer.status_code >= 300:
            raise DemoError(f"{method} {path} answered {answer.status_code}: {answer.text[:500]}")
        return answer
