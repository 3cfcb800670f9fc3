"""The models ONNX Runtime Training runs, made of graphs: training model, eval model, optimizer model.

Its optimizer takes a learning rate, parameters, gradients and moments, in an order its hash map chooses, and nothing
else: no momentum, no clip, no learning rate of a parameter's own. So all of that is done by the training model, with
the hyperparameters as inputs. Where gradients are expected it leaves the *change* of every parameter, and the
optimizer, with learning rate 1, takes it off. Momenta and norm statistics are parameters like others.
"""

import copy
from collections.abc import Sequence
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import Tensor, nn

from export.lowering import IR_VERSION, OPSET, lower
from export.ort_training_forward import drop_stops, name_nodes, value
from export.training import distinct_sizes
from spafl.manifest import StateTensor
from spafl.step import MOMENTUM, NEXT, SCALARS
from trainer.local import CLIP_EPSILON

MICROSOFT = "com.microsoft"
_GRADIENT = "_grad"
"""What the gradient builder appends to a parameter's name."""
_BUFFER, _WRITTEN = "_grad.accumulation.buffer", "_grad.accumulation.out"
"""What the runtime expects behind a parameter's name for its gradient's buffer, and for whether it was written."""


def parameter_names(tensors: Sequence[StateTensor]) -> list[str]:
    """Returns the checkpoint's parameters in the training model's order: the state, then momentum.<tensor>."""
    return [tensor.name for tensor in tensors] + [
        MOMENTUM + tensor.name for tensor in tensors if tensor.trained
    ]


def training_model(gradient: onnx.ModelProto, tensors: tuple[StateTensor, ...]) -> onnx.ModelProto:
    """Returns the model of one step, from a `forward_model` with its gradients.

    Inputs    x, y, the scalars of `spafl.step.SCALARS`, the parameters, a buffer for each one's change, lazy_reset_grad
    Outputs   loss (): mean task loss before the step, correct () int64; whether each buffer was written
    """
    graph = gradient.graph
    drop_stops(graph)
    found = {declared.name: declared for declared in (*graph.input, *graph.output)}
    update = _Update(tensors, [tensor.name for tensor in tensors if tensor.name + _GRADIENT in found])
    shapes = {tensor.name: tensor.shape for tensor in tensors}
    shapes |= {MOMENTUM + tensor.name: tensor.shape for tensor in tensors if tensor.trained}
    names = parameter_names(tensors)
    inputs = [found["x"], found["y"], *(value(name, []) for name in SCALARS)]
    inputs += [value(name, shapes[name]) for name in names]
    inputs += [value(name + _BUFFER, shapes[name]) for name in names]
    inputs.append(value("lazy_reset_grad", [1], TensorProto.BOOL))
    outputs = [found["loss"], found["correct"]]
    outputs += [value(name + _WRITTEN, [1], TensorProto.BOOL) for name in names]
    step = helper.make_graph(
        [*graph.node, *update.nodes],
        "training",
        inputs,
        outputs,
        [*graph.initializer, *update.constants],
        value_info=graph.value_info,  # the runtime crashes on gradients whose shapes it is not told
    )
    return _model(step)


