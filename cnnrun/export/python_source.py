"""Modules as Python source: how each is constructed, read back from its attributes, and the classes that needs.

Every module, torch's and ours, keeps its constructor's arguments under their own names; the tests hold them to it.
"""

from __future__ import annotations

import ast
import inspect
import json
import re
import sys
import textwrap
import types
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from keyword import iskeyword
from typing import Any

from torch import Tensor, nn

WIDTH = 120
_PAIRS = {"kernel_size", "stride", "padding", "dilation", "output_size", "output_padding"}
_LEFT_OUT = {"self", "device", "dtype"}
_WORTH_A_FUNCTION = 3  # lines


@dataclass(frozen=True)
class Call:
    """`name(first, key=value)`, or a list or mapping when `name` says so by its brackets."""

    name: str
    arguments: tuple[tuple[str, Any], ...]
    brackets: str = "()"

    def text(self, indent: int = 0, before: int = 0) -> str:
        """Formatted as ruff does: on one line where that fits, else an argument a line; `before` is taken already."""
        parts = [f"{key}{_written(value)}" for key, value in self.arguments]
        line = f"{self.name}{self.brackets[0]}{', '.join(parts)}{self.brackets[1]}"
        if indent + before + len(line) < WIDTH and "\n" not in line:
            return line
        inner = " " * (indent + 4)
        lines = [f"{inner}{key}{_written(value, indent + 4, len(key))}," for key, value in self.arguments]
        return "\n".join([f"{self.name}{self.brackets[0]}", *lines, " " * indent + self.brackets[1]])


def _written(value: Any, indent: int | None = None, before: int = 0) -> str:
    if not isinstance(value, Call):
        return str(value)
    if indent is not None:
        return value.text(indent, before)
    parts = ", ".join(f"{key}{_written(each)}" for key, each in value.arguments)
    return f"{value.name}{value.brackets[0]}{parts}{value.brackets[1]}"


def constructor_call(module: nn.Module) -> Call:
    """The call that makes a module like this one, its parts included."""
    name = type(module).__name__
    name = f"nn.{name}" if type(module).__module__.startswith("torch.") else name
    if isinstance(module, nn.Sequential):
        return _sequence(name, dict(module.named_children()))
    arguments = []
    for parameter in inspect.signature(type(module).__init__).parameters.values():
        if parameter.name in _LEFT_OUT or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        required = parameter.default is parameter.empty
        if not required and not hasattr(module, parameter.name):
            continue
        value = _plain(module, parameter.name)
        if required or value != parameter.default:
            arguments.append(("" if required else f"{parameter.name}=", _literal(value)))
    return Call(name, tuple(arguments))


def _plain(module: nn.Module, name: str) -> Any:
    """An attribute as its constructor took it: whether there is a bias, one number for an equal pair."""
    value = getattr(module, name)
    if name == "bias":
        return value is not None and value is not False
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    torchs_own = type(module).__module__.startswith("torch.")
    if torchs_own and name in _PAIRS and isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value


