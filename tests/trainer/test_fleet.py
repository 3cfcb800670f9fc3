"""Processes of the demo are real: heard while they run, quoted when they fail, and gone when the fleet is."""

import asyncio
import os
from pathlib import Path

import pytest

from trainer.demo.fleet import Fleet
from trainer.errors import DemoError


def alive(fragment: str) -> list[int]:
    """Returns the ids of processes with `fragment` in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            if fragment.encode() in entry.read_bytes() and int(entry.parent.name) != os.getpid():
                found.append(int(entry.parent.name))
        except OSError:
            continue
    return found


def test_json_lines_are_heard_and_the_rest_is_logged(tmp_path: Path) -> None:
    heard = []

    async def main() -> list[dict]:
        async with Fleet(tmp_path, 2) as fleet:
            return await fleet.run("show", "data", "show", "digits", "--json", heard=heard.append)

    (told,) = asyncio.run(main())
    assert heard == [told]
    assert told["shape"] == [1, 28, 28]
    assert (tmp_path / "show.log").read_text().startswith("$ spafl data show digits --json\n")


def test_a_failure_quotes_the_last_lines_and_names_the_log(tmp_path: Path) -> None:
    async def main() -> None:
        async with Fleet(tmp_path, 2) as fleet:
            await fleet.run("broken", "data", "show", "no-such-thing")

    with pytest.raises(DemoError) as failure:
        asyncio.run(main())
    assert "broken (spafl data show ...) ended with status 2" in str(failure.value)
    assert "| spafl: no dataset 'no-such-thing'" in str(failure.value)
    assert str(failure.value).endswith(f"log: {tmp_path / 'broken.log'}")


@pytest.mark.parametrize("how", ["failure", "cancelled"])
def test_a_server_is_gone_when_the_fleet_is(tmp_path: Path, how: str) -> None:
    class TroubleError(Exception):
        pass

    async def main() -> None:
        async with Fleet(tmp_path / "logs", 2) as fleet:
            up = await fleet.serve("server", "serve", "--json", "--port", "0", "--data", tmp_path / "store")
            assert up["url"].startswith("http://127.0.0.1:")
            assert alive(str(tmp_path / "store"))
            log = fleet.log("server").read_text()
            assert up["admin_token"] not in log
            assert up["enrolment_key"] not in log
            if how == "failure":
                raise TroubleError
            asyncio.current_task().cancel()
            await asyncio.sleep(60)

    with pytest.raises((TroubleError, asyncio.CancelledError)):
        asyncio.run(main())
    assert alive(str(tmp_path / "store")) == []


def test_a_server_that_does_not_start_is_a_failure(tmp_path: Path) -> None:
    async def main() -> None:
        async with Fleet(tmp_path, 2) as fleet:
            await fleet.serve("server", "serve", "--json", "--host", "256.1.1.1")

    with pytest.raises(DemoError, match="cannot listen on"):
        asyncio.run(main())


def test_a_listener_that_raises_ends_the_process(tmp_path: Path) -> None:
    def refuse(event: dict) -> None:
        raise DemoError("enough")

    async def main() -> None:
        async with Fleet(tmp_path, 2) as fleet:
            await fleet.run("show", "data", "show", "digits", "--json", heard=refuse)

    with pytest.raises(DemoError, match="enough"):
        asyncio.run(main())
