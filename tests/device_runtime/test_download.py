from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from device_runtime.client import Client
from device_runtime.download import fetch_bundle
from device_runtime.errors import BadAnswer, NotFound, Stopped, Unreachable
from device_runtime.retry import Backoff
from spafl.bundle import Bundle, write_bundle
from spafl.errors import BundleError
from spafl.secret import Secret
from tests.device_runtime.tiny import TOKEN, FileServer, problem, reply

BIG = bytes(range(256)) * 1024


@pytest.fixture
def big(bundle: Bundle, tmp_path: Path) -> Bundle:
    files = {name: bundle.read(name) for name in bundle.manifest.files}
    return write_bundle(tmp_path / "big", bundle.manifest, {**files, "graphs/step.onnx": BIG, "empty": b""})


@pytest.fixture
def server(tmp_path: Path, big: Bundle) -> FileServer:
    return FileServer(tmp_path / "server.json", big, rounds=3)


def client(server: FileServer, attempts: int = 3) -> Client:
    return Client(
        "http://server",
        Secret(TOKEN),
        transport=server.transport,
        backoff=Backoff(attempts=attempts),
        wait=lambda seconds: None,
    )


class Cut(httpx2.SyncByteStream):
    """A body that breaks off after some bytes: with an error, or silently."""

    def __init__(self, content: bytes, error: Exception | None) -> None:
        self.content, self.error = content, error

    def __iter__(self) -> Iterator[bytes]:
        yield self.content
        if self.error:
            raise self.error


def ranges(server: FileServer) -> list[str | None]:
    return [r.headers.get("Range") for r in server.requests if r.url.path.endswith("step.onnx")]


