"""Records are read exactly as pydantic reads the same classes from JSON: servers do the one, devices the other."""

import copy
import json
import math
from dataclasses import FrozenInstanceError, dataclass, field, replace
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import TypeAdapter, ValidationError
from pydantic_core import core_schema

from device_runtime.journal import Identity, Journal, Progress
from spafl.hyperparameters import Hyperparameters
from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import EngineFiles, InputSpec, Manifest
from spafl.program import ProgramHeader
from spafl.proof import Proof
from spafl.protocol import (
    BundleView,
    DeviceView,
    EnrolmentRequest,
    Event,
    Lease,
    LeaseRequest,
    Metrics,
    Problem,
    RoundView,
    RunSettings,
    RunView,
    Versions,
)
from spafl.record import Limits, Record, RecordError, parsed_json
from spafl.secret import Secret

HEX = "0123456789abcdef" * 4
SETTINGS = {
    "name": "demo",
    "bundle": HEX,
    "target": 4,
    "minimum": 2,
    "hyperparameters": {"lr": 0.1},
    "policy": {},
}
LEASE = {
    "run": "demo",
    "round": 3,
    "version": 2,
    "bundle": HEX,
    "layout": "0" * 16,
    "expires": 10.5,
    "deadline": 20,
    "rounds": 15,
    "precision": "f16",
    "hyperparameters": {"epochs": 2, "clip": None, "ramp": "none"},
    "policy": {"min_battery_percent": 20, "max_temperature_celsius": 45.5},
}
FIGURES = {"bytes": 10, "weights": 9, "flops": 8, "latency_median_ms": 0.5, "latency_p95_ms": 1}
LAYERS = [{"name": "fc", "kind": "linear", "out": 3, "n_in": 4, "n_scale": 4, "offset": 0, "scale": 1}]
MANIFEST = {
    "name": "tiny",
    "layout": LAYERS,
    "state": [
        {"name": "fc.weight", "shape": [3, 4], "role": "weight", "layer": "fc", "rows": True},
        {"name": "fc.threshold", "shape": [3], "role": "threshold", "layer": "fc", "rows": True},
    ],
    "input": {"shape": [1, 4], "mean": [0.5], "std": [0.25]},
    "labels": ["no", "yes"],
    "options": {"gate": True, "ste": "identity", "share": 0.5, "count": 3},
    "train_step": {"form": "rows", "reason": "gated"},
    "compaction": [
        {"layer": "fc", "out": 3, "n_in": 4, "positions": 1, "reads": {}, "drops": True, "reason": ""}
    ],
    "engines": {
        "onnx": {"files": {"step": "a.onnx"}, "requires": {"opset": "18"}, "operators": {"step": {"Add": 2}}}
    },
    "files": {"a.onnx": {"bytes": 5, "sha256": HEX}, "sub/b": {"bytes": 0, "sha256": HEX}},
    "producer": {"spafl": "0"},
}
EXAMPLES: list[tuple[type[Record], dict[str, Any]]] = [
    (Hyperparameters, {"epochs": 5, "lr": 1, "threshold_lr": 0.1, "clip": None, "ramp": "fmnist"}),
    (EnrolmentRequest, {"name": "kitchen", "capabilities": {"engine": "onnx", "platform": "Ä"}}),
    (RunSettings, SETTINGS),
    (LeaseRequest, {"version": 0, "capabilities": {}}),
    (Lease, LEASE),
    (
        Metrics,
        {
            "examples": 5,
            "loss": -0.5,
            "density": [1, 0.5],
            "steps": None,
            "collapsed": ["a", "b"],
            "seconds": 3,
        },
    ),
    (
        RoundView,
        {
            **{
                "run": "demo",
                "round": 1,
                "state": "open",
                "version": 0,
                "opened": 1.5,
                "deadline": 2,
                "leased": 1,
            },
            **{"reported": 0, "target": 2, "minimum": 1, "closed": None, "density": [0.5], "extended": False},
        },
    ),
    (
        RunView,
        {
            **{"run": "demo", "settings": SETTINGS, "state": "running", "layout": "0" * 16, "round": None},
            **{"version": 1, "created": 1e9, "rounds_done": 1, "rounds_failed": 0},
        },
    ),
    (BundleView, {"id": HEX, "name": "n", "layout": "l", "thresholds": 5, "bytes": 6, "created": 0}),
    (
        DeviceView,
        {"device": "d", "name": None, "created": 1, "last_seen": 2.5, "capabilities": {}, "updates": 0},
    ),
    (
        Event,
        {
            **{"id": 1, "time": 2.0, "run": "demo", "kind": "round.opened", "round": 1, "device": None},
            **{"data": {"a": 1, "b": 2.5, "c": "x", "d": True, "e": [1.5, 2], "f": None}},
        },
    ),
    (Problem, {"type": "urn:x", "title": "No", "status": 404, "detail": "", "retry_after": 2}),
    (Versions, {"spafl": "0", "protocol": "v1", "python": "3", "packages": {"numpy": "2"}}),
    (
        ProgramHeader,
        {
            **{
                "bundle": HEX,
                "layout": HEX[:16],
                "mask": HEX,
            },
            **{"executorch": "1.5.1", "inputs": ["a"], "holes": [[0, 4], [8, 12]], "fold": 1, "model": 20},
        },
    ),
    (
        Proof,
        {
            **{
                "bundle": None,
                "examples": 5,
                "max_difference": 0.5,
                "relative_difference": 1e-7,
                "equal": True,
            },
            **{
                "argmax_agreement": 1,
                "density": {"fc": 0.5},
                "masked": FIGURES,
                "compact": FIGURES,
                "threads": 1,
            },
            **{"layers": [{"layer": "fc", "kept": 1, "total": 2, "reason": ""}], "runtime": "onnx"},
        },
    ),
    (Identity, {"server": "http://server", "device": "d1", "token": "secret"}),
    (Progress, {"seed": 3, "loss": 0.5, "collapsed": ["fc"]}),
    (
        Journal,
        {
            **{
                "format": "spafl-device",
                "format_version": 1,
                "run": "demo",
                "bundle": HEX,
                "phase": "leased",
            },
            **{"state": "state-7.safetensors", "lease": LEASE, "progress": {"epoch": 1}, "skip": -1},
        },
    ),
    (InputSpec, {"shape": [1, 2, 2], "mean": [0], "std": [1]}),
    (EngineFiles, {"files": {"a": "b/c"}, "requires": {}, "operators": {}}),
    (Manifest, MANIFEST),
]
STRANGERS: list[Any] = [
    *[
        None,
        True,
        False,
        0,
        1,
        -1,
        2,
        5,
        1.0,
        5.0,
        -0.0,
        0.5,
        1e-9,
        1e30,
        10**13,
        2**53 + 1,
        math.nan,
        math.inf,
    ],
    *[
        "",
        "x",
        "5",
        "1.0",
        "true",
        "a\n",
        "Ä",
        "\ud800",
        "a/../b",
        HEX,
        HEX + "\n",
        "none",
        "x" * 65,
        "x" * 2000,
    ],
    *[[], [1], [1, 2], ["a"], [[0, 4]], [None], {}, {"a": 1}, {"a": "b"}, {"../a": "b"}, {"a": {"a": 1}}],
]
"""Wrong in most places, right in some: types, bounds, lengths and patterns."""


