"""What a device and a round cost on the network: bytes counted at the socket, for LeNet-5's 580 thresholds.

A real `spafl serve` process, the real device client, and the demo's relay between them, which counts every byte of both
sockets: request lines, status lines and headers included, TCP/IP's own 40 bytes per packet not. About 10 s.

    python benchmarks/wire.py [--devices 8] [--rounds 5] [--json] [--check]
"""

import asyncio
import json
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Annotated
from urllib.parse import urlsplit

import numpy as np
import safetensors.numpy
import typer
from rich.console import Console
from rich.table import Table

from device_runtime.client import Client
from server_api.operator.client import OperatorClient
from spafl.bundle import INITIAL_STATE, Bundle, write_bundle
from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import InputSpec, Manifest, StateTensor, TrainStep
from spafl.protocol import EnrolmentRequest, LeaseRequest, Metrics, RunSettings
from spafl.secret import Secret
from spafl.wire import Precision, Thresholds, encode_thresholds
from trainer.demo.meter import Meter

LENET5 = ThresholdLayout.of(
    [
        Layer("conv1", "conv", out=20, n_in=25, n_scale=25, offset=0),
        Layer("conv2", "conv", out=50, n_in=500, n_scale=25, offset=0),
        Layer("fc1", "linear", out=500, n_in=800, n_scale=800, offset=0),
        Layer("fc2", "linear", out=10, n_in=500, n_scale=500, offset=0),
    ]
)
"""The paper's model, its head masked too."""

WEIGHT_BYTES = 4 * sum(layer.out * layer.n_in for layer in LENET5.layers)
"""What FedAvg of the same model sends each way, bodies alone."""

BARS: dict[Precision, int] = {"f32": 2500, "f16": 1300}
"""Most bytes of a body, each way: 2.5 and 1.3 kB of 1000 B."""

LAST_VERSION = 100_000
"""The highest a run can reach. A body grows with the digits of its version; the bar must hold there too."""


@dataclass(frozen=True)
class Cost:
    """Mean bytes per device and round; up is towards the server.

    body      of the thresholds; last_body of those of version `LAST_VERSION`, computed
    total     of both exchanges of thresholds, headers and all
    lease     of the check-in before them
    """

    precision: Precision
    body_up: float
    body_down: float
    last_body: int
    total_up: float
    total_down: float
    lease_up: float
    lease_down: float

    def missed(self) -> list[str]:
        """Returns a line for each bar that is missed."""
        bodies = {"body up": self.body_up, "body down": self.body_down, "last body": self.last_body}
        bar = BARS[self.precision]
        return [
            f"{self.precision} {name}: {size:,.0f} B, bar {bar:,} B"
            for name, size in bodies.items()
            if size > bar
        ]


def main(
    devices: Annotated[int, typer.Option(min=1, help="Devices per round.")] = 8,
    rounds: Annotated[int, typer.Option(min=1, help="Rounds per precision.")] = 5,
    as_json: Annotated[bool, typer.Option("--json", help="Print JSON.")] = False,
    check: Annotated[bool, typer.Option("--check", help="Exit with 1 if a bar is missed.")] = False,
) -> None:
    """Count the bytes a device and a round cost, in f32 and f16."""
    costs = measure(devices, rounds)
    if as_json:
        rows = [{**asdict(cost), "bar": BARS[cost.precision], "fedavg_body": WEIGHT_BYTES} for cost in costs]
        print(json.dumps(rows, indent=2))
    else:
        show(costs, devices, rounds)
    missed = [line for cost in costs for line in cost.missed()]
    if check and missed:
        print("\n".join(f"missed: {line}" for line in missed), file=sys.stderr)
        raise typer.Exit(1)


def measure(devices: int, rounds: int) -> list[Cost]:
    """Returns the cost in each precision, of one run of `rounds` with every device in every round."""
    with TemporaryDirectory(prefix="spafl-wire-") as folder, serving(Path(folder)) as up:
        bundle = lenet5_bundle(Path(folder) / "lenet5.zip")
        with OperatorClient(up["url"], Secret(up["admin_token"])) as operator:
            operator.upload(bundle.path)
            for precision in BARS:
                settings = RunSettings(
                    name=precision, bundle=bundle.id, rounds=rounds, target=devices, precision=precision
                )
                operator.create(settings)
                operator.steer(precision, "start")
        with Client(up["url"]) as client:
            identities = [
                client.enrol(Secret(up["enrolment_key"]), EnrolmentRequest()) for _ in range(devices)
            ]
        port = urlsplit(up["url"]).port or 0
        tokens = {identity.device: identity.token for identity in identities}
        return [asyncio.run(_metered(port, precision, tokens, rounds)) for precision in BARS]


