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
from spafl.layout import Floats, Layer
from spafl.protocol import RunSettings
from trainer.data import load_arrays, model_input
from trainer.demo.fleet import Event, Fleet
from trainer.demo.meter import Meter
from trainer.demo.operator import Operator
from trainer.demo.plan import Plan
from trainer.demo.results import Device, Proof, Results, Round
from trainer.demo.screen import Screen
from trainer.errors import DemoError
from trainer.local import evaluate
from trainer.models import MODELS

RUN = "demo"
MAX_PICTURED = 128
"""Filters of the largest layer whose active filters are drawn one by one."""
_DAY = 86_400.0


@dataclass(slots=True)
class Trail:
    """What the figures show besides the results.

    thresholds   (rounds + 1, size) global thresholds by version
    layer        the one looked at: most filters among those with at most `MAX_PICTURED`
    active       by pictured round, its active filters (devices, filters)
    """

    layer: Layer
    thresholds: list[Floats] = field(default_factory=list)
    active: dict[int, NDArray[np.bool_]] = field(default_factory=dict)


@dataclass(slots=True)
class _Device:
    """A device of the demo: its process's name, its examples, and what its processes told."""

    name: str
    engine: str
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
    async with Fleet(plan.work / "logs", plan.at_once) as fleet:
        await fleet.run("engines", "device", "engines", *plan.engines, "--json")
        with screen.stage(f"split {Path(plan.dataset).name}"):
            devices = await _split(plan, fleet)
            screen.devices({device.name: device.examples for device in devices})
        with screen.stage(f"export {plan.model}"):
            bundle = await _export(plan, fleet)
        demo = _Demo(plan, screen, fleet, bundle, devices)
        with screen.stage("start the server"):
            up = await fleet.serve("server", "serve", "--json", "--port", "0", "--data", plan.work / "server")
            fleet.environment["SPAFL_ENROLMENT_KEY"] = up["enrolment_key"]
        async with (
            Operator(up["url"], up["admin_token"]) as operator,
            Meter(urlsplit(up["url"]).port or 0) as meter,
        ):
            with screen.stage(f"{plan.rounds} rounds of {plan.per_round} devices"):
                rounds, trail = await demo.rounds(operator, meter.url)
        with screen.stage("compact and prove"):
            # one after the other: they measure latencies
            proofs = [await demo.compact(device) for device in devices]
        with screen.stage("train alone, for comparison"):
            alone = await _together(map(demo.train_alone, devices))
        with screen.stage("measure the initial model"):
            before = await asyncio.to_thread(_initial_accuracy, plan.model, bundle, devices)
    participations = plan.rounds * plan.per_round
    results = Results.of(
        meter.traffic,
        model=plan.model,
        dataset=plan.dataset,
        alpha=plan.alpha,
        seed=plan.seed,
        settings=plan.hyperparameters.to_json(),
        layers={layer.name: layer.out for layer in bundle.manifest.layout.layers},
        weights=proofs[0].masked.weights,
        participations=participations,
        rounds=tuple(rounds),
        devices=tuple(
            Device(
                name=device.name,
                engine=device.engine,
                examples=device.examples,
                held_out=device.held_out,
                rounds=len(device.trained),
                steps=sum(event["steps"] for event in device.trained),
                before=initial,
                after=device.trained[-1]["accuracy"],
                local_only=accuracy,
                proof=proof,
            )
            for device, proof, accuracy, initial in zip(devices, proofs, alone, before, strict=True)
        ),
        fedavg_body=2 * participations * _tensor_bytes(bundle),
        seconds=screen.seconds,
    )
    return results, trail


async def _split(plan: Plan, fleet: Fleet) -> list[_Device]:
    limit = () if plan.limit is None else ("--limit", str(plan.limit))
    (told,) = await fleet.run(
        "split", "data", "split", plan.dataset, "--clients", str(plan.devices), "--alpha", str(plan.alpha),
        "--seed", str(plan.seed), "--out", plan.work / "data", *limit, "--json",
    )  # fmt: skip
    return [
        _Device(
            name=f"device-{number:02}",
            engine=plan.engines[number % len(plan.engines)],
            file=Path(client["file"]),
            state=plan.work / "states" / f"device-{number:02}",
            examples=sum(client["train"]),
            held_out=sum(client["test"]),
        )
        for number, client in enumerate(told["clients"])
    ]


