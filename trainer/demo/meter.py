"""Bytes on the wire, counted where they pass: a relay between devices and server that reads HTTP/1.1 framing.

Total is everything the two sockets carry, request and status lines and headers included; TCP/IP's own 40 bytes per
packet are not. Framing: RFC 9112, sections 6 and 7.
"""

import asyncio
from asyncio import IncompleteReadError, LimitOverrunError, StreamReader, StreamWriter
from dataclasses import dataclass, field
from types import TracebackType
from typing import Literal, Self

from trainer.errors import DemoError

Kind = Literal["thresholds", "bundle", "coordination"]
"""What an exchange is for: thresholds either way; the bundle's files; leases, enrolment and whatever else."""

MAX_HEAD = 64 << 10
_CHUNK = 64 << 10


@dataclass(slots=True)
class Traffic:
    """Exchanges and their bytes: bodies alone, and everything with lines and headers; up is towards the server."""

    exchanges: int = 0
    body_up: int = 0
    body_down: int = 0
    total_up: int = 0
    total_down: int = 0


@dataclass(slots=True)
class Meter:
    """A relay on 127.0.0.1 to the server at `port`, open inside an `async with`; `url` is where devices go instead.

    traffic  what passed so far, by kind
    """

    port: int
    traffic: dict[Kind, Traffic] = field(
        default_factory=lambda: {"thresholds": Traffic(), "bundle": Traffic(), "coordination": Traffic()}
    )
    _listener: asyncio.Server | None = None
    _open: set[StreamWriter] = field(default_factory=set)

    @property
    def url(self) -> str:
        """Returns the base URL of the relay."""
        if self._listener is None:
            raise DemoError("the meter is not open")
        return f"http://127.0.0.1:{self._listener.sockets[0].getsockname()[1]}"

    async def __aenter__(self) -> Self:
        self._listener = await asyncio.start_server(self._serve, "127.0.0.1", 0, limit=MAX_HEAD)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._listener is not None:
            self._listener.close()
        for writer in list(self._open):
            writer.close()

    async def _serve(self, device: StreamReader, to_device: StreamWriter) -> None:
        self._open.add(to_device)
        to_server = None
        try:
            server, to_server = await asyncio.open_connection("127.0.0.1", self.port, limit=MAX_HEAD)
            while await self._exchange(device, to_device, server, to_server):
                pass
        except (OSError, IncompleteReadError, LimitOverrunError, ValueError):
            # a side went away, or does not speak HTTP/1.1: the other one sees its connection close
            pass
        finally:
            self._open.discard(to_device)
            for writer in (to_device, to_server):
                if writer is not None:
                    writer.close()

    async def _exchange(
        self, device: StreamReader, to_device: StreamWriter, server: StreamReader, to_server: StreamWriter
    ) -> bool:
        """Returns whether another request may follow on this connection, after relaying and counting one."""
        try:
            request = await device.readuntil(b"\r\n\r\n")
        except IncompleteReadError:
            return False
        method, path, *_ = request.split(b" ", 2)
        traffic = self.traffic[_kind(path.decode("latin-1"))]
        traffic.exchanges += 1
        traffic.total_up += len(request)
        to_server.write(request)
        up, framing = await _relay_body(request, device, to_server)
        traffic.body_up += up
        traffic.total_up += up + framing
        answer = await server.readuntil(b"\r\n\r\n")
        traffic.total_down += len(answer)
        to_device.write(answer)
        status = int(answer.split(b" ", 2)[1])
        if method == b"HEAD" or status in (204, 304):
            await to_device.drain()
            return True
        down, framing = await _relay_body(answer, server, to_device, until_closed=True)
        traffic.body_down += down
        traffic.total_down += down + framing
        return b"connection: close" not in answer.lower()


def _kind(path: str) -> Kind:
    if "/thresholds/" in path or "/updates/" in path:
        return "thresholds"
    return "bundle" if "/bundles/" in path else "coordination"


async def _relay_body(
    head: bytes, source: StreamReader, target: StreamWriter, *, until_closed: bool = False
) -> tuple[int, int]:
    """Returns the body's bytes and those of its chunked framing, after passing both on."""
    fields = {
        name.strip().lower(): value.strip().lower()
        for name, _, value in (line.partition(b":") for line in head.split(b"\r\n")[1:])
    }
    if fields.get(b"transfer-encoding") == b"chunked":
        return await _relay_chunks(source, target)
    if b"content-length" in fields:
        length = int(fields[b"content-length"])
        await _pass(source, target, length)
        return length, 0
    body = 0
    if until_closed:
        while piece := await source.read(_CHUNK):
            target.write(piece)
            body += len(piece)
    await target.drain()
    return body, 0


async def _relay_chunks(source: StreamReader, target: StreamWriter) -> tuple[int, int]:
    body = framing = 0
    while True:
        line = await source.readuntil(b"\r\n")
        size = int(line.split(b";")[0], 16)
        target.write(line)
        await _pass(source, target, size + 2 if size else 0)
        body += size
        framing += len(line) + (2 if size else 0)
        if not size:
            break
    while True:  # trailer fields, up to an empty line
        line = await source.readuntil(b"\r\n")
        target.write(line)
        framing += len(line)
        if line == b"\r\n":
            await target.drain()
            return body, framing


async def _pass(source: StreamReader, target: StreamWriter, length: int) -> None:
    while length:
        piece = await source.read(min(length, _CHUNK))
        if not piece:
            raise IncompleteReadError(b"", length)
        target.write(piece)
        await target.drain()
        length -= len(piece)
    await target.drain()