def _literal(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return constructor_call(value)
    if isinstance(value, list):
        return Call("", tuple(("", _literal(each)) for each in value), "[]")
    if isinstance(value, dict):
        return Call("", tuple((f"{_literal(key)}: ", _literal(each)) for key, each in value.items()), "{}")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _sequence(name: str, children: dict[str, nn.Module]) -> Call:
    """`chain(conv=..., norm=...)`, which the generated file defines, or the long way where that cannot be said."""
    words = all(child.isidentifier() and not iskeyword(child) and child != "__debug__" for child in children)
    if name == "nn.Sequential" and words:
        return Call("chain", tuple((f"{child}=", constructor_call(module)) for child, module in children.items()))
    return Call(name, (("", Call("OrderedDict", (("", _literal(children)),))),))


# --- what occurs again becomes a function -----------------------------------------------------------------------------


def extract_repeats(call: Call) -> tuple[Call, dict[str, Call]]:
    """The call with every larger part that occurs again as a function, and those functions, inner ones first."""
    counts: dict[Call, int] = {}
    _count(call, counts)
    again = {part for part, count in counts.items() if count > 1 and part.text().count("\n") >= _WORTH_A_FUNCTION}
    functions: dict[Call, str] = {}

    def replaced(value: Any) -> Any:
        if not isinstance(value, Call):
            return value
        if value in functions:
            return Call(functions[value], ())
        made = Call(value.name, tuple((key, replaced(each)) for key, each in value.arguments), value.brackets)
        if value not in again:
            return made
        functions[value] = f"part{len(functions) + 1}"
        bodies[functions[value]] = made
        return Call(functions[value], ())

    bodies: dict[str, Call] = {}
    return replaced(call), bodies


def _count(call: Call, counts: dict[Call, int]) -> None:
    counts[call] = counts.get(call, 0) + 1
    if counts[call] == 1 and call.brackets == "()":
        for _, value in call.arguments:
            for inner in _calls(value):
                _count(inner, counts)


def _calls(value: Any) -> Iterator[Call]:
    """The module calls directly inside a value, through lists and mappings."""
    if isinstance(value, Call) and value.brackets == "()" and value.name != "OrderedDict":
        yield value
    elif isinstance(value, Call):
        for _, each in value.arguments:
            yield from _calls(each)


def extract_layers(network: Call) -> tuple[Call, dict[str, Call]]:
    """The call of a Network with each larger top-level layer as a function of its name, and those functions."""
    functions: dict[str, Call] = {}

    def lift(key: str, value: Any) -> tuple[str, Any]:
        if not isinstance(value, Call) or not value.arguments or value.text().count("\n") < _WORTH_A_FUNCTION:
            return key, value
        name = "layer_" + re.sub(r"\W", "", key)
        functions[name] = value
        return key, Call(name, ())

    def inside(call: Call) -> Call:
        """Down to the list of layers: through `LinkedChain({...}, ...)` and `nn.Sequential(OrderedDict({...}))`."""
        if call.name not in ("LinkedChain", "nn.Sequential", "OrderedDict"):
            return Call(call.name, tuple(lift(*each) for each in call.arguments), call.brackets)
        (first, value), *rest = call.arguments
        return Call(call.name, ((first, inside(value)), *rest), call.brackets)

    normalize, (key, layers), head = network.arguments
    made = inside(layers)
    return Call(network.name, (normalize, (key, made), head)), functions


# --- the source of our own classes ------------------------------------------------------------------------------------


@dataclass
class SourceCollector:
    """Definitions that generated code needs, in order, and the imports that those need."""

    imports: dict[str, set[str]] = field(default_factory=dict)  # module -> names; "" for the module itself
    definitions: dict[str, str] = field(default_factory=dict)

    def add(self, thing: Callable[..., Any]) -> None:
        """A class or function of ours, with whatever its source names."""
        if thing.__name__ in self.definitions:
            return
        text = textwrap.dedent(inspect.getsource(thing))
        self.definitions[thing.__name__] = ""  # holds the place while what it names is added
        self.add_dependencies(text, sys.modules[thing.__module__])
        del self.definitions[thing.__name__]
        self.definitions[thing.__name__] = text.rstrip()

    def add_dependencies(self, text: str, module: types.ModuleType) -> None:
        """Everything that a piece of `module` names, so that the piece can stand elsewhere."""
        imported = _imports(module)
        for name in dict.fromkeys(node.id for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Name)):
            value = getattr(module, name, None)
            if name in imported and not imported[name][0].startswith("cnnrun"):
                self.imports.setdefault(imported[name][0], set()).add(imported[name][1])
            elif inspect.isclass(value) or inspect.isfunction(value):
                if value.__module__.startswith("cnnrun"):
                    self.add(value)
            elif isinstance(value, int | float | str) and name in vars(module):
                self.definitions.setdefault(name, f"{name} = {value!r}")
            elif isinstance(value, types.GenericAlias):
                self.definitions.setdefault(name, f"{name} = {_alias(value)}")

    def import_lines(self) -> list[str]:
        """The import statements, the standard library's first."""
        lines = []
        for name, names in self.imports.items():
            lines += [f"import {name}{each}" for each in names if each.startswith(" as ") or not each]
            plain = sorted(each for each in names if each and not each.startswith(" as "))
            lines += [f"from {name} import {', '.join(plain)}"] if plain else []
        lines.sort(key=lambda line: (line.startswith("from"), line))
        torchs = [line for line in lines if " torch" in line]
        return [*(line for line in lines if line not in torchs), "", *torchs]


def _imports(module: types.ModuleType) -> dict[str, tuple[str, str]]:
    """What each name that a module imports is: (module, name), or (module, "" or " as name") for a module itself."""
    found: dict[str, tuple[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            found |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {a.asname or a.name: (a.name, f" as {a.asname}" if a.asname else "") for a in node.names}
    return found


def _alias(value: Any) -> str:
    return repr(value).replace("torch.Tensor", "Tensor")