class _Update:
    """The nodes from gradients to changes: clip, momentum, learning rates, as in `trainer.local.sgd_step`.

    differentiated  names of the tensors that have a gradient; others keep only their momentum
    """

    def __init__(self, tensors: tuple[StateTensor, ...], differentiated: list[str]) -> None:
        self.nodes: list[onnx.NodeProto] = []
        self.constants = [
            numpy_helper.from_array(np.array(CLIP_EPSILON, np.float32), "clip.epsilon"),
            numpy_helper.from_array(np.array(1, np.float32), "clip.most"),
        ]
        squares = [
            self._add("ReduceSumSquare", [name + _GRADIENT], f"square.{name}", keepdims=0)
            for name in differentiated
        ]
        norm = self._add("Sqrt", [self._add("Sum", squares, "norm.square")], "norm")
        above = self._add("Add", [norm, "clip.epsilon"], "norm.above")
        factor = self._add("Min", [self._add("Div", ["clip", above], "clip.ratio"), "clip.most"], "factor")
        for tensor in tensors:
            name, momentum = tensor.name, MOMENTUM + tensor.name
            if not tensor.trained:
                self._change(name, self._add("Sub", [name, NEXT + name], f"change.{name}"))
                continue
            moved = self._add("Mul", ["momentum", momentum], f"kept.{momentum}")
            if name in differentiated:
                clipped = self._add("Mul", [factor, name + _GRADIENT], f"clipped.{name}")
                moved = self._add("Add", [moved, clipped], NEXT + momentum)
            rate = "threshold_lr" if tensor.role == "threshold" else "lr"
            self._change(name, self._add("Mul", [rate, moved], f"change.{name}"))
            self._change(momentum, self._add("Sub", [momentum, moved], f"change.{momentum}"))

    def _change(self, name: str, change: str) -> None:
        inputs = [name + _BUFFER, change, "lazy_reset_grad"]
        self._add("InPlaceAccumulatorV2", inputs, name + _WRITTEN, domain=MICROSOFT)

    def _add(self, operator: str, inputs: list[str], out: str, **attributes: Any) -> str:
        self.nodes.append(helper.make_node(operator, inputs, [out], **attributes))
        return out


def eval_model(model: nn.Module, tensors: tuple[StateTensor, ...], shape: tuple[int, ...]) -> onnx.ModelProto:
    """Returns the masked model as it infers: x (batch, *shape) and the parameters -> logits (batch, labels).

    The runtime gives it the training model's parameters one after the other, so it must take them all, momenta too.

    Raises:
        LoweringError: an operation that cannot be expressed.
    """
    whole = copy.deepcopy(model).eval()
    batch = next(distinct_sizes(whole.state_dict().values(), shape))
    inputs = {"x": torch.zeros(batch, *shape)}
    inputs |= {tensor.name: torch.zeros(tensor.shape) for tensor in tensors}

    def forward(x: Tensor, *state: Tensor) -> tuple[Tensor, ...]:
        named = {tensor.name: of for tensor, of in zip(tensors, state, strict=True)}
        logits: Tensor = torch.func.functional_call(whole, named, (x,))
        return (logits.detach(),)

    graph = lower(forward, inputs, ["logits"], {"x": {0: "batch"}}).graph
    graph.input.extend(value(MOMENTUM + tensor.name, tensor.shape) for tensor in tensors if tensor.trained)
    return _model(graph)


def optimizer_model() -> onnx.ModelProto:
    """Returns the model that takes the changes off the parameters, in place: the same for every bundle.

    Inputs   learning_rate (1,), step (1,) int64, the sequences params, gradients and first_order_moments: only the
             runtime asks for those, nothing reads them
    """
    sequences = ["params", "gradients", "first_order_moments"]
    subtract = helper.make_node(
        "SGDOptimizerV2",
        ["learning_rate", "params", "gradients"],
        ["updated", "params.updated"],
        domain=MICROSOFT,
    )
    inputs = [value("learning_rate", [1]), value("step", [1], TensorProto.INT64)]
    inputs += [helper.make_tensor_sequence_value_info(name, TensorProto.FLOAT, None) for name in sequences]
    after = helper.make_tensor_sequence_value_info("params.updated", TensorProto.FLOAT, None)
    outputs = [value("updated", [], TensorProto.BOOL)]
    return _model(helper.make_graph([subtract], "optimizer", inputs, outputs, value_info=[after]))


def _model(graph: onnx.GraphProto) -> onnx.ModelProto:
    imports = [helper.make_opsetid("", OPSET), helper.make_opsetid(MICROSOFT, 1)]
    model = helper.make_model(graph, opset_imports=imports, ir_version=IR_VERSION, producer_name="spafl")
    name_nodes(model.graph)
    # not for onnx.checker: the gradient builder uses operators that only its own runtime knows
    return model
