"""The fixtures of every test that speaks to the application."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from spafl.bundle import Bundle
from tests.server_api.local_server import LocalServer, local_server, small_bundle


@pytest.fixture(scope="session")
def bundle(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    return small_bundle(tmp_path_factory.mktemp("bundle") / "small.zip")


@pytest.fixture
def server(tmp_path: Path, bundle: Bundle) -> Iterator[LocalServer]:
    with local_server(tmp_path / "server", bundle) as server:
        yield server
