"""Bundles over HTTP: upload, manifest, files, ranges."""

import hashlib
import os
import time
from concurrent.futures import ThreadPoolExecutor

import pytest

from server_api.bundle_files import BundleFiles

FILE = "graphs/step.onnx"


@pytest.fixture
def held(server):
    answer = server.upload()
    assert answer.status_code == 201
    return server


def content(server) -> bytes:
    return server.bundle.read(FILE)


def download(server, name=FILE, **headers):
    return server.get(f"/bundles/{server.bundle.id}/files/{name}", **headers)


def test_an_upload_is_shown_as_it_is(server):
    view = server.upload().json()
    manifest = server.bundle.manifest
    assert (view["id"], view["name"], view["layout"]) == (manifest.id, "small", manifest.layout.id)
    assert view["thresholds"] == 7
    assert view["bytes"] == sum(entry.bytes for entry in manifest.files.values())
    assert server.get("/bundles").json() == [view]


def test_the_same_bundle_again_changes_nothing(held):
    first = held.get("/bundles").json()
    again = held.upload()
    assert (again.status_code, [again.json()]) == (200, first)


def test_the_manifest_is_the_bundles_identity(held):
    answer = held.get(f"/bundles/{held.bundle.id}")
    assert hashlib.sha256(answer.content).hexdigest() == held.bundle.id
    assert answer.headers["etag"] == f'"{held.bundle.id}"'
    again = held.get(f"/bundles/{held.bundle.id}", **{"If-None-Match": answer.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


def test_a_device_downloads_every_file(held):
    device = held.enrol()
    for name, entry in held.bundle.manifest.files.items():
        answer = held.http.get(f"/v1/bundles/{held.bundle.id}/files/{name}", headers=device.headers)
        assert answer.status_code == 200
        assert hashlib.sha256(answer.content).hexdigest() == entry.sha256
        assert answer.headers["etag"] == f'"{entry.sha256}"'
        assert "immutable" in answer.headers["cache-control"]


@pytest.mark.parametrize(
    ("header", "start", "stop"),
    [
        ("bytes=0-0", 0, 1),
        ("bytes=10-99", 10, 100),
        ("bytes=10000-", 10000, 10240),
        ("bytes=-5", 10235, 10240),
    ],
)
def test_one_range(held, header, start, stop):
    answer = download(held, Range=header)
    assert answer.status_code == 206
    assert answer.content == content(held)[start:stop]
    assert answer.headers["content-range"] == f"bytes {start}-{stop - 1}/10240"


def test_a_range_past_the_end_is_cut_and_a_long_tail_is_everything(held):
    assert download(held, Range="bytes=10230-99999").content == content(held)[10230:]
    assert download(held, Range="bytes=-99999").content == content(held)


@pytest.mark.parametrize(
    "header",
    ["bytes=10240-", "bytes=9-3", "bytes=-0", "bytes=-", "bytes=a-b", "lines=1-2", "bytes=0-1,5-6", ""],
)
def test_ranges_that_cannot_be_served(held, header):
    answer = download(held, Range=header)
    assert answer.status_code == 416
    assert answer.json()["type"] == "urn:spafl:problem:range-not-satisfiable"
    assert answer.headers["content-range"] == "bytes */10240"


def test_a_range_of_another_content_gets_the_whole(held):
    answer = download(held, Range="bytes=10240-", **{"If-Range": '"other"'})
    assert (answer.status_code, answer.content) == (200, content(held))
    tag = download(held).headers["etag"]
    assert download(held, Range="bytes=5-", **{"If-Range": tag}).content == content(held)[5:]


def test_a_file_the_client_has(held):
    tag = download(held).headers["etag"]
    answer = download(held, **{"If-None-Match": tag})
    assert (answer.status_code, answer.content) == (304, b"")


def test_a_run_needs_a_bundle_that_is_held(server):
    answer = server.create()
    assert answer.status_code == 404
    assert "upload it first" in answer.json()["detail"]


def test_an_upload_that_was_interrupted_is_cleared_away_once_it_is_old(held, tmp_path):
    directory = tmp_path / "server" / "bundles"
    for name, age in (("old", 90_000), ("under way", 60)):
        (directory / ".incoming" / name).mkdir()
        (directory / ".incoming" / name / "bundle.zip").write_bytes(b"half of it")
        os.utime(directory / ".incoming" / name, (time.time() - age,) * 2)
    files = BundleFiles(directory)
    assert [path.name for path in (directory / ".incoming").iterdir()] == ["under way"]
    assert files.initial_thresholds(held.bundle.id).shape == (7,)


def test_the_same_bundle_uploaded_many_times_at_once(server):
    with ThreadPoolExecutor(6) as pool:
        statuses = sorted(answer.status_code for answer in pool.map(lambda _: server.upload(), range(6)))
    assert statuses == [200] * 5 + [201]
    assert len(server.get("/bundles").json()) == 1
