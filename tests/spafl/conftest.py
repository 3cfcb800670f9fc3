"""A small whole bundle: one masked convolution, one masked linear layer, a norm statistic, no network and no torch."""

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import safetensors.numpy

from spafl.bundle import Bundle, write_bundle
from spafl.layout import Layer, ThresholdLayout
from spafl.manifest import InputSpec, Manifest, StateTensor, TrainStep

SHAPES = {
    "conv.weight": (4, 1, 3, 3),
    "conv.threshold": (4,),
    "norm.mean": (4,),
    "fc.weight": (3, 36),
    "fc.threshold": (3,),
}
ROLES = {"weight": "weight", "threshold": "threshold", "mean": "statistic"}


@pytest.fixture
def layout() -> ThresholdLayout:
    return ThresholdLayout.of(
        [
            Layer("conv", "conv", out=4, n_in=9, n_scale=9, offset=0),
            Layer("fc", "linear", out=3, n_in=36, n_scale=36, offset=0, scale=0.5),
        ]
    )


@pytest.fixture
def manifest(layout: ThresholdLayout) -> Manifest:
    state = tuple(
        StateTensor.from_json(
            {"name": name, "shape": shape, "role": ROLES[name.split(".")[1]], "layer": name.split(".")[0]}
        )
        for name, shape in SHAPES.items()
        if name != "norm.mean"
    )
    return Manifest(
        name="tiny",
        layout=layout,
        state=(*state, StateTensor(name="norm.mean", shape=(4,), role="statistic", layer="conv")),
        input=InputSpec(shape=(1, 8, 8), mean=(0.5,), std=(0.25,)),
        labels=("no", "yes"),
        train_step=TrainStep(form="dense", reason="nothing to train here"),
        compaction=(),
        engines={},
        files={},
        producer={"spafl": "0"},
    )


@pytest.fixture
def state() -> dict[str, np.ndarray]:
    random = np.random.default_rng(7)
    return {name: random.normal(size=shape).astype(np.float32) for name, shape in SHAPES.items()}


@pytest.fixture
def files(state: dict[str, np.ndarray]) -> dict[str, bytes]:
    return {"init.safetensors": safetensors.numpy.save(state), "graphs/infer.onnx": b"graph" * 1000}


@pytest.fixture(params=["bundle", "bundle.zip"])
def place(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """Where a bundle is written: a directory, then a .zip."""
    return tmp_path / request.param


@pytest.fixture
def written(manifest: Manifest, files: dict[str, bytes]) -> Callable[[Path], Bundle]:
    return lambda path: write_bundle(path, manifest, files)