def spoken(kind: Any) -> Any:
    """What lets pydantic read a class with its own JSON, which no server needs."""

    def read(value: Any) -> Any:
        try:
            return kind.from_json(value)
        except Exception as error:
            raise ValueError from error

    return classmethod(lambda *_: core_schema.no_info_plain_validator_function(read))


@pytest.fixture(scope="module")
def adapters() -> Any:
    with pytest.MonkeyPatch.context() as patch:
        for kind in (ThresholdLayout, Secret):
            patch.setattr(kind, "__get_pydantic_core_schema__", spoken(kind), raising=False)
        yield {kind: TypeAdapter(kind) for kind, _ in EXAMPLES}


def places(value: Any) -> list[tuple[Any, Any]]:
    """Every (container, key) in a JSON value."""
    keys = list(value) if isinstance(value, dict) else range(len(value)) if isinstance(value, list) else []
    return [place for key in keys for place in [(value, key), *places(value[key])]]


@st.composite
def mutated(draw: st.DrawFn) -> tuple[type[Record], str]:
    kind, example = draw(st.sampled_from(EXAMPLES))
    document = copy.deepcopy(example)
    for _ in range(draw(st.integers(0, 2))):
        container, key = draw(st.sampled_from(places(document) or [(document, "x")]))
        if key == "format_version":  # pydantic takes true and 1.0 for Literal[1]; no server reads it this way
            continue
        match draw(st.sampled_from(["replace", "remove", "add", "repeat"])):
            case "remove" if key in container or isinstance(container, list):
                del container[key]
            case "add" if isinstance(container, dict):
                container[draw(st.sampled_from(["x", "a", "layer", "../a", "retry_after", "lr"]))] = 1
            case "repeat" if isinstance(container, list):
                container += container
            case _:
                container[key] = copy.deepcopy(draw(st.sampled_from(STRANGERS)))
    return kind, json.dumps(document, ensure_ascii=draw(st.booleans()) or "\\ud800" in json.dumps(document))


