"""`spafl export` as a user calls it: what it writes, what it says, and what it does not write."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from device_runtime.data import load_data
from export.build import export_bundle
from export.command import app
from export.compact import CompactModel
from export.decompositions import LoweringError
from export.parity import DENSITIES, ParityError
from export.source import load_model
from spafl.bundle import Bundle
from spafl.errors import SpaflError
from spafl.manifest import InputSpec
from trainer.models import MODELS
from trainer.sparsify import sparsify

runner = CliRunner()

MODULE = "tests.export.test_export_command"


class Small(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.head = nn.Linear(4, 6), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(torch.relu(self.first(x)))


def small() -> nn.Module:
    return Small()


def _hidden() -> nn.Module:
    return Small()


def no_model() -> str:
    return "text"


def needs_more(size: int) -> nn.Module:
    return nn.Linear(size, size)


def two_outputs() -> nn.Module:
    return nn.Sequential(nn.Flatten(0), nn.Linear(4, 3), nn.ReLU(), nn.Linear(3, 2))


def images() -> nn.Module:
    return nn.Sequential(nn.Conv2d(1, 2, 3), nn.BatchNorm2d(2), nn.ReLU(), nn.Flatten(), nn.Linear(72, 3))


def called(*arguments: object) -> str:
    """Standard output of a call that succeeds."""
    result = runner.invoke(app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result.stdout


def refused(out: Path, *arguments: object) -> str:
    """What a refused call says; `spafl` prints a SpaflError as one line. Nothing may be written."""
    result = runner.invoke(app, [str(argument) for argument in (*arguments, "--out", out)])
    assert isinstance(result.exception, SpaflError), result.exception
    assert not out.exists()
    return str(result.exception)


@pytest.fixture
def out(tmp_path: Path) -> Path:
    return tmp_path / "bundle.zip"


def test_a_function_of_ones_own_becomes_a_bundle(out: Path) -> None:
    told = json.loads(called(f"{MODULE}:small", "--shape", 4, "--out", out, "--json"))
    bundle = Bundle.open(out)
    manifest = bundle.manifest
    assert (told["id"], told["name"], told["thresholds"], told["weights"]) == (bundle.id, "small", 6, 42)
    assert told["layout"] == manifest.layout.id
    assert told["train_step"]["form"] == "rows"
    assert manifest.labels == ("0", "1", "2")
    assert manifest.input == InputSpec(shape=(4,), mean=(0.0,) * 4, std=(1.0,) * 4)
    assert manifest.options["model"] == f"{MODULE}:small"
    checks = told["checks"]
    assert {check["density"] for check in checks} == set(DENSITIES)
    assert len(checks) == 7 * len(DENSITIES)
    assert all(check["difference"] <= check["tolerance"] for check in checks)
    written = json.loads(bundle.read("parity.json"))
    assert [check["worst"] for check in written["checks"]] == [check["worst"] for check in checks]
    assert written["versions"]["torch"] == torch.__version__


def test_start_weights_and_switches(out: Path, tmp_path: Path) -> None:
    torch.manual_seed(7)
    weights = Small().state_dict()
    safetensors.torch.save_file(weights, tmp_path / "w.safetensors")
    torch.save(weights, tmp_path / "w.pt")
    text = called(
        f"{MODULE}:_hidden", "--shape", 4, "--init", tmp_path / "w.pt", "--no-parity", "--no-rows",
        "--mask-head", "--out", out,
    )  # fmt: skip
    bundle = Bundle.open(out)
    assert text.startswith(f"{out}: hidden, 9 thresholds for 42 weights")
    assert "parity.json" not in bundle.manifest.files
    assert bundle.manifest.train_step.form == "dense"
    assert [layer.name for layer in bundle.manifest.layout.layers] == ["first", "head"]
    state = bundle.initial_state()
    assert {name for name in state if not name.endswith(".threshold")} == set(weights)
    assert all(np.array_equal(state[name], value.numpy()) for name, value in weights.items())
    assert not state["first.threshold"].any()
    again = load_model(f"{MODULE}:small", None, tmp_path / "w.safetensors", 1).state_dict()
    assert all(torch.equal(again[name], value) for name, value in weights.items())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (
            ["lenet6"],
            f"no model 'lenet6': expected {', '.join(MODELS)} or module:function",
        ),
        (["no.such.module:f"], "cannot import 'no.such.module:f'"),
        ([f"{MODULE}:missing"], "cannot import"),
        ([":small"], "cannot import ':small'"),
        ([f"{MODULE}:no_model"], "returned str, expected a torch.nn.Module"),
        ([f"{MODULE}:needs_more"], "takes no arguments"),
        ([f"{MODULE}:small"], "what does the model take? Give --data, or --shape"),
        ([f"{MODULE}:small", "--shape", "four"], "--shape 'four': expected numbers such as 3,32,32"),
        ([f"{MODULE}:small", "--shape", "4,0"], "expected numbers such as 3,32,32"),
        ([f"{MODULE}:small", "--shape", "-4"], "expected numbers such as 3,32,32"),
        ([f"{MODULE}:small", "--shape", "5"], "the model does not take examples of shape (5,)"),
        ([f"{MODULE}:images", "--shape", "64"], "the model does not take examples of shape (64,)"),
        ([f"{MODULE}:two_outputs", "--shape", "2", "--mask-head"], "expected logits (batch, labels)"),
        (
            [f"{MODULE}:small", "--shape", "4", "--labels", "4"],
            "the model has 3 outputs, but there are 4 labels",
        ),
        ([f"{MODULE}:small", "--shape", "4", "--name", "a b"], "name 'a b': expected letters, digits"),
        ([f"{MODULE}:small", "--shape", "4", "--data", "no-such-folder"], "no-such-folder"),
        ([f"{MODULE}:small", "--shape", "4", "--init", "nowhere.pt"], "no weights at nowhere.pt"),
    ],
    ids=lambda value: " ".join(value).removeprefix(f"{MODULE}:") if isinstance(value, list) else "",
)
def test_refused_in_words(arguments: list[str], words: str, out: Path) -> None:
    assert words in refused(out, *arguments)


class Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed, self.conv, self.head = nn.Embedding(30, 4), nn.Conv1d(4, 5, 3), nn.Linear(5, 3)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # (N, 8)
        return self.head(self.conv(self.embed(x.long()).transpose(1, 2)).relu().mean(2))


def words() -> nn.Module:
    return Words()


def windows() -> nn.Module:
    return nn.Sequential(nn.Conv1d(2, 4, 3), nn.ReLU(), nn.Flatten(), nn.Linear(40, 3))


def test_text_and_sensor_data_from_npz_to_a_device(out: Path, tmp_path: Path) -> None:
    """Ids are neither centred nor scaled, and samples keep their two axes, on both sides."""
    draw = np.random.default_rng(0)
    ids, y = draw.integers(0, 30, (40, 8), np.uint8), np.arange(40) % 3
    np.savez(tmp_path / "words.npz", x=ids, y=y)
    called(f"{MODULE}:words", "--data", tmp_path / "words.npz", "--out", out)
    manifest = Bundle.open(out).manifest
    assert manifest.input == InputSpec(shape=(8,), mean=(0.0,) * 8, std=(1.0,) * 8, ids=30)
    local = load_data(str(tmp_path / "words.npz"), manifest, validation=0).train
    assert np.array_equal(local.inputs(manifest.input), ids)

    x = draw.normal(0, 1, (40, 2, 12))
    np.savez(tmp_path / "windows.npz", x=x, y=y)
    arguments = (f"{MODULE}:windows", "--data", tmp_path / "windows.npz", "--no-parity")
    assert "--shape gives another" in refused(tmp_path / "none.zip", *arguments)
    called(*arguments, "--shape", "2,12", "--out", tmp_path / "windows.zip")
    manifest = Bundle.open(tmp_path / "windows.zip").manifest
    assert (manifest.input.shape, manifest.input.ids) == ((2, 12), None)
    local = load_data(str(tmp_path / "windows.npz"), manifest, validation=0).train
    assert np.array_equal(local.inputs(manifest.input), x.astype(np.float32))


class Evil:
    def __reduce__(self) -> tuple[object, ...]:
        return (Path.touch, (Path("owned"),))


def test_weights_that_are_not_the_models(out: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    weights = Small().state_dict()
    files: dict[str, object] = {
        "less.pt": {name: value for name, value in weights.items() if name != "head.bias"},
        "more.pt": {**weights, "other": torch.zeros(1)},
        "shape.pt": {**weights, "first.weight": torch.zeros(6, 5)},
        "training.pt": {"epoch": 3, "model": weights},
        "list.pt": [1, 2, 3],
    }
    for name, content in files.items():
        torch.save(content, name)
    Path("evil.pt").write_bytes(pickle.dumps(Evil()))
    Path("noise.pt").write_bytes(b"\x00" * 64)
    Path("noise.safetensors").write_bytes(b"\xff" * 64)
    said = {
        "less.pt": "head.bias (3,) -> None",
        "more.pt": "other None -> (1,)",
        "shape.pt": "first.weight (6, 4) -> (6, 5)",
        "training.pt": "is not a state_dict of tensors",
        "list.pt": "is not a state_dict of tensors",
        "evil.pt": "is not a state_dict of tensors",
        "noise.pt": "is not a state_dict of tensors",
        "noise.safetensors": "is not a state_dict of tensors",
    }
    for name, words in said.items():
        assert words in refused(out, f"{MODULE}:small", "--shape", "4", "--init", name), name
    assert not Path("owned").exists()


def written(out: Path, **options: object) -> None:
    torch.manual_seed(0)
    spec = InputSpec(shape=(4,), mean=(0.0,) * 4, std=(1.0,) * 4)
    export_bundle(sparsify(Small()), out, name="small", input=spec, labels=tuple("abc"), **options)  # type: ignore[arg-type]


def test_a_step_that_forgets_the_thresholds_gradient_writes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """What exporters do without a word: the mask as a constant, which only the regulariser's gradient survives."""
    run_rows = CompactModel.run_rows

    def forgetful(self: CompactModel, rows: dict[str, Tensor], x: Tensor) -> Tensor:
        constant = {n: v.detach() if n.endswith(".threshold") else v for n, v in rows.items()}
        return run_rows(self, constant, x)

    monkeypatch.setattr(CompactModel, "run_rows", forgetful)
    with pytest.raises(ParityError, match=r"threshold gradients, coeff = 0 .*first\.threshold differs"):
        written(out)
    assert not out.exists()