async def _metered(port: int, precision: Precision, tokens: dict[str, Secret], rounds: int) -> Cost:
    async with Meter(port) as meter:
        clients = {device: Client(meter.url, token) for device, token in tokens.items()}
        for _ in range(rounds):
            await asyncio.gather(
                *(
                    asyncio.to_thread(_take_part, client, precision, device)
                    for device, client in clients.items()
                )
            )
        for client in clients.values():
            client.close()
        # until the relay has seen that: a task cut off in the middle is a traceback on stderr
        await asyncio.wait(asyncio.all_tasks() - {asyncio.current_task()}, timeout=5)
    thresholds, lease = meter.traffic["thresholds"], meter.traffic["coordination"]
    count = rounds * len(tokens)
    last = Thresholds(np.zeros(LENET5.size, np.float32), LAST_VERSION)
    return Cost(
        precision,
        body_up=thresholds.body_up / count,
        body_down=thresholds.body_down / count,
        last_body=len(encode_thresholds(LENET5, last, precision)),
        total_up=thresholds.total_up / count,
        total_down=thresholds.total_down / count,
        lease_up=lease.total_up / count,
        lease_down=lease.total_down / count,
    )


def _take_part(client: Client, run: str, device: str) -> None:
    """Returns once the update is counted: what a device sends in a round, with random thresholds for training."""
    lease = client.lease(run, LeaseRequest())
    client.thresholds(run, lease.version, LENET5)
    trained = np.random.default_rng().normal(0.02, 0.01, LENET5.size).astype(np.float32)
    body = encode_thresholds(LENET5, Thresholds(trained, lease.version), lease.precision)
    metrics = Metrics(
        examples=600,
        loss=0.123456,
        accuracy=0.9875,
        density=(0.95, 0.88, 0.412, 1.0),
        steps=50,
        seconds=1.234,
    )
    client.report(run, lease.round, device, body, json.dumps(metrics.present()))


def show(costs: list[Cost], devices: int, rounds: int) -> None:
    """Returns nothing; prints the table."""
    print(f"LeNet-5: {LENET5.size} thresholds of {WEIGHT_BYTES // 4:,} weights")
    table = Table(
        title=f"bytes per device and round; {devices} devices, {rounds} rounds", title_justify="left"
    )
    table.add_column("")
    for cost in costs:
        table.add_column(cost.precision, justify="right")
    lines: dict[str, list[float]] = {
        "body up": [cost.body_up for cost in costs],
        "body down": [cost.body_down for cost in costs],
        f"body at version {LAST_VERSION:,}": [cost.last_body for cost in costs],
        "bar for each body": [BARS[cost.precision] for cost in costs],
        "with headers, up": [cost.total_up for cost in costs],
        "with headers, down": [cost.total_down for cost in costs],
        "check-in, up": [cost.lease_up for cost in costs],
        "check-in, down": [cost.lease_down for cost in costs],
        "FedAvg's body, each way": [WEIGHT_BYTES for _ in costs],
    }
    for name, values in lines.items():
        table.add_row(name, *(f"{value:,.0f}" for value in values))
    ratios = (
        2 * WEIGHT_BYTES / (cost.total_up + cost.total_down + cost.lease_up + cost.lease_down)
        for cost in costs
    )
    table.add_row("FedAvg's bodies / all our bytes", *(f"{ratio:,.0f}x" for ratio in ratios))
    Console().print(table)


@contextmanager
def serving(folder: Path) -> Iterator[dict[str, str]]:
    """Yields what `spafl serve --json` said: url, admin_token, enrolment_key."""
    command = [sys.executable, "-c", "from spafl.cli import main; main()", "serve"]
    arguments = ["--data", str(folder / "server"), "--port", "0", "--json"]
    with (folder / "server.log").open("w") as log:
        server = subprocess.Popen([*command, *arguments], stdout=subprocess.PIPE, stderr=log, text=True)
    try:
        line = server.stdout.readline() if server.stdout else ""
        if not line:
            raise SystemExit(f"the server did not start: {(folder / 'server.log').read_text()}")
        yield json.loads(line)
    finally:
        server.terminate()
        server.communicate(timeout=20)


def lenet5_bundle(path: Path) -> Bundle:
    """Returns a bundle of LeNet-5's layout and state; no graphs, for nothing is trained here."""
    state = {layer.weight: np.zeros((layer.out, layer.n_in), np.float32) for layer in LENET5.layers}
    state |= LENET5.split(np.zeros(LENET5.size, np.float32))
    manifest = Manifest(
        name="lenet5",
        layout=LENET5,
        state=tuple(
            StateTensor(name=name, shape=tensor.shape, role="weight" if tensor.ndim > 1 else "threshold")
            for name, tensor in state.items()
        ),
        input=InputSpec(shape=(1, 28, 28), mean=(0.5,), std=(0.5,)),
        labels=tuple("0123456789"),
        train_step=TrainStep(form="dense", reason="nothing is trained"),
        compaction=(),
        engines={},
        files={},
        producer={},
    )
    return write_bundle(path, manifest, {INITIAL_STATE: safetensors.numpy.save(state)})


if __name__ == "__main__":
    typer.run(main)