@pytest.mark.parametrize(("kind", "example"), EXAMPLES)
def test_examples_are_read_and_come_back(kind: type[Record], example: dict[str, Any]) -> None:
    record = kind.from_json(copy.deepcopy(example))
    assert kind.from_text(json.dumps(example)) == record
    if kind is not Identity:  # whose token turns into stars
        assert kind.from_text(record.to_text()) == record
        assert json.loads(record.to_text(indent=2)) == record.to_json()
    assert replace(record) == record
    with pytest.raises(FrozenInstanceError):
        setattr(record, next(iter(example)), 1)


@settings(max_examples=1500, deadline=None, derandomize=True)
@given(mutated())
def test_it_reads_what_pydantic_reads(adapters: Any, mutant: tuple[type[Record], str]) -> None:
    kind, text = mutant
    try:
        expected = adapters[kind].validate_json(text)
    except ValidationError:
        with pytest.raises(RecordError):
            kind.from_text(text)
    else:
        record = kind.from_text(text)
        assert record == expected
        assert repr(record) == repr(expected)  # 1 is not 1.0 here


@pytest.mark.parametrize(("kind", "example"), EXAMPLES)
def test_it_writes_what_pydantic_writes(adapters: Any, kind: type[Record], example: dict[str, Any]) -> None:
    if kind not in (Identity, Manifest):
        record = kind.from_json(copy.deepcopy(example))
        assert record.to_json() == adapters[kind].dump_python(record, mode="json")


@dataclass(frozen=True, kw_only=True, slots=True)
class Inner(Record):
    share: Annotated[float, Limits(ge=0, lt=1)]
    kind: Literal["a", "b"] = "a"


