"""A server in its own process, as `spafl serve` starts it."""

import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import httpx2

START_SECONDS = 60.0
"""Generous: a busy machine imports slowly. Reached only when something is wrong."""


@dataclass
class ServerProcess:
    """A running `spafl serve`; `started` is the line it printed."""

    process: "subprocess.Popen[bytes]"
    started: dict[str, str]
    errors: Path

    @classmethod
    def start(cls, data: Path, *options: str, env: Mapping[str, str] | None = None) -> "ServerProcess":
        """Returns the server on the data directory, answering requests."""
        errors = data.with_name(data.name + ".stderr")
        command = [sys.executable, "-c", "from spafl.cli import main; main()", "serve", "--json"]
        with errors.open("ab") as stderr:
            process = subprocess.Popen(
                [*command, "--data", str(data), "--port", "0", *options],
                stdout=subprocess.PIPE,
                stderr=stderr,
                env={**os.environ, **(env or {})},
            )
        assert process.stdout is not None
        ready, _, _ = select.select([process.stdout], [], [], START_SECONDS)
        line = process.stdout.readline() if ready else b""
        if not line:
            process.kill()
            process.wait()
            raise AssertionError(f"the server did not start: {errors.read_text()}")
        return cls(process, json.loads(line), errors)

    def client(self, token: str) -> httpx2.Client:
        """Returns an HTTP client that sends `token`; to be closed."""
        headers = {"Authorization": f"Bearer {token}"}
        # plain http: loading the system's certificates for it would take longer than the test
        return httpx2.Client(
            base_url=self.started["url"] + "/v1", headers=headers, timeout=30, verify=False, trust_env=False
        )

    def kill(self) -> None:
        """Returns once the process is gone, without a chance to write anything."""
        self.process.send_signal(signal.SIGKILL)
        self._wait()

    def stop(self) -> int:
        """Returns the exit status after SIGTERM."""
        self.process.send_signal(signal.SIGTERM)
        return self._wait()

    def _wait(self) -> int:
        status = self.process.wait(30)
        assert self.process.stdout is not None
        self.process.stdout.close()
        return status