async def _export(plan: Plan, fleet: Fleet) -> Bundle:
    file = plan.work / "bundle.zip"
    # inputs are scaled by the test examples: whoever exports has those, never the devices' own
    await fleet.run(
        "export", "export", plan.model, "--data", plan.work / "data" / "test.npz", "--out", file,
        "--seed", str(plan.seed), "--parity" if plan.parity else "--no-parity",
        *(text for engine in plan.engines for text in ("--engine", engine)), "--json",
    )  # fmt: skip
    return Bundle.open(file)


@dataclass(frozen=True, slots=True)
class _Demo:
    """The part of a demo in which devices work."""

    plan: Plan
    screen: Screen
    fleet: Fleet
    bundle: Bundle
    devices: list[_Device]

    async def rounds(self, operator: Operator, url: str) -> tuple[list[Round], Trail]:
        """Returns the aggregated rounds and what the figures need of them; devices speak to the server at `url`."""
        plan, layout = self.plan, self.bundle.manifest.layout
        small = [layer for layer in layout.layers if layer.out <= MAX_PICTURED] or layout.layers
        trail = Trail(max(small, key=lambda layer: layer.out))
        settings = RunSettings(
            name=RUN,
            bundle=await operator.upload(self.bundle.path),
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
                self.screen.happened(event)
                if event.kind == "round.aggregated":
                    await aggregated.put(Round.model_validate({"round": event.round, **event.data}))
                elif event.kind in ("round.failed", "run.paused", "run.stopped"):
                    raise DemoError(f"{event.kind} in round {event.round}: {event.data.get('reason')}")

        async def train() -> list[Round]:
            done = []
            for number, cohort in enumerate(plan.cohorts(), 1):
                await _together(self.take_part(self.devices[index], url) for index in cohort)
                done.append(await aggregated.get())
                if number in plan.pictured:
                    masks = [_active(device, self.bundle, trail.layer) for device in self.devices]
                    trail.active[number] = np.stack(masks)
            return done

        _, done = await _together([follow(), train()])
        for version in range(plan.rounds + 1):
            trail.thresholds.append(await operator.thresholds(RUN, version, layout))
        return done, trail

    async def take_part(self, device: _Device, url: str) -> None:
        """Returns once the device trained and reported one round, in a process of its own."""

        def heard(event: Event) -> None:
            self.screen.heard(device.name, event)
            if event.get("event") == "round.trained":
                device.trained.append(event)
            if event.get("event") == "round.diverged":
                raise DemoError(f"{device.name} diverged: {event.get('reason')}; try a lower --lr")

        await self.fleet.run(
            device.name, "device", "run", "--run", RUN, "--rounds", "1", "--server", url, "--name", device.name,
            "--state", device.state, "--data", device.file, "--seed", str(self.plan.seed), "--engine", device.engine,
            "--json", heard=heard,
        )  # fmt: skip

    async def compact(self, device: _Device) -> Proof:
        """Returns the proof for the device's compact model."""
        (told,) = await self.fleet.run(
            device.name, "device", "compact", "--state", device.state, "--data", device.file, "--json"
        )
        self.screen.doing(device.name, "compact")
        return Proof.model_validate(told)

    async def train_alone(self, device: _Device) -> float:
        """Returns the accuracy after as many rounds of the same steps as the device trained, without exchange."""
        options = [
            text
            for name, value in self.plan.hyperparameters.present().items()
            for text in (f"--{name.replace('_', '-')}", str(value))
        ]
        self.screen.doing(device.name, "training alone")
        events = await self.fleet.run(
            f"{device.name}-alone", "device", "train", "--bundle", self.bundle.path, "--data", device.file,
            "--state", self.plan.work / "alone" / device.name, "--rounds", str(len(device.trained)),
            "--seed", str(self.plan.seed), "--engine", device.engine, *options, "--json",
        )  # fmt: skip
        self.screen.doing(device.name, "")
        return float([event for event in events if event.get("event") == "round.trained"][-1]["accuracy"])


def _initial_accuracy(model: str, bundle: Bundle, devices: list[_Device]) -> list[float]:
    """Returns each device's accuracy with the bundle's weights: with thresholds at 0 every filter is active."""
    manifest = bundle.manifest
    plain = MODELS[model](len(manifest.labels))
    thresholds = {layer.threshold for layer in manifest.layout.layers}
    weights = {
        name: torch.from_numpy(value)
        for name, value in bundle.initial_state().items()
        if name not in thresholds
    }
    plain.load_state_dict(weights, strict=False)  # the bundle does not count batches
    tests = [load_arrays(device.file).test for device in devices]
    return [evaluate(plain, model_input(test.x, manifest.input), test.y)[1] for test in tests]


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
