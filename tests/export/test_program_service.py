"""The program service over HTTP, with programs made up: who may ask, what is refused and how, what is remembered."""

import asyncio
import logging
import threading
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
from starlette.testclient import TestClient
from torch import nn

from export import program_service
from export.decompositions import LoweringError
from export.program_service import MAX_WAITING, ProgramMaker, ServiceError, create_app
from spafl.algorithm import Mask
from spafl.bundle import Bundle
from spafl.program import (
    MASK_MEDIA_TYPE,
    PROGRAM_MEDIA_TYPE,
    HollowProgram,
    decode_program,
    encode_mask,
    encode_program,
    hollow,
    mask_digest,
)
from spafl.secret import Secret
from tests.device_runtime.tiny import tiny_bundle

MASK = {"hidden": np.array([1, 0, 1, 1], bool)}
OTHER = {"hidden": np.array([0, 0, 1, 1], bool)}


class Maker:
    """Makes programs of nothing; remembers which masks it was asked for."""

    def __init__(self, bundle: Bundle) -> None:
        self.bundle, self.asked = bundle, list[Mask]()
        self.before: Callable[[], None] = lambda: None

    def __call__(self, mask: Mask) -> HollowProgram:
        self.asked.append(mask)
        self.before()
        layout = self.bundle.manifest.layout
        return hollow(
            bytes(40),
            [(8, 4)],
            b"fold",
            bundle=self.bundle.id,
            layout=layout.id,
            mask=mask_digest(encode_mask(layout, mask)),
            executorch="1.5.1",
            inputs=("hidden.weight",),
        )


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    return tiny_bundle(tmp_path / "b")


@pytest.fixture
def make(bundle: Bundle) -> Maker:
    return Maker(bundle)


@pytest.fixture
def maker(make: Maker, bundle: Bundle) -> ProgramMaker:
    return ProgramMaker(nn.Identity(), bundle, make)


@pytest.fixture
def post(maker: ProgramMaker, bundle: Bundle) -> Callable[..., httpx2.Response]:
    """Asks for a program, as well as can be unless the test says otherwise."""

    def ask(
        body: bytes | None = None,
        *,
        path: str = "",
        token: str | None = None,
        method: str = "POST",
        **headers: str | bytes,
    ) -> httpx2.Response:
        client = TestClient(
            create_app(maker, Secret(token) if token else None), raise_server_exceptions=False
        )
        content = encode_mask(bundle.manifest.layout, MASK) if body is None else body
        given = {"Content-Type": MASK_MEDIA_TYPE} | {
            name.replace("_", "-"): value for name, value in headers.items()
        }
        return client.request(
            method, path or f"/v1/bundles/{bundle.id}/programs", content=content, headers=given
        )

    return ask


def problem(response: httpx2.Response) -> tuple[int, str, str]:
    """Returns status, word and detail, if the answer is a problem."""
    assert response.headers["Content-Type"] == "application/problem+json"
    told = response.json()
    assert told["status"] == response.status_code
    assert told["title"]
    return response.status_code, told["type"].removeprefix("urn:spafl:problem:"), told["detail"]


def test_a_mask_is_answered_with_its_program(
    post: Callable[..., httpx2.Response], make: Maker, bundle: Bundle
) -> None:
    response = post()
    assert (response.status_code, response.headers["Content-Type"]) == (200, PROGRAM_MEDIA_TYPE)
    program = decode_program(response.content)
    assert program.header.bundle == bundle.id
    np.testing.assert_array_equal(make.asked[0]["hidden"], MASK["hidden"])


def test_a_mask_asked_for_again_is_not_made_again(
    post: Callable[..., httpx2.Response], make: Maker, bundle: Bundle
) -> None:
    first = post().content
    assert post().content == first
    assert len(make.asked) == 1
    assert post(encode_mask(bundle.manifest.layout, OTHER)).content != first
    assert len(make.asked) == 2


