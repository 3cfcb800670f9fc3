"""A compact model in two halves: fold and model together are the masked model, and each holds only what is its own."""

import copy

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from export.compact import CompactModel
from export.decompositions import LoweringError
from export.folding import Folding
from export.training import state_tensors
from spafl import algorithm
from spafl.algorithm import Mask, decided, mask_of
from spafl.layout import Floats
from spafl.manifest import StateTensor
from tests.export.models import MODELS, Plain
from trainer.sparsify import layout_of, sparsify

RELATIVE = 1e-5
"""Of the largest logit: sums of some hundred float32 terms in another order."""


class Alone(nn.Module):
    """Norms nobody takes in: before a layer, and behind one that is read elsewhere too; and a constant of its own."""

    shape = (2, 6, 6)

    def __init__(self) -> None:
        super().__init__()
        self.before = nn.BatchNorm2d(2)
        self.conv = nn.Conv2d(2, 6, 3, padding=1)
        self.after = nn.BatchNorm2d(6, affine=False)
        self.fc = nn.Linear(6 * 36, 8)
        self.head = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        y = self.conv(self.before(x))
        y = F.relu(self.after(y) + y) + torch.arange(6.0).view(1, 6, 1, 1)
        return self.head(F.relu(self.fc(y.view(y.size(0), -1))))


def masked(model: nn.Module, gate: bool, density: float) -> tuple[nn.Module, tuple[StateTensor, ...], Mask]:
    """Returns the sparsified model at a density, norms moved off their start, its state tensors and its mask."""
    torch.manual_seed(2)
    for module in model.modules():
        if hasattr(module, "reset_parameters"):
            module.reset_parameters()
    sparse = sparsify(model, gate=gate)
    draw = np.random.default_rng(2)
    layout = layout_of(sparse)
    with torch.no_grad():
        for name, buffer in sparse.named_buffers():
            if name.endswith("running_mean"):
                buffer.add_(torch.from_numpy(draw.normal(0, 0.4, buffer.shape).astype(np.float32)))
        state = {name: value.numpy() for name, value in sparse.state_dict().items()}
        thresholds = layout.split(algorithm.thresholds_at(layout, state, density, draw))
        for name, value in thresholds.items():
            dict(sparse.named_parameters())[name].copy_(torch.from_numpy(value))
    tensors = state_tensors(sparse, CompactModel(sparse, model.shape, dropped=lambda group: False))
    return sparse, tensors, mask_of(layout, state_of(sparse))


def state_of(model: nn.Module) -> dict[str, Floats]:
    return {name: value.numpy().copy() for name, value in model.state_dict().items()}


@pytest.mark.parametrize(
    ("name", "gate"), [("plain", True), ("normed", False), ("residual", True), ("alone", True)]
)
def test_the_halves_together_are_the_masked_model(name: str, gate: bool) -> None:
    source = {**MODELS, "alone": Alone}[name]()
    model, tensors, mask = masked(source, gate, 0.5)
    folding = Folding(model, tensors, source.shape, mask)
    weights = folding.folded(state_of(model))
    assert tuple(tuple(weight.shape) for weight in weights) == folding.shapes
    half = folding.model(weights)
    for batch in (1, 5, 40):
        x = torch.randn(batch, *source.shape)
        with torch.no_grad():
            expected, got = copy.deepcopy(model).eval()(x), half(x)
        torch.testing.assert_close(got, expected, rtol=0, atol=RELATIVE * float(expected.abs().max()))


def test_weights_are_as_small_as_the_mask_says() -> None:
    model, tensors, mask = masked(Plain(), True, 0.5)
    folding = Folding(model, tensors, Plain.shape, mask)
    assert folding.shapes == ((3, 1, 3, 3), (4, 3, 3, 3), (7, 4 * 4), (5, 7))


def test_the_mask_given_counts_and_no_threshold() -> None:
    """A score on its edge is for nobody to decide again."""
    model, tensors, mask = masked(Plain(), True, 0.5)
    folding = Folding(model, tensors, Plain.shape, mask)
    assert folding.inputs == ("conv1.weight", "conv2.weight", "fc1.weight", "fc2.weight")
    other = {name: rows[::-1].copy() for name, rows in mask.items()}
    folding = Folding(model, tensors, Plain.shape, other)
    x = torch.randn(3, *Plain.shape)
    state = state_of(model)
    model.load_state_dict(
        {name: torch.from_numpy(value) for name, value in decided(layout_of(model), state, other).items()}
    )
    with torch.no_grad():
        expected, got = model.eval()(x), folding.model(folding.folded(state))(x)
    torch.testing.assert_close(got, expected, rtol=0, atol=RELATIVE * float(expected.abs().max()))


def test_nothing_of_the_models_own_weights_is_in_the_halves() -> None:
    """What a half holds besides the weights it is given: indices and masks, and constants of the model's code."""
    model, tensors, mask = masked(Alone(), False, 0.5)
    folding = Folding(model, tensors, Alone.shape, mask)
    for value in folding.fold.parameters():
        if value.dtype == torch.float32:
            assert set(value.unique().tolist()) <= {0.0, 1.0}
    given = [torch.full(shape, 7.5) for shape in folding.shapes]
    for value in folding.model(given).parameters():
        assert set(value.unique().tolist()) in ({7.5}, set(range(6)))


def test_the_batch_is_left_open_where_it_is_only_passed_on() -> None:
    """A size computed at run time keeps XNNPACK from the reshape, and cuts the model in two."""
    for source in (Plain(), Alone()):
        model, tensors, mask = masked(source, True, 0.5)
        folding = Folding(model, tensors, source.shape, mask)
        half = folding.model([torch.zeros(shape) for shape in folding.shapes])
        reshapes = [node for node in half.graph.nodes if node.target is torch.ops.aten.reshape.default]
        assert [node.args[1][0] for node in reshapes] == [-1]
        half.graph.eliminate_dead_code()
        assert not [node for node in half.graph.nodes if "sym_size" in str(node.target)]


def test_a_model_that_cannot_be_traced_is_told_of() -> None:
    class Fixed(Plain):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x).view(16, -1)

    plain, tensors, mask = masked(Plain(), True, 0.5)
    fixed = sparsify(Fixed())
    fixed.load_state_dict(plain.state_dict())
    with pytest.raises(LoweringError, match=r"cannot be run on two examples of shape \(1, 15, 15\)"):
        Folding(fixed, tensors, Plain.shape, mask)
