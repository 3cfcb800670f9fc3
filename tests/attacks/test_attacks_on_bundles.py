"""Uploads and downloads that try to leave the bundle directory, fill the disk or the memory.

01  not a bundle: no zip, an empty one, a zip without or with a broken manifest
02  a zip bomb: a file that inflates to more than its manifest says
03  names that leave the directory (zip slip), names twice, files nobody named
04  a file that is not what its manifest says, thresholds that are not finite
05  longer than allowed, by declared length and chunked
06  paths in download requests
07  SQL, markup and odd Unicode in text fields
"""

import io
import json
import zipfile
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from server_api.settings import Settings
from spafl.bundle import INITIAL_STATE, MANIFEST
from tests.server_api.local_server import LocalServer


def upload(server: LocalServer, data: bytes, **headers: str):
    headers = {**server.admin, "Content-Type": "application/zip", **headers}
    return server.http.post("/v1/bundles", content=data, headers=headers)


def contents(server: LocalServer) -> dict[str, bytes]:
    with zipfile.ZipFile(server.bundle.path) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def zipped(files: list[tuple[str, bytes]]) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, content in files:
            archive.writestr(name, content)
    return data.getvalue()


def with_files(server: LocalServer, files: dict[str, bytes]) -> bytes:
    """Returns a zip whose manifest names and hashes `files` rightly."""
    manifest = server.bundle.manifest.holding(files)
    return zipped([(MANIFEST, manifest.to_bytes()), *files.items()])


def assert_refused(server: LocalServer, tmp_path: Path, answer, status: int = 422, word: str = "bad-bundle"):
    assert answer.status_code == status, answer.text
    assert answer.json()["type"] == f"urn:spafl:problem:{word}"
    assert str(tmp_path) not in answer.text, "the server's paths are nobody's business"
    assert server.get("/bundles").json() == []
    kept = [path for path in (tmp_path / "server" / "bundles").rglob("*") if path.name != ".incoming"]
    assert kept == []


@pytest.mark.parametrize(
    "data", [b"", b"not a zip", b"PK\x03\x04" + b"\0" * 50, zipped([]), b"PK\x05\x06" + b"\0" * 18]
)
def test_01_not_a_bundle(server, tmp_path, data):
    assert_refused(server, tmp_path, upload(server, data))


@pytest.mark.parametrize("manifest", [b"", b"{}", b"[]", b"\xff\xfe", b"{" * 100_000, b'{"format": "other"}'])
def test_01_a_manifest_that_is_none(server, tmp_path, manifest):
    files = contents(server) | {MANIFEST: manifest}
    assert_refused(server, tmp_path, upload(server, zipped(list(files.items()))))


def test_02_a_zip_bomb(server, tmp_path):
    files = contents(server)
    bomb = zipped(
        [
            *((name, data) for name, data in files.items() if name != INITIAL_STATE),
            (INITIAL_STATE, b"\0" * 50_000_000),
        ]
    )
    assert len(bomb) < 100_000
    assert_refused(server, tmp_path, upload(server, bomb))


@pytest.mark.parametrize(
    "name",
    [
        "../escaped",
        "/tmp/escaped",
        "a/../../escaped",
        "..\\escaped",
        "C:escaped",
        "a/b/c",
        ".hidden",
        "nul\0byte",
        "é",
    ],
)
def test_03_names_that_leave_the_directory(server, tmp_path, name):
    files = contents(server)
    manifest = json.loads(files[MANIFEST])
    manifest["files"][name] = {"bytes": 1, "sha256": "0" * 64}
    files[MANIFEST] = json.dumps(manifest, sort_keys=True, separators=(",", ":")).encode()
    assert_refused(
        server, tmp_path, upload(server, zipped([*files.items(), (name.replace("\0", "_"), b"x")]))
    )
    assert not list(tmp_path.rglob("*escaped*"))


def test_03_a_file_nobody_named(server, tmp_path):
    files = [*contents(server).items(), ("extra.onnx", b"x")]
    assert_refused(server, tmp_path, upload(server, zipped(files)))


@pytest.mark.filterwarnings("ignore:Duplicate name")
def test_03_a_file_twice(server, tmp_path):
    files = [*contents(server).items(), (INITIAL_STATE, b"another")]
    assert_refused(server, tmp_path, upload(server, zipped(files)))


def test_04_a_file_that_is_not_what_the_manifest_says(server, tmp_path):
    files = contents(server)
    files["graphs/step.onnx"] = files["graphs/step.onnx"][:-1] + b"\0"
    assert_refused(server, tmp_path, upload(server, zipped(list(files.items()))))


