"""`spafl export --pte` and `spafl programs` as a user calls them: what they write, and what they refuse in words."""

import json
import socket
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy
import torch
from torch import Tensor, nn
from typer.testing import CliRunner

from device_runtime.program import predict
from export import compact_program, program_command
from export.command import app as export_app
from export.program_command import app as programs_app
from export.source import bundle_model
from spafl import algorithm
from spafl.bundle import Bundle
from spafl.errors import SettingsError, SpaflError
from tests.export.bundles import bundle_of
from tests.export.models import Exported, Graphs
from trainer.sparsify import layout_of, sparsify

MODULE = "tests.export.test_program_command"
RELATIVE = 1e-5
"""Of the largest logit: sums of some dozen float32 terms in another order."""


class Small(nn.Module):
    shape = (1, 8, 8)

    def __init__(self, outputs: int = 3) -> None:
        super().__init__()
        self.conv = nn.Conv2d(1, 6, 3)
        self.fc = nn.Linear(6 * 9, 8)
        self.head = nn.Linear(8, outputs)

    def forward(self, x: Tensor) -> Tensor:
        x = nn.functional.max_pool2d(torch.relu(self.conv(x)), 2)
        return self.head(torch.relu(self.fc(x.flatten(1))))


def small() -> nn.Module:
    return Small()


def wider() -> nn.Module:
    return Small(4)


def other() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(64, 6), nn.ReLU(), nn.Linear(6, 3))


def told(app: object, *arguments: object) -> str:
    """What a refused call says; `spafl` prints a SpaflError as one line."""
    result = CliRunner().invoke(app, [str(argument) for argument in arguments])  # type: ignore[arg-type]
    assert isinstance(result.exception, SpaflError), result.exception
    return str(result.exception)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    draw = np.random.default_rng(0)
    x, y = draw.integers(0, 256, (40, 8, 8), np.uint8), np.arange(40) % 3
    np.savez(tmp_path / "data.npz", x=x, y=y)
    return tmp_path / "data.npz"


@pytest.fixture
def state(tmp_path: Path) -> Path:
    """A device's state file: its tensors, half of its filters active, and the thresholds it has caught up to."""
    torch.manual_seed(1)
    model = sparsify(Small())
    tensors = {name: value.numpy() for name, value in model.state_dict().items()}
    layout = layout_of(model)
    thresholds = algorithm.thresholds_at(layout, tensors, 0.5, np.random.default_rng(1))
    safetensors.numpy.save_file(
        {**tensors, **layout.split(thresholds), "base": thresholds}, tmp_path / "state-3.safetensors"
    )
    return tmp_path / "state-3.safetensors"


@pytest.fixture
def bundle(tmp_path: Path) -> Bundle:
    torch.manual_seed(2)
    model = sparsify(Small())
    layout = layout_of(model)
    graphs = Graphs(model, layout, model.shape)
    made = Exported(model, layout, graphs)
    return bundle_of(made, tmp_path / "bundle", ())


def test_a_devices_state_becomes_its_program(data: Path, state: Path, tmp_path: Path) -> None:
    out = tmp_path / "compact.pte"
    arguments = [f"{MODULE}:small", "--data", data, "--pte", out, "--mask-from", state, "--json"]
    result = CliRunner().invoke(export_app, [str(argument) for argument in arguments], catch_exceptions=False)
    assert result.exit_code == 0, result.output
    proof = json.loads(result.stdout)
    assert (proof["program"], proof["proof"]) == (str(out), str(tmp_path / "compact.proof.json"))
    assert [(layer["layer"], layer["kept"]) for layer in proof["layers"]] == [
        ("conv", 3),
        ("fc", 4),
        ("head", 3),
    ]
    assert proof["equal"] is True
    assert not (tmp_path / "bundle.zip").exists()
    assert not Path("bundle.zip").exists()
    model = sparsify(Small()).eval()
    tensors = {name: value for name, value in safetensors.numpy.load_file(state).items() if name != "base"}
    model.load_state_dict({name: torch.from_numpy(value) for name, value in tensors.items()})
    x = np.random.default_rng(5).normal(size=(4, 1, 8, 8)).astype(np.float32)
    with torch.no_grad():
        expected = model(torch.from_numpy(x)).numpy()
    np.testing.assert_allclose(predict(out, x), expected, rtol=0, atol=RELATIVE * np.abs(expected).max())


