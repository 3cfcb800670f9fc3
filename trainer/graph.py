"""A model as a graph of its module calls."""

import torch
from torch import fx, nn

from spafl.errors import SettingsError
from trainer.masked import Masked
from trainer.norm import GatedBatchNorm


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