@pytest.mark.parametrize("state", ["nothing", "NaN", "a missing tensor", "no safetensors"])
def test_04_a_state_no_run_could_start_from(server, tmp_path, state):
    files = {name: data for name, data in contents(server).items() if name != MANIFEST}
    tensors = safetensors.numpy.load(files[INITIAL_STATE])
    if state == "NaN":
        tensors["first.threshold"][0] = np.nan
    if state == "a missing tensor":
        del tensors["first.threshold"]
    files[INITIAL_STATE] = safetensors.numpy.save(tensors)
    if state == "no safetensors":
        files[INITIAL_STATE] = b"\x80\x04pickle"
    if state == "nothing":
        del files[INITIAL_STATE]
    assert_refused(server, tmp_path, upload(server, with_files(server, files)))


@pytest.fixture
def small_limit(server: LocalServer) -> LocalServer:
    data = server.app.state.settings.data
    server.app.state.settings = Settings.given(data=data, max_bundle_bytes=1000)
    return server


def test_05_longer_than_allowed(small_limit, tmp_path):
    data = small_limit.bundle.path.read_bytes()
    assert len(data) > 1000
    assert_refused(small_limit, tmp_path, upload(small_limit, data), 413, "too-large")


def test_05_longer_than_allowed_without_saying_so(small_limit, tmp_path):
    def endless():
        for _ in range(1000):
            yield b"x" * 10_000

    assert_refused(small_limit, tmp_path, upload(small_limit, endless()), 413, "too-large")


def test_05_another_media_type(server, tmp_path):
    answer = upload(server, b"x", **{"Content-Type": "multipart/form-data; boundary=x"})
    assert_refused(server, tmp_path, answer, 415, "wrong-media-type")


@pytest.mark.parametrize(
    "name",
    [
        "../server.db",
        "..%2f..%2fserver.db",
        "%2e%2e/%2e%2e/server.db",
        "/etc/passwd",
        "%2fetc%2fpasswd",
        "graphs/../../../server.db",
        "graphs",
        "",
        "init.safetensors%00.txt",
        "INIT.SAFETENSORS",
        "manifest.json",
        "a" * 300,
    ],
)
def test_06_paths_in_download_requests(server, name):
    server.upload()
    answer = server.get(f"/bundles/{server.bundle.id}/files/{name}")
    assert answer.status_code in (404, 422)
    assert answer.headers["content-type"] == "application/problem+json"
    assert b"SQLite format" not in answer.content


@pytest.mark.parametrize("id", ["..", "%2e%2e", ".incoming", "A" * 64, "0" * 63, "0" * 64 + "/../x"])
def test_06_bundle_ids_that_are_paths(server, id):
    server.upload()
    assert server.get(f"/bundles/{id}/files/init.safetensors").status_code in (404, 422)


HOSTILE = [
    "'; DROP TABLE runs; --",
    '" OR ""="',
    "<script>alert(1)</script>",
    "\u202e",
    "\ud800",
    "a\0b",
    "%s%n",
    "x" * 65,
]


@pytest.mark.parametrize("text", HOSTILE)
def test_07_hostile_text(server, text):
    server.start()
    spelled = json.dumps({"name": text}).encode()
    json_type = {"Content-Type": "application/json"}
    answer = server.http.post("/v1/devices", content=spelled, headers={**server.key, **json_type})
    assert answer.status_code == 422
    assert answer.headers["content-type"] == "application/problem+json"
    spelled = json.dumps({"name": text, "bundle": server.bundle.id}).encode()
    answer = server.http.post("/v1/runs", content=spelled, headers={**server.admin, **json_type})
    assert answer.status_code == 422
    spelled = json.dumps({"capabilities": {"platform": text, text: 1}}).encode()
    device = server.enrol()
    answer = server.http.post("/v1/runs/run/leases", content=spelled, headers={**device.headers, **json_type})
    assert answer.status_code == 422
    assert len(server.get("/runs").json()) == 1


@pytest.mark.parametrize("text", HOSTILE[:4])
def test_07_hostile_text_where_any_text_is_allowed_is_only_text(server, text):
    server.start()
    device = server.enrol()
    body = {"capabilities": {"platform": text}}
    assert server.http.post("/v1/runs/run/leases", json=body, headers=device.headers).status_code == 201
    (view,) = server.get("/devices").json()
    assert view["capabilities"]["platform"] == text
    assert server.get("/devices?after=" + text.replace("%", "%25")).status_code == 200
