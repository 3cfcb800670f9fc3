"""The meter counts exactly the bytes the two sockets carry, whatever framing the answer has."""

import asyncio
from collections.abc import Callable

import pytest

from trainer.demo.meter import Meter

ANSWERS = {
    "/v1/runs/r/thresholds/3": b"HTTP/1.1 200 OK\r\nContent-Length: 5\r\n\r\nhello",
    "/v1/runs/r/rounds/1/updates/d": b"HTTP/1.1 204 No Content\r\n\r\n",
    "/v1/bundles/b/files/f": b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"3\r\nabc\r\nA;x=1\r\n0123456789\r\n0\r\n\r\n",
    "/v1/runs/r": b"HTTP/1.1 304 Not Modified\r\nContent-Length: 99\r\n\r\n",
    "/v1/closing": b"HTTP/1.1 200 OK\r\nConnection: close\r\n\r\nuntil the end",
}
BODIES = {
    "/v1/runs/r/thresholds/3": 5,
    "/v1/runs/r/rounds/1/updates/d": 0,
    "/v1/bundles/b/files/f": 13,
    "/v1/runs/r": 0,
    "/v1/closing": 13,
}


class Server:
    """Answers each request with its canned bytes and remembers what arrived."""

    def __init__(self) -> None:
        self.arrived = bytearray()

    async def answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        try:
            while head := await reader.readuntil(b"\r\n\r\n"):
                self.arrived += head
                length = int(head.lower().partition(b"content-length: ")[2].partition(b"\r\n")[0] or 0)
                self.arrived += await reader.readexactly(length)
                path = head.split(b" ")[1].decode()
                writer.write(ANSWERS[path])
                await writer.drain()
                if path == "/v1/closing":
                    break
        except asyncio.IncompleteReadError:
            pass
        finally:
            writer.close()


def run(scenario: Callable[[Meter, Server], object]) -> None:
    async def main() -> None:
        server = Server()
        listener = await asyncio.start_server(server.answer, "127.0.0.1", 0)
        async with listener, Meter(listener.sockets[0].getsockname()[1]) as meter:
            await scenario(meter, server)

    asyncio.run(asyncio.wait_for(main(), 20))


async def ask(meter: Meter, *requests: bytes) -> list[bytes]:
    """Returns the answers' bytes, got over one connection."""
    reader, writer = await asyncio.open_connection("127.0.0.1", int(meter.url.rpartition(":")[2]))
    answers = []
    for request in requests:
        writer.write(request)
        expected = ANSWERS[request.split(b" ")[1].decode()]
        answers.append(await reader.readexactly(len(expected)))
        assert answers[-1] == expected
    writer.close()
    return answers


def request(path: str, body: bytes = b"") -> bytes:
    method = "PUT" if body else "GET"
    return f"{method} {path} HTTP/1.1\r\nHost: x\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body


@pytest.mark.parametrize("path", list(ANSWERS))
def test_each_framing_is_counted_to_the_byte(path: str) -> None:
    sent = request(path, b"x" * 100_000 if "updates" in path else b"")

    async def scenario(meter: Meter, server: Server) -> None:
        await ask(meter, sent)
        assert bytes(server.arrived) == sent
        kind = "thresholds" if "thresholds" in path or "updates" in path else "coordination"
        traffic = meter.traffic["bundle" if "bundles" in path else kind]
        assert traffic.exchanges == 1
        assert traffic.total_up == len(sent)
        assert traffic.body_up == (100_000 if "updates" in path else 0)
        assert traffic.body_down == BODIES[path]
        assert traffic.total_down == len(ANSWERS[path])

    run(scenario)


def test_a_connection_carries_many_requests_and_devices_are_many() -> None:
    paths = [path for path in ANSWERS if path != "/v1/closing"] * 3

    async def scenario(meter: Meter, server: Server) -> None:
        await asyncio.gather(*(ask(meter, *map(request, paths)) for _ in range(4)))
        assert sum(traffic.exchanges for traffic in meter.traffic.values()) == 4 * len(paths)
        assert sum(traffic.total_up for traffic in meter.traffic.values()) == len(server.arrived)
        assert sum(traffic.total_down for traffic in meter.traffic.values()) == 12 * sum(
            len(ANSWERS[path]) for path in set(paths)
        )

    run(scenario)


@pytest.mark.parametrize("nonsense", [b"\r\n\r\n", b"GET\r\n\r\n", b"x" * 100_000])
def test_nonsense_closes_only_its_own_connection(nonsense: bytes) -> None:
    async def scenario(meter: Meter, server: Server) -> None:
        reader, writer = await asyncio.open_connection("127.0.0.1", int(meter.url.rpartition(":")[2]))
        writer.write(nonsense)
        assert await reader.read() == b""
        writer.close()
        await ask(meter, request("/v1/runs/r"))

    run(scenario)


def test_a_server_that_is_gone_closes_the_connection() -> None:
    async def main() -> None:
        listener = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
        port = listener.sockets[0].getsockname()[1]
        listener.close()
        async with Meter(port) as meter:
            reader, writer = await asyncio.open_connection("127.0.0.1", int(meter.url.rpartition(":")[2]))
            writer.write(request("/v1/runs/r"))
            with pytest.raises((asyncio.IncompleteReadError, ConnectionError)):
                await reader.readexactly(1)
            writer.close()

    asyncio.run(asyncio.wait_for(main(), 20))
