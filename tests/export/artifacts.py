"""ONNX Runtime Training in tests: whether it is there, and artifacts of a model, made once per process."""

from functools import cache

import pytest
from torch import nn

from export.compact import CompactModel
from export.ort_training_artifacts import ort_training_files
from export.training import state_tensors
from spafl.errors import SettingsError
from spafl.manifest import EngineFiles, StateTensor
from spafl.ort_training import find_python
from trainer.sparsify import layout_of

Artifacts = tuple[dict[str, bytes], EngineFiles]


@cache
def missing() -> str:
    """Why ONNX Runtime Training cannot be used here; empty if it can."""
    try:
        find_python()
    except SettingsError as error:
        return str(error)
    return ""


needs_ort_training = pytest.mark.skipif(bool(missing()), reason=missing() or "it is there")


def tensors_of(model: nn.Module) -> tuple[StateTensor, ...]:
    return state_tensors(model, CompactModel(model, model.shape, lambda group: False))  # type: ignore[arg-type]


def artifacts(model: nn.Module) -> Artifacts:
    return ort_training_files(model, layout_of(model), tensors_of(model), model.shape)  # type: ignore[arg-type]
