"""Real `spafl` processes: started, listened to, and all ended when the demo ends, however it ends."""

import asyncio
import json
import os
import shutil
import sys
from asyncio.subprocess import DEVNULL, PIPE, Process
from collections.abc import AsyncIterator, Callable
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeAlias

from trainer.errors import DemoError

NICE = 10
"""Devices and server give way to whatever else the machine does."""
LAST_LINES = 12
GRACE = 5.0
"""Seconds a process has to end after SIGTERM."""
MAX_LINE = 16 << 20

Event: TypeAlias = dict[str, Any]
"""One JSON line of a process."""


class Fleet:
    """The processes of one demo, each with its log in `logs`; inside an `async with`, ended with it.

    at_once       processes that `run` at the same time; the others wait
    environment   variables all processes started from now on get besides this one's
    """

    def __init__(self, logs: Path, at_once: int) -> None:
        self.logs = logs
        self._gate = asyncio.Semaphore(at_once)
        self.environment: dict[str, str] = {}
        self._running: set[Process] = set()
        logs.mkdir(parents=True, exist_ok=True)

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await asyncio.gather(*map(_end, self._running))

    async def run(
        self, name: str, *arguments: str | Path, heard: Callable[[Event], None] | None = None
    ) -> list[Event]:
        """Returns the JSON lines of `spafl <arguments>` once it ended well.

        name    of its log, `<name>.log`, which grows with every process of that name
        heard   is called with each JSON line as it comes

        Raises:
            DemoError: it ended otherwise; with its last lines and where its log is.
        """
        async with self._gate:
            process = await self._start(name, arguments)
            try:
                events = []
                async for event in self._events(name, process):
                    events.append(event)
                    if heard is not None:
                        heard(event)
                if await process.wait():
                    raise self.failure(name, f"ended with status {process.returncode}", arguments)
                return events
            finally:
                await _end(process)
                self._running.discard(process)

    async def serve(self, name: str, *arguments: str | Path) -> Event:
        """Returns the one JSON line `spafl <arguments>` writes when it is up; it runs on until the fleet ends.

        Raises:
            DemoError: it ended before it wrote it.
        """
        process = await self._start(name, arguments)
        assert process.stdout is not None
        # not logged: it holds the secrets
        if line := await process.stdout.readline():
            event: Event = json.loads(line)
            return event
        raise self.failure(name, f"ended with status {await process.wait()}", arguments)

    def log(self, name: str) -> Path:
        """Returns where the output of the processes called `name` is."""
        return self.logs / f"{name}.log"

    def failure(self, name: str, what: str, arguments: tuple[str | Path, ...] = ()) -> DemoError:
        """Returns the error that `what` happened to the process `name`, with its last lines and its log."""
        lines = self.log(name).read_text(errors="replace").splitlines()[-LAST_LINES:]
        command = f" (spafl {' '.join(map(str, arguments[:2]))} ...)" if arguments else ""
        return DemoError(
            "\n  | ".join([f"{name}{command} {what}; its last lines:", *lines]) + f"\nlog: {self.log(name)}"
        )

    async def _start(self, name: str, arguments: tuple[str | Path, ...]) -> Process:
        with self.log(name).open("ab") as log:
            log.write(f"$ spafl {' '.join(map(str, arguments))}\n".encode())
            log.flush()
            process = await asyncio.create_subprocess_exec(
                *("nice", "-n", str(NICE), _executable(), *map(str, arguments)),
                env=os.environ | self.environment,
                stdin=DEVNULL,
                stdout=PIPE,
                stderr=log,
                limit=MAX_LINE,
                # Ctrl-C reaches only the demo, which then ends the others one by one
                start_new_session=True,
            )
        self._running.add(process)
        return process

    async def _events(self, name: str, process: Process) -> AsyncIterator[Event]:
        assert process.stdout is not None
        with self.log(name).open("ab") as log:
            async for line in process.stdout:
                log.write(line)
                log.flush()
                with suppress(ValueError):
                    event = json.loads(line)
                    if isinstance(event, dict):
                        yield event


def _executable() -> str:
    beside = Path(sys.executable).with_name("spafl")
    found = str(beside) if beside.exists() else shutil.which("spafl")
    if found is None:
        raise DemoError(
            f"no `spafl` command beside {sys.executable} or on the PATH: pip install 'spafl[all]'"
        )
    return found


async def _end(process: Process) -> None:
    if process.returncode is not None:
        return
    with suppress(ProcessLookupError):
        process.terminate()
    try:
        await asyncio.wait_for(process.wait(), GRACE)
    except TimeoutError:
        with suppress(ProcessLookupError):
            process.kill()
        await process.wait()