@dataclass(frozen=True, kw_only=True, slots=True)
class Outer(Record):
    name: Annotated[str, Limits(pattern=r"^[a-z]+$", max_length=4)]
    inner: dict[str, Inner] = field(default_factory=dict)
    pairs: tuple[tuple[int, Annotated[int, Limits(multiple_of=4)]], ...] = ()
    either: int | str | list[float] | None = None
    flag: bool = False

    def check(self) -> None:
        if self.flag and not self.pairs:
            raise ValueError("a flag needs pairs")


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("{}", "name: missing"),
        ('{"name": "a", "nmae": 1}', "nmae: unknown field"),
        ('{"name": 5}', "name: expected text, got a whole number"),
        ('{"name": "A"}', "name: expected text like ^[a-z]+$, got 'A'"),
        ('{"name": "abcde"}', "name: expected a length of at most 4, got 5"),
        ('{"name": "a\\ud800"}', "name: expected text, got half a surrogate pair"),
        ('{"name": "a", "inner": []}', "inner: expected an object, got a list"),
        ('{"name": "a", "inner": {"x": 1}}', "inner.x: expected an object, got a whole number"),
        ('{"name": "a", "inner": {"x": {"share": 1}}}', "inner.x.share: expected less than 1, got 1.0"),
        (
            '{"name": "a", "inner": {"x": {"share": true}}}',
            "inner.x.share: expected a number, got true or false",
        ),
        ('{"name": "a", "inner": {"x": {"share": NaN}}}', "inner.x.share: expected a finite number"),
        (
            f'{{"name": "a", "inner": {{"x": {{"share": {10**400}}}}}}}',
            "inner.x.share: expected a finite number",
        ),
        (
            '{"name": "a", "inner": {"x": {"share": 0, "kind": "c"}}}',
            "inner.x.kind: expected 'a' or 'b', got 'c'",
        ),
        ('{"name": "a", "pairs": [[1, 4], [1]]}', "pairs.1: expected 2 items, got 1"),
        ('{"name": "a", "pairs": [[1, 5]]}', "pairs.0.1: expected a multiple of 4, got 5"),
        ('{"name": "a", "pairs": [[1.0, 4]]}', "pairs.0.0: expected a whole number, got a number"),
        ('{"name": "a", "either": true}', "either: true or false is not among the types allowed here"),
        ('{"name": "a", "flag": 1}', "flag: expected true or false, got a whole number"),
        ('{"name": "a", "flag": true}', "a flag needs pairs"),
        ("[]", "expected an object, got a list"),
        ("", "not JSON: Expecting value"),
        ("[" * 100_000, "not JSON: nested too deeply"),
        ('{"name": ' + "9" * 5000 + "}", "not JSON: ValueError"),
    ],
)
def test_errors_say_where_and_what(text: str, said: str) -> None:
    with pytest.raises(RecordError) as caught:
        Outer.from_text(text)
    assert str(caught.value) == said


@pytest.mark.parametrize("data", [b"\xff{}", '{"name": "a"}'.encode("utf-16"), b'\xef\xbb\xbf{"name": "a"}'])
def test_bytes_are_utf_8_without_a_mark(data: bytes) -> None:
    with pytest.raises(RecordError, match="not JSON"):
        Outer.from_text(data)


def test_records_made_in_code_are_checked_too() -> None:
    made = Outer(name="a", pairs=[[1, 4]], inner={"x": Inner(share=0)})  # type: ignore[arg-type]
    assert made.pairs == ((1, 4),)
    assert type(made.inner["x"].share) is float
    with pytest.raises(RecordError, match="name: expected text like"):
        Outer(name="A")
    with pytest.raises(RecordError, match="a flag needs pairs"):
        replace(made, pairs=(), flag=True)
    with pytest.raises(TypeError):
        Outer()  # type: ignore[call-arg]


def test_present_leaves_out_what_is_null() -> None:
    assert Outer(name="a").present() == {"name": "a", "inner": {}, "pairs": [], "flag": False}


def test_an_error_holds_nothing_of_a_text_that_is_no_json() -> None:
    with pytest.raises(RecordError) as caught:
        parsed_json('{"token": "a secret"')
    error: BaseException | None = caught.value
    while error is not None:
        assert "secret" not in repr(error) + repr(vars(error))
        error = error.__context__


def test_a_layout_names_what_is_wrong_with_it() -> None:
    with pytest.raises(RecordError, match=r"^layout: layer 'fc' starts at 7, expected 0$"):
        Manifest.from_json({**MANIFEST, "layout": [{**LAYERS[0], "offset": 7}]})
    assert Manifest.from_json(MANIFEST).layout == ThresholdLayout((Layer(**LAYERS[0]),))


def test_a_secret_is_never_shown() -> None:
    secret = Secret("hush")
    identity = Identity(server="s", device="d", token=secret)
    shown = [repr(secret), str(secret), f"{secret}", f"{secret!r}", repr(identity), identity.to_text()]
    assert not any("hush" in text for text in shown)
    assert (secret.reveal(), secret == Secret("hush"), secret == Secret("other")) == ("hush", True, False)
    assert len({secret, Secret("hush")}) == 1
    with pytest.raises(RecordError) as caught:
        Identity.from_json({"server": "s", "device": "d", "token": ["hush"]})
    assert str(caught.value) == "token: expected text"
