"""A model as a graph of its module calls."""

import operator

import torch
from torch import fx, nn

from spafl.errors import SettingsError
from trainer.masked import Masked
from trainer.norm import GatedBatchNorm

_KEEPS_IDS = (
    *("long", "int", "to", "type", "round", "contiguous"),
    *("view", "reshape", "flatten", "squeeze", "unsqueeze", "transpose", "permute"),
    *(operator.getitem, torch.flatten, torch.squeeze, torch.unsqueeze, torch.transpose, torch.permute),
)
"""What an input of token ids may pass on its way to an embedding; its shape is read by getattr, which is not here."""


class _Tracer(fx.Tracer):
    def is_leaf_module(self, m: nn.Module, module_qualified_name: str) -> bool:
        return isinstance(m, Masked | GatedBatchNorm) or super().is_leaf_module(m, module_qualified_name)


def trace(model: nn.Module) -> fx.GraphModule:
    """Returns the model as torch.fx sees it: one node per call of a torch.nn module, masked layer or function.

    Raises:
        SettingsError: the model's Python depends on the values it is given, so it has no one graph.
    """
    try:
        graph = _Tracer().trace(model)
    except (torch.fx.proxy.TraceError, TypeError, RuntimeError) as error:
        raise SettingsError(
            f"{type(model).__name__} cannot be traced: {error}. Its forward must not branch on tensor values or sizes"
        ) from error
    return fx.GraphModule(model, graph)


def calls(graph: fx.Graph) -> dict[str, fx.Node]:
    """Returns the node of each module call by module path.

    Raises:
        SettingsError: a module is called twice; a layer shared by two places has no one set of active filters.
    """
    found: dict[str, fx.Node] = {}
    for node in graph.nodes:
        if node.op == "call_module":
            if str(node.target) in found:
                raise SettingsError(
                    f"module {node.target!r} is called more than once: give each call its own layer"
                )
            found[str(node.target)] = node
    return found


def token_ids(model: nn.Module) -> int | None:
    """Returns how many token ids the model knows, 0 to one less, if it looks its input up; None: it takes numbers."""
    graph, modules = trace(model).graph, dict(model.named_modules())
    known: list[int] = []
    reached = [node for node in graph.nodes if node.op == "placeholder"]
    for node in reached:
        for user in node.users:
            module = modules[str(user.target)] if user.op == "call_module" else None
            if isinstance(module, nn.Embedding):
                known.append(module.num_embeddings)
            elif user.target in _KEEPS_IDS:
                reached.append(user)
    return min(known, default=None)
