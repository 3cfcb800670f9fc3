"""Every public thing of the contract says in its first line what it returns, or what it is."""

import importlib
import inspect
import pkgutil
from collections.abc import Iterator

import pytest

import spafl

MODULES = sorted(module.name for module in pkgutil.iter_modules(spafl.__path__, "spafl."))
STARTS = ("Returns ", "Runs ", "Writes ")


def functions(module_name: str) -> Iterator[tuple[str, object]]:
    module = importlib.import_module(module_name)
    for name, thing in vars(module).items():
        if name.startswith("_") or getattr(thing, "__module__", None) != module_name:
            continue
        if inspect.isfunction(thing):
            yield name, thing
        elif inspect.isclass(thing):
            assert inspect.getdoc(thing), f"{module_name}.{name} has no docstring"
            for member, value in vars(thing).items():
                value = (
                    getattr(value, "fget", None)
                    or getattr(value, "func", None)
                    or getattr(value, "__func__", value)
                )
                if not member.startswith("_") and inspect.isfunction(value):
                    yield f"{name}.{member}", value


@pytest.mark.parametrize("module", MODULES)
def test_the_first_line_says_what_is_returned(module: str) -> None:
    command_line = {"root"}  # its docstring is the help text
    for name, function in functions(module):
        first = (inspect.getdoc(function) or "").partition("\n")[0]
        assert name in command_line or first.startswith(STARTS), f"{module}.{name}: {first!r}"