def test_only_so_many_bytes_are_remembered(
    maker: ProgramMaker, make: Maker, bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    layout = bundle.manifest.layout
    bodies = [encode_mask(layout, {"hidden": np.array([n & 1, n & 2, 1, 1], bool)}) for n in range(3)]
    size = len(encode_program(make(MASK)))
    make.asked.clear()
    monkeypatch.setattr(program_service, "CACHE_BYTES", 2 * size)
    for body in (bodies[0], bodies[1], bodies[0], bodies[2], bodies[0], bodies[1]):
        maker.program(body)
    # the one longest unasked for went when the third came, and came back
    assert len(make.asked) == 4
    monkeypatch.setattr(program_service, "CACHE_BYTES", 1)
    assert maker.program(bodies[2]) == maker.program(bodies[2])


@pytest.mark.parametrize(
    "authorization",
    [
        None,
        "",
        "Bearer",
        "Bearer ",
        "Bearer wrong",
        "Basic s3cret",
        "s3cret",
        "Bearer s3cret2",
        "Bearer s\u00e9cret",
    ],
)
def test_without_the_token_nothing_is_answered(
    authorization: str | None, post: Callable[..., httpx2.Response], make: Maker
) -> None:
    headers = {} if authorization is None else {"Authorization": authorization.encode()}
    response = post(token="s3cret", **headers)
    assert problem(response)[:2] == (401, "unauthorized")
    assert response.headers["WWW-Authenticate"] == "Bearer"
    assert "s3cret" not in response.text
    assert post(b"x" * 1000, path="/v1/bundles/other/programs", token="s3cret").status_code == 401
    assert not make.asked


def test_with_the_token_it_is(post: Callable[..., httpx2.Response]) -> None:
    assert post(token="s3cret", Authorization="Bearer s3cret").status_code == 200
    assert post(token="s3cret", Authorization="bearer s3cret").status_code == 200


def test_what_is_no_mask_of_this_bundle_is_refused(
    post: Callable[..., httpx2.Response], make: Maker, bundle: Bundle
) -> None:
    body = encode_mask(bundle.manifest.layout, MASK)
    said = {
        (422, "bad-request", "mask of 8 bytes, expected 9 for 4 filters"): post(body[:-1]),
        (422, "bad-request", "mask of 0 bytes"): post(b""),
        (422, "bad-request", "is of layout ffffffffffffffff"): post(b"\xff" * 8 + body[8:]),
        (422, "bad-request", "beyond the layout's 4"): post(body[:-1] + b"\xff"),
        (413, "too-large", "a mask of this bundle has 9 bytes"): post(body + b"\0"),
        (415, "unsupported-media-type", MASK_MEDIA_TYPE): post(body, Content_Type="application/json"),
        (404, "not-found", bundle.id): post(body, path=f"/v1/bundles/{'0' * 64}/programs"),
        (404, "not-found", "Not Found"): post(body, path="/v1/programs"),
        (405, "method-not-allowed", "Method Not Allowed"): post(method="GET"),
    }
    for (status, word, detail), response in said.items():
        assert problem(response)[:2] == (status, word)
        assert detail in response.json()["detail"]
    assert not make.asked


class Endless:
    """A request whose body goes on for ever."""

    def __init__(self) -> None:
        self.chunks = 0

    async def stream(self) -> AsyncIterator[bytes]:
        while True:
            self.chunks += 1
            yield b"xxxx"


def test_a_body_is_read_no_further_than_a_mask_is_long() -> None:
    request = Endless()
    with pytest.raises(ServiceError, match="a mask of this bundle has 9 bytes"):
        asyncio.run(program_service._body(request, 9))  # type: ignore[arg-type]
    assert request.chunks == 3


def test_a_model_that_cannot_be_made_is_told_and_logged(
    post: Callable[..., httpx2.Response], make: Maker, caplog: pytest.LogCaptureFixture
) -> None:
    def refuse() -> None:
        raise LoweringError("the compiler changed a weight of shape (2, 3)")

    make.before = refuse
    with caplog.at_level(logging.ERROR):
        assert problem(post()) == (500, "no-program", "the compiler changed a weight of shape (2, 3)")
    assert "the compiler changed a weight" in caplog.text
    make.before = lambda: None
    assert post().status_code == 200, "a failure is not remembered"


def test_an_error_of_the_services_own_tells_nothing(
    post: Callable[..., httpx2.Response], make: Maker
) -> None:
    def fail() -> None:
        raise RuntimeError("inner secrets")

    make.before = fail
    assert problem(post())[:2] == (500, "internal-error")
    assert "inner secrets" not in post().text


def test_devices_that_ask_for_the_same_wait_for_one_program(
    maker: ProgramMaker, make: Maker, bundle: Bundle
) -> None:
    going, answers = threading.Event(), list[bytes]()
    make.before = lambda: going.wait(30) and None
    body = encode_mask(bundle.manifest.layout, MASK)
    threads = [
        threading.Thread(target=lambda: answers.append(maker.program(body))) for _ in range(MAX_WAITING)
    ]
    for thread in threads:
        thread.start()
    while maker._waiting < MAX_WAITING:
        threading.Event().wait(0.001)
    with pytest.raises(ServiceError, match=f"{MAX_WAITING} devices wait for programs already") as refused:
        maker.program(encode_mask(bundle.manifest.layout, OTHER))
    assert (refused.value.status, refused.value.headers) == (503, {"Retry-After": "30"})
    going.set()
    for thread in threads:
        thread.join(30)
    assert len(set(answers)) == 1
    assert len(answers) == MAX_WAITING
    assert len(make.asked) == 1
    assert maker._waiting == 0
