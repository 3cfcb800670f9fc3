"""Training without a server: what a device reaches alone, to compare with what it reaches in a run."""

from device_runtime.engines import Engine
from device_runtime.errors import Diverged, StateError
from device_runtime.examples import LocalData
from device_runtime.report import Report
from device_runtime.state import DeviceState
from device_runtime.training import LocalRound, Tempo
from device_runtime.watch import Watch
from spafl.bundle import Bundle, write_bundle
from spafl.hyperparameters import Hyperparameters
from spafl.protocol import Lease, Policy

RUN = "local"
_NEVER = 1e12


def adopt(state: DeviceState, bundle: Bundle) -> Bundle:
    """Returns `bundle` from the state directory, copied there unless it already is.

    Raises:
        StateError: the directory holds another bundle.
    """
    if not state.bundle_path.exists():
        part = state.path / f"bundle-{bundle.id[:12]}.part"
        files = {name: bundle.read(name) for name in bundle.manifest.files}
        write_bundle(part, bundle.manifest, files)
        part.replace(state.bundle_path)
    held = Bundle.open(state.bundle_path)
    if held.id != bundle.id:
        raise StateError(
            f"{state.path} holds bundle {held.id[:12]}, not {bundle.id[:12]}: give another --state"
        )
    return held


def train_locally(
    state: DeviceState,
    bundle: Bundle,
    engine: Engine,
    data: LocalData,
    rounds: int,
    hyperparameters: Hyperparameters,
    *,
    seed: int,
    watch: Watch,
    report: Report,
    tempo: Tempo | None = None,
) -> None:
    """Returns nothing once the state's model has trained `rounds` rounds in all, with the thresholds it made itself.

    The rounds are those of a run, leases included, which the device grants itself; so they survive kill -9 alike.

    Raises:
        Diverged: training left the finite numbers; the model before the round is kept.
        StateError: the state belongs to a run with a server, or to another bundle.
        Stopped: a signal came; the round is saved.
    """
    while not state.begun or state.journal.trained < rounds or state.journal.phase != "idle":
        phase = state.journal.phase if state.begun else "idle"
        if phase == "trained":
            state.settled("local")
            continue
        if phase != "training":
            number = state.journal.trained if state.begun else 0
            state.leased(_lease(bundle, number, rounds, hyperparameters))
        local_round = LocalRound(engine, state, data, watch=watch, report=report, tempo=tempo)
        if phase == "training":
            local_round.resume()
        else:
            tensors, _ = state.rest(bundle)
            own = bundle.manifest.layout.join(tensors)
            local_round.begin(tensors, own, own, seed)
            del tensors  # the engine has its own now
        try:
            local_round.run()
        except Diverged:
            state.diverged()  # so that the same command with a lower --lr starts this round anew
            raise


def _lease(bundle: Bundle, number: int, rounds: int, hyperparameters: Hyperparameters) -> Lease:
    return Lease(
        run=RUN,
        round=number,
        version=0,
        bundle=bundle.id,
        layout=bundle.manifest.layout.id,
        expires=_NEVER,
        deadline=_NEVER,
        rounds=rounds,
        precision="f32",
        hyperparameters=hyperparameters.at(number, rounds),
        policy=Policy(),
    )