def test_a_bundle_arrives_whole(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    fetched = fetch_bundle(client(server), big.id, tmp_path / "held")
    assert fetched.id == big.id
    assert fetched.read("graphs/step.onnx") == BIG
    assert fetched.read("empty") == b""
    assert [path for path in tmp_path.iterdir() if path.name.endswith(".part")] == []


def test_a_bundle_at_hand_is_not_asked_for(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    fetch_bundle(client(server), big.id, tmp_path / "held")
    asked = len(server.requests)
    fetch_bundle(client(server), big.id, tmp_path / "held")
    assert len(server.requests) == asked


@pytest.mark.parametrize("error", [httpx2.ReadError("reset"), None])
def test_a_broken_download_goes_on_where_it_stopped(
    server: FileServer, big: Bundle, tmp_path: Path, error: Exception | None
) -> None:
    cuts = iter([100_000])

    def cut(request: httpx2.Request) -> httpx2.Response | None:
        if request.url.path.endswith("step.onnx") and (length := next(cuts, 0)):
            return httpx2.Response(200, stream=Cut(BIG[:length], error))
        return None

    server.before = cut
    fetched = fetch_bundle(client(server), big.id, tmp_path / "held")
    assert fetched.read("graphs/step.onnx") == BIG
    assert ranges(server) == [None, "bytes=100000-"]


def test_a_stopped_download_goes_on_in_the_next_process(
    server: FileServer, big: Bundle, tmp_path: Path
) -> None:
    class Pieces(httpx2.SyncByteStream):
        def __iter__(self) -> Iterator[bytes]:
            yield BIG[:70_000]
            stopped.wait = stop
            yield BIG[70_000:100_000]
            yield BIG[100_000:]

    def stop(seconds: float) -> None:
        raise Stopped("now")

    stopped = client(server)
    pieces = iter([httpx2.Response(200, stream=Pieces())])
    server.before = lambda r: next(pieces, None) if r.url.path.endswith("step.onnx") else None
    with pytest.raises(Stopped):
        fetch_bundle(stopped, big.id, tmp_path / "held")
    assert not (tmp_path / "held").exists()
    assert fetch_bundle(client(server), big.id, tmp_path / "held").read("graphs/step.onnx") == BIG
    assert ranges(server) == [None, "bytes=100000-"]


def test_progress_renews_the_attempts(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    def drip(request: httpx2.Request) -> httpx2.Response | None:
        if not request.url.path.endswith("step.onnx"):
            return None
        start = int(request.headers.get("Range", "bytes=0-")[6:-1])
        headers = {"Content-Range": f"bytes {start}-{len(BIG) - 1}/{len(BIG)}"}
        return httpx2.Response(206, headers=headers, stream=Cut(BIG[start : start + 30_000], None))

    server.before = drip
    fetch_bundle(client(server, attempts=2), big.id, tmp_path / "held")
    assert len(ranges(server)) == 9


def test_no_progress_ends(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    server.before = lambda request: reply(200) if request.url.path.endswith("step.onnx") else None
    with pytest.raises(Unreachable, match="ended after 0 of 262144 bytes"):
        fetch_bundle(client(server), big.id, tmp_path / "held")
    assert len(ranges(server)) == 3


def test_a_server_without_ranges_sends_it_whole_again(
    server: FileServer, big: Bundle, tmp_path: Path
) -> None:
    answers = iter([BIG[:5000], BIG])

    def whole(request: httpx2.Request) -> httpx2.Response | None:
        return reply(200, next(answers)) if request.url.path.endswith("step.onnx") else None

    server.before = whole
    assert fetch_bundle(client(server), big.id, tmp_path / "held").read("graphs/step.onnx") == BIG


def test_another_range_than_asked_for_is_refused(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    wrong = {"Content-Range": f"bytes 7-{len(BIG)}/{len(BIG)}"}
    server.before = lambda request: (
        reply(206, BIG[7:], wrong) if request.url.path.endswith("step.onnx") else None
    )
    with pytest.raises(BadAnswer, match="another range"):
        fetch_bundle(client(server), big.id, tmp_path / "held")


def test_a_file_never_grows_beyond_its_manifest(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    server.before = lambda r: reply(200, BIG + b"more") if r.url.path.endswith("step.onnx") else None
    with pytest.raises(BadAnswer, match="more than the 262144 bytes"):
        fetch_bundle(client(server), big.id, tmp_path / "held")


def test_other_bytes_are_refused_and_not_kept(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    forged = BIG[:-1] + b"?"
    answers = iter([forged])
    server.before = lambda r: (
        reply(200, content) if r.url.path.endswith("step.onnx") and (content := next(answers, None)) else None
    )
    with pytest.raises(BadAnswer, match="SHA-256 differs"):
        fetch_bundle(client(server), big.id, tmp_path / "held")
    assert fetch_bundle(client(server), big.id, tmp_path / "held").read("graphs/step.onnx") == BIG


def test_another_manifest_is_refused(server: FileServer, big: Bundle, tmp_path: Path, bundle: Bundle) -> None:
    other = (bundle.path / "manifest.json").read_bytes()
    server.before = lambda request: reply(200, other)
    with pytest.raises(BadAnswer, match="another SHA-256"):
        fetch_bundle(client(server), big.id, tmp_path / "held")


def test_a_damaged_bundle_is_fetched_again(server: FileServer, big: Bundle, tmp_path: Path) -> None:
    fetch_bundle(client(server), big.id, tmp_path / "held")
    (tmp_path / "held" / "graphs" / "step.onnx").write_bytes(b"flash forgets")
    assert fetch_bundle(client(server), big.id, tmp_path / "held").read("graphs/step.onnx") == BIG


def test_another_bundle_at_hand_is_kept(server: FileServer, big: Bundle, bundle: Bundle) -> None:
    with pytest.raises(BundleError, match="give another --state"):
        fetch_bundle(client(server), big.id, bundle.path)
    Bundle.open(bundle.path)


def test_a_bundle_nobody_has(server: FileServer, tmp_path: Path) -> None:
    server.before = lambda request: problem(404, "unknown-bundle")
    with pytest.raises(NotFound):
        fetch_bundle(client(server), "0" * 64, tmp_path / "held")
