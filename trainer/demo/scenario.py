"""What happens in a demo, from examples to compact models, driven from outside: `spafl` processes and HTTP."""

import asyncio
import json
from collections.abc import Coroutine, Iterable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import numpy as np
import safetensors.numpy
import torch
from numpy.typing import NDArray

from spafl import algorithm
from spafl.bundle import Bundle
from spafl.errors import SpaflError
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Floats, Layer
from spafl.protocol import RunSettings
from trainer.data import load_arrays, model_input
from trainer.demo.fleet import Event, Fleet
from trainer.demo.meter import Meter
from trainer.demo.operator import Operator
from trainer.demo.results import Device, Proof, Results, Round
from trainer.demo.screen import Screen
from trainer.errors import DemoError
from trainer.local import evaluate
from trainer.models import MODELS

RUN = "demo"
_DAY = 86_400.0


@dataclass(frozen=True, slots=True)
class Plan:
    """What a demo is asked for.

    at_once   device processes that run at the same time
    limit     images of each label, where the dataset is class folders
    parity    have the export checked against PyTorch
    """

    out: Path
    model: str
    dataset: str
    devices: int
    rounds: int
    per_round: int
    alpha: float
    seed: int
    at_once: int
    hyperparameters: Hyperparameters
    limit: int | None = None
    parity: bool = True

    @property
    def work(self) -> Path:
        """Returns where everything lies that is not a result: logs, states, the server's store."""
        return self.out / "work"

    @property
    def pictured(self) -> tuple[int, ...]:
        """Returns the rounds after which the active filters are looked at: first, middle and last."""
        return tuple(sorted({1, (self.rounds + 1) // 2, self.rounds}))

    def cohorts(self) -> list[list[int]]:
        """Returns the devices of each round: those that took part least so far, ties broken at random."""
        draw = np.random.default_rng(self.seed)
        taken, cohorts = np.zeros(self.devices), []
        for _ in range(self.rounds):
            cohort = np.lexsort((draw.random(self.devices), taken))[: self.per_round]
            taken[cohort] += 1
            cohorts.append([int(device) for device in cohort])
        return cohorts


@dataclass(slots=True)
class Trail:
    """What the figures show besides the results.

    thresholds   (rounds + 1, size) global thresholds by version
    layer        the one looked at: most filters among those with at most 128
    active       by pictured round, its active filters (devices, filters)
    """

    layer: Layer
    thresholds: list[Floats] = field(default_factory=list)
    active: dict[int, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(slots=True)
class _Device:
    """A device of the demo: its process's name, its examples, and what its processes told."""

    name: str
    file: Path
    state: Path
    examples: int
    held_out: int
    trained: list[Event] = field(default_factory=list)


async def play(plan: Plan, screen: Screen) -> tuple[Results, Trail]:
    """Returns what happened; everything it starts has ended by then, whatever happened.

    Raises:
        DemoError: a process failed, the server refused something, or training diverged.
    """
    async with Fleet(plan.work / "logs") as fleet:
        gate = asyncio.Semaphore(plan.at_once)

        async def spafl(name: str, *arguments: str | Path, **options: Any) -> list[Event]:
            async with gate:
                return await fleet.run(name, *arguments, "--json", **options)

        with screen.stage(f"split {plan.dataset}"):
            devices = await _split(plan, spafl)
            screen.devices({device.name: device.examples for device in devices})
        with screen.stage(f"export {plan.model}"):
            file = plan.work / "bundle.zip"
            await spafl(
                "export", "export", plan.model, "--data", plan.work / "data" / "test.npz", "--out", file,
                "--seed", str(plan.seed), "--parity" if plan.parity else "--no-parity",
            )  # fmt: skip
            bundle = Bundle.open(file)
        with screen.stage("start the server"):
            up = await fleet.serve("server", "serve", "--json", "--port", "0", "--data", plan.work / "server")
            fleet.environment["SPAFL_ENROLMENT_KEY"] = up["enrolment_key"]
        async with (
            Operator(up["url"], up["admin_token"]) as operator,
            Meter(urlsplit(up["url"]).port or 0) as meter,
        ):
            with screen.stage(f"{plan.rounds} rounds of {plan.per_round} devices"):
                rounds, trail = await _rounds(plan, screen, spafl, operator, meter.url, bundle, devices)
        with screen.stage("compact and prove"):
            proofs = await _together(_compact(screen, spafl, device) for device in devices)
        with screen.stage("train alone, for comparison"):
            alone = await _together(_train_alone(plan, screen, spafl, device) for device in devices)
        with screen.stage("measure the initial model"):
            before = await asyncio.to_thread(_initial_accuracy, plan, bundle, devices)
    results = Results.of(
        meter.traffic,
        model=plan.model,
        dataset=plan.dataset,
        alpha=plan.alpha,
        seed=plan.seed,
        settings=plan.hyperparameters.model_dump(),
        layers={layer.name: layer.out for layer in bundle.manifest.layout.layers},
        weights=proofs[0].masked.weights,
        participations=plan.rounds * plan.per_round,
        rounds=tuple(rounds),
        devices=tuple(
            Device(
                name=device.name,
                examples=device.examples,
                held_out=device.held_out,
                rounds=len(device.trained),
                steps=sum(event["steps"] for event in device.trained),
                before=before[device.name],
                after=device.trained[-1]["accuracy"],
                local_only=accuracy,
                proof=proof,
            )
            for device, proof, accuracy in zip(devices, proofs, alone, strict=True)
        ),
        fedavg_body=2 * plan.rounds * plan.per_round * _tensor_bytes(bundle),
        seconds=screen.seconds,
    )
    return results, trail


async def _split(plan: Plan, spafl: Any) -> list[_Device]:
    limit = () if plan.limit is None else ("--limit", str(plan.limit))
    (told,) = await spafl(
        "split", "data", "split", plan.dataset, "--clients", str(plan.devices), "--alpha", str(plan.alpha),
        "--seed", str(plan.seed), "--out", plan.work / "data", *limit,
    )  # fmt: skip
    return [
        _Device(
            name=f"device-{number:02}",
            file=Path(client["file"]),
            state=plan.work / "states" / f"device-{number:02}",
            examples=sum(client["train"]),
            held_out=sum(client["test"]),
        )
        for number, client in enumerate(told["clients"])
    ]


async def _rounds(
    plan: Plan,
    screen: Screen,
    spafl: Any,
    operator: Operator,
    url: str,
    bundle: Bundle,
    devices: list[_Device],
) -> tuple[list[Round], Trail]:
    """Returns the aggregated rounds and what the figures need of them."""
    layout = bundle.manifest.layout
    trail = Trail(max((layer for layer in layout.layers if layer.out <= 128), key=lambda layer: layer.out))
    settings = RunSettings(
        name=RUN,
        bundle=await operator.upload(bundle.path),
        rounds=plan.rounds,
        target=plan.per_round,
        minimum=plan.per_round,
        deadline=_DAY,
        lease=_DAY,
        hyperparameters=plan.hyperparameters,
    )
    await operator.start(settings)
    aggregated: asyncio.Queue[Round] = asyncio.Queue()

    async def follow() -> None:
        async for event in operator.events(RUN):
            screen.happened(event)
            if event.kind == "round.aggregated":
                await aggregated.put(Round.model_validate({"round": event.round, **event.data}))
            elif event.kind in ("round.failed", "run.paused", "run.stopped"):
                raise DemoError(f"{event.kind} in round {event.round}: {event.data.get('reason')}")

    async def train() -> list[Round]:
        rounds = []
        for number, cohort in enumerate(plan.cohorts(), 1):
            await _together(_take_part(plan, screen, spafl, url, devices[index]) for index in cohort)
            rounds.append(await aggregated.get())
            if number in plan.pictured:
                trail.active[number] = np.stack([_active(device, bundle, trail.layer) for device in devices])
        return rounds

    _, rounds = await _together([follow(), train()])
    trail.thresholds = [await operator.thresholds(RUN, version, layout) for version in range(plan.rounds + 1)]
    return rounds, trail


async def _take_part(plan: Plan, screen: Screen, spafl: Any, url: str, device: _Device) -> None:
    def heard(event: Event) -> None:
        screen.heard(device.name, event)
        if event.get("event") == "round.trained":
            device.trained.append(event)
        if event.get("event") == "round.diverged":
            raise DemoError(f"{device.name} diverged: {event.get('reason')}; try a lower --lr")

    await spafl(
        device.name, "device", "run", "--run", RUN, "--rounds", "1", "--server", url, "--name", device.name,
        "--state", device.state, "--data", device.file, "--seed", str(plan.seed), heard=heard,
    )  # fmt: skip


async def _compact(screen: Screen, spafl: Any, device: _Device) -> Proof:
    (told,) = await spafl(device.name, "device", "compact", "--state", device.state, "--data", device.file)
    screen.doing(device.name, "compact")
    return Proof.model_validate(told)


async def _train_alone(plan: Plan, screen: Screen, spafl: Any, device: _Device) -> float:
    """Returns the accuracy after as many rounds of the same steps as the device trained, without exchange."""
    options = [
        text
        for name, value in plan.hyperparameters.model_dump(exclude_none=True).items()
        for text in (f"--{name.replace('_', '-')}", str(value))
    ]
    last = 0.0

    def heard(event: Event) -> None:
        nonlocal last
        if event.get("event") == "round.trained":
            last = event["accuracy"]

    screen.doing(device.name, "training alone")
    await spafl(
        f"{device.name}-alone", "device", "train", "--bundle", plan.work / "bundle.zip", "--data", device.file,
        "--state", plan.work / "alone" / device.name, "--rounds", str(len(device.trained)),
        "--seed", str(plan.seed), *options, heard=heard,
    )  # fmt: skip
    screen.doing(device.name, "")
    return last


def _initial_accuracy(plan: Plan, bundle: Bundle, devices: list[_Device]) -> dict[str, float]:
    """Returns each device's accuracy with the weights of the bundle: with thresholds at 0 every filter is active."""
    manifest = bundle.manifest
    model = MODELS[plan.model](len(manifest.labels))
    thresholds = {layer.threshold for layer in manifest.layout.layers}
    weights = {
        name: torch.from_numpy(value)
        for name, value in bundle.initial_state().items()
        if name not in thresholds
    }
    model.load_state_dict(weights, strict=False)  # the bundle does not count batches
    accuracies = {}
    for device in devices:
        test = load_arrays(device.file).test
        accuracies[device.name] = evaluate(model, model_input(test.x, manifest.input), test.y)[1]
    return accuracies


def _active(device: _Device, bundle: Bundle, layer: Layer) -> NDArray[np.bool_]:
    """Returns which filters (out,) of `layer` are active in the device's model at rest; no agent runs meanwhile."""
    journal = device.state / "journal.json"
    state = json.loads(journal.read_bytes())["state"] if journal.exists() else None
    tensors = bundle.initial_state() if state is None else safetensors.numpy.load_file(device.state / state)
    return algorithm.mask(layer, tensors)


def _tensor_bytes(bundle: Bundle) -> int:
    """Returns the bytes of everything but thresholds in float32: what FedAvg sends."""
    manifest = bundle.manifest
    return 4 * sum(int(np.prod(tensor.shape)) for tensor in manifest.state if tensor.role != "threshold")


async def _together(coroutines: Iterable[Coroutine[Any, Any, Any]]) -> list[Any]:
    """Returns the results in order; when one fails the others are cancelled, and the first failure is raised."""
    try:
        async with asyncio.TaskGroup() as group:
            tasks = [group.create_task(coroutine) for coroutine in coroutines]
    except* SpaflError as failures:
        first = failures
        while isinstance(first.exceptions[0], BaseExceptionGroup):
            first = first.exceptions[0]
        raise first.exceptions[0] from None
    return [task.result() for task in tasks]