def test_what_a_program_cannot_be_made_of(
    data: Path, state: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    out = tmp_path / "compact.pte"
    (tmp_path / "noise.safetensors").write_bytes(b"noise")
    pte, source = ("--pte", out), ("--data", data, "--mask-from", state)
    said = {
        "--pte and --mask-from go together": [("--pte", out), ("--mask-from", state)],
        "on real examples: give --data": [(*pte, "--mask-from", state, "--shape", "1,8,8")],
        "expected a device's state": [(*pte, "--data", data, "--mask-from", tmp_path / "nothing")],
        "is not a safetensors file": [(*pte, "--data", data, "--mask-from", tmp_path / "noise.safetensors")],
        "no model 'nonsense'": [("nonsense", *pte, *source)],
        "state tensors missing or unknown": [(f"{MODULE}:other", *pte, *source)],
    }
    for words, calls in said.items():
        for arguments in calls:
            named = arguments if not str(arguments[0]).startswith("--") else (f"{MODULE}:small", *arguments)
            assert words in told(export_app, *named), words
    monkeypatch.setattr(compact_program, "version", lambda name: "1.4.0")
    assert "programs need ExecuTorch 1.5.1, found 1.4.0: pip install --no-deps" in told(
        export_app, f"{MODULE}:small", *pte, *source
    )
    assert not out.exists()


def test_the_model_is_made_again_from_what_the_bundle_says(bundle: Bundle) -> None:
    model = bundle_model(bundle, f"{MODULE}:small")
    assert layout_of(model).id == bundle.manifest.layout.id
    with pytest.raises(SettingsError, match="does not say what it was exported from: give --model"):
        bundle_model(bundle)
    with pytest.raises(SettingsError, match=r"other is not what bundle test was exported from: tensors"):
        bundle_model(bundle, f"{MODULE}:other")
    with pytest.raises(SettingsError, match=r"tensors \['head.weight', 'head.bias'\] differ"):
        bundle_model(bundle, f"{MODULE}:wider")
    options = {"model": f"{MODULE}:small", "gate": True, "mask_head": False, "scale": "unit"}
    said = Bundle(bundle.path, replace(bundle.manifest, options=options))
    assert layout_of(bundle_model(said)).id == bundle.manifest.layout.id
    masked = Bundle(bundle.path, replace(bundle.manifest, options={**options, "mask_head": True}))
    with pytest.raises(SettingsError, match="its layout is"):
        bundle_model(masked)


def test_units_of_a_layer_are_those_of_the_bundles_initial_weights(bundle: Bundle) -> None:
    plain = Small()
    initial = {name: torch.from_numpy(value) for name, value in bundle.initial_state().items()}
    plain.load_state_dict(initial, strict=False)
    layout = layout_of(sparsify(plain, scale="layer"))
    manifest = replace(bundle.manifest, layout=layout, options={"scale": "layer"})
    assert layout_of(bundle_model(Bundle(bundle.path, manifest), f"{MODULE}:small")).id == layout.id


def test_what_the_service_does_not_start_with(
    bundle: Bundle, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.delenv("SPAFL_PROGRAM_TOKEN", raising=False)
    (tmp_path / "empty").write_text("\n")
    model = ("--model", f"{MODULE}:small")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        said = {
            "listening on 0.0.0.0 without a token would let anybody ask": ("--host", "0.0.0.0"),
            "without a token": ("--host", "programs.example"),
            "cannot read the token": ("--token-file", tmp_path / "nothing"),
            "holds no token": ("--token-file", tmp_path / "empty"),
            "cannot use certificate": ("--tls-cert", tmp_path / "empty"),
            f"cannot listen on 127.0.0.1 port {taken.getsockname()[1]}": ("--port", taken.getsockname()[1]),
        }
        for words, arguments in said.items():
            assert words in told(programs_app, bundle.path, *model, *arguments), words
    assert "no bundle at" in told(programs_app, tmp_path / "none", *model)
    assert "give --model" in told(programs_app, bundle.path)
    assert program_command._is_loopback("::1")
    assert not program_command._is_loopback("::")