def test_compaction_that_cuts_the_wrong_channels_writes_nothing(
    out: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(
        "export.compact.select_columns",
        lambda weight, active, columns: weight.flip(1).index_select(1, active),
    )
    # a dense step selects no columns, so that inference is where it shows
    with pytest.raises(ParityError, match=r"compact inference at density 1.0: logits differs"):
        written(out, rows=False)
    assert not out.exists()


class Odd(Small):
    """A small model with one thing in it that devices cannot train."""

    def __init__(self, name: str, thing: nn.Module | Tensor) -> None:
        super().__init__()
        if isinstance(thing, nn.Module):
            self.add_module(name, thing)
        else:
            self.register_buffer(name, thing, persistent=False)


@pytest.mark.parametrize(
    ("name", "thing", "words"),
    [
        ("mean", torch.zeros(4), "buffer 'mean': devices keep parameters and batch norm statistics only"),
        ("drop", nn.Dropout(0.5), "dropout 'drop' draws random numbers"),
        ("ice", nn.Linear(2, 2).requires_grad_(False), "parameter 'ice.weight' is frozen"),
    ],
    ids=["buffer", "dropout", "frozen"],
)
def test_what_devices_cannot_train_is_named(
    name: str, thing: nn.Module | Tensor, words: str, out: Path
) -> None:
    spec = InputSpec(shape=(4,), mean=(0.0,) * 4, std=(1.0,) * 4)
    with pytest.raises(LoweringError, match=words):
        export_bundle(sparsify(Odd(name, thing)), out, name="odd", input=spec, labels=tuple("abc"))
    assert not out.exists()
