"""What several rooms' tests share: one small exported bundle, made once per session."""

import subprocess
import sys
from pathlib import Path

import pytest

from spafl.bundle import Bundle


@pytest.fixture(scope="session")
def small_bundle_file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A bundle with real graphs, as a .zip; exported in a process of its own, so that this one stays free of torch."""
    out = tmp_path_factory.mktemp("exported") / "small.zip"
    subprocess.run(
        [sys.executable, "-m", "tests.device_runtime.small_model", str(out)],
        cwd=Path(__file__).parents[1],
        check=True,
        timeout=240,
    )
    return out


@pytest.fixture(scope="session")
def small_bundle(small_bundle_file: Path) -> Bundle:
    return Bundle.open(small_bundle_file)
