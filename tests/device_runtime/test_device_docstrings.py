import importlib
import inspect
import pkgutil

import pytest

import device_runtime
from tests.spafl.test_docstrings import functions

MODULES = sorted(module.name for module in pkgutil.walk_packages(device_runtime.__path__, "device_runtime."))
COMMANDS = {
    "device_runtime.command": {"enrol", "run", "train", "status", "predict"},
    "device_runtime.compact_command": {"compact"},
    "device_runtime.engine_command": {"engines", "build_executorch", "install_ort_training"},
}
"""Their docstrings are help texts."""


@pytest.mark.parametrize("module", MODULES)
def test_the_first_line_says_what_is_returned(module: str) -> None:
    assert importlib.import_module(module).__doc__
    for name, function in functions(module):
        first = (inspect.getdoc(function) or "").partition("\n")[0]
        spoken = name in COMMANDS.get(module, ())
        assert spoken or first.startswith(("Returns ", "Yields ")), f"{module}.{name}: {first!r}"
