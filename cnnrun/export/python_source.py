"""Python source of modules: their constructor calls, read from their attributes, and the classes that these need.

Every module of torch and cnnrun stores its constructor's arguments in attributes of the same names; tests check this.
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
_PAIR_ARGUMENTS = {"kernel_size", "stride", "padding", "dilation", "output_size", "output_padding"}
_OMITTED_ARGUMENTS = {"self", "device", "dtype"}
_MIN_FUNCTION_LINES = 3  # shorter calls are not moved to a function of their own


@dataclass(frozen=True)
class Expression:
    """An expression of the generated source: a call `name(first, key=value)`, or a list or mapping; see `brackets`."""

    name: str
    arguments: tuple[tuple[str, Any], ...]
    brackets: str = "()"

    def text(self, indent: int = 0, prefix_length: int = 0) -> str:
        """Format the call as ruff does: on one line if it fits, else with one argument per line.

        `prefix_length` characters stand before it on its first line, after the indentation.
        """
        line = _one_line(self)
        if indent + prefix_length + len(line) < WIDTH and "\n" not in line:
            return line
        padding = " " * (indent + 4)
        lines = [f"{padding}{key}{_value_text(value, indent + 4, len(key))}," for key, value in self.arguments]
        return "\n".join([f"{self.name}{self.brackets[0]}", *lines, " " * indent + self.brackets[1]])


def _value_text(value: Any, indent: int, prefix_length: int) -> str:
    return value.text(indent, prefix_length) if isinstance(value, Expression) else str(value)


def _one_line(value: Any) -> str:
    if not isinstance(value, Expression):
        return str(value)
    arguments = ", ".join(f"{key}{_one_line(argument)}" for key, argument in value.arguments)
    return f"{value.name}{value.brackets[0]}{arguments}{value.brackets[1]}"


def constructor_call(module: nn.Module) -> Expression:
    """Return the call that constructs a module like this one, including its submodules."""
    name = type(module).__name__
    name = f"nn.{name}" if type(module).__module__.startswith("torch.") else name
    if isinstance(module, nn.Sequential):
        return _sequence(name, dict(module.named_children()))
    arguments = []
    for parameter in inspect.signature(type(module).__init__).parameters.values():
        if parameter.name in _OMITTED_ARGUMENTS or parameter.kind in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
            continue
        is_required = parameter.default is parameter.empty
        if not is_required and not hasattr(module, parameter.name):
            continue
        value = _constructor_argument(module, parameter.name)
        if is_required or value != parameter.default:
            arguments.append(("" if is_required else f"{parameter.name}=", _literal(value)))
    return Expression(name, tuple(arguments))


def _constructor_argument(module: nn.Module, name: str) -> Any:
    """An attribute in the form that the constructor takes: a bool for the bias, one number for an equal pair."""
    value = getattr(module, name)
    if name == "bias":
        return value is not None and value is not False
    if isinstance(value, Tensor):
        return value.flatten().tolist()
    is_torch_pair = type(module).__module__.startswith("torch.") and name in _PAIR_ARGUMENTS
    if is_torch_pair and isinstance(value, tuple) and len(set(value)) == 1:
        return value[0]
    return value


def _literal(value: Any) -> Any:
    if isinstance(value, nn.Module):
        return constructor_call(value)
    if isinstance(value, list):
        return Expression("", tuple(("", _literal(item)) for item in value), "[]")
    if isinstance(value, dict):
        return Expression("", tuple((f"{_literal(key)}: ", _literal(item)) for key, item in value.items()), "{}")
    return json.dumps(value, ensure_ascii=False) if isinstance(value, str) else repr(value)


def _sequence(name: str, children: dict[str, nn.Module]) -> Expression:
    """Call for a sequence: `chain(conv=..., norm=...)`, which the generated file defines, or an OrderedDict.

    The latter is for names that cannot be keyword arguments, and for subclasses of nn.Sequential.
    """
    are_keywords = all(child.isidentifier() and not iskeyword(child) and child != "__debug__" for child in children)
    if name == "nn.Sequential" and are_keywords:
        return Expression("chain", tuple((f"{child}=", constructor_call(module)) for child, module in children.items()))
    return Expression(name, (("", Expression("OrderedDict", (("", _literal(children)),))),))


# --- functions for repeated calls and for layers ----------------------------------------------------------------------


def extract_repeats(call: Expression) -> tuple[Expression, dict[str, Expression]]:
    """Replace every long call that occurs again by a function; return the result and the functions, inner first."""
    counts: dict[Expression, int] = {}
    _count_calls(call, counts)
    repeated = {part for part, count in counts.items() if count > 1 and _is_long(part)}
    names: dict[Expression, str] = {}
    functions: dict[str, Expression] = {}

    def replace_repeats(value: Any) -> Any:
        if not isinstance(value, Expression):
            return value
        if value in names:
            return Expression(names[value], ())
        arguments = tuple((key, replace_repeats(argument)) for key, argument in value.arguments)
        body = Expression(value.name, arguments, value.brackets)
        if value not in repeated:
            return body
        names[value] = f"part{len(names) + 1}"
        functions[names[value]] = body
        return Expression(names[value], ())

    return replace_repeats(call), functions


def _is_long(call: Expression) -> bool:
    return call.text().count("\n") >= _MIN_FUNCTION_LINES


def _count_calls(call: Expression, counts: dict[Expression, int]) -> None:
    counts[call] = counts.get(call, 0) + 1
    if counts[call] == 1 and call.brackets == "()":
        for _, value in call.arguments:
            for inner_call in _inner_calls(value):
                _count_calls(inner_call, counts)


def _inner_calls(value: Any) -> Iterator[Expression]:
    """Calls of modules directly inside a value, also in lists and mappings."""
    if isinstance(value, Expression) and value.brackets == "()" and value.name != "OrderedDict":
        yield value
    elif isinstance(value, Expression):
        for _, argument in value.arguments:
            yield from _inner_calls(argument)


def extract_layers(network: Expression) -> tuple[Expression, dict[str, Expression]]:
    """Replace each longer top-level layer of a Network by the call of a function; return the call and the functions."""
    functions: dict[str, Expression] = {}

    def extract_layer(key: str, value: Any) -> tuple[str, Any]:
        if not isinstance(value, Expression) or not value.arguments or not _is_long(value):
            return key, value
        name = "layer_" + re.sub(r"\W", "", key)
        functions[name] = value
        return key, Expression(name, ())

    def replace_layers(call: Expression) -> Expression:
        """Descend to the list of layers, through `LinkedChain({...}, ...)` or `nn.Sequential(OrderedDict({...}))`."""
        if call.name not in ("LinkedChain", "nn.Sequential", "OrderedDict"):
            return Expression(call.name, tuple(extract_layer(*argument) for argument in call.arguments), call.brackets)
        (first_key, value), *rest = call.arguments
        return Expression(call.name, ((first_key, replace_layers(value)), *rest), call.brackets)

    normalize, (key, layers), head, *settings = network.arguments
    return Expression(network.name, (normalize, (key, replace_layers(layers)), head, *settings)), functions


# --- source of cnnrun's classes ---------------------------------------------------------------------------------------


@dataclass
class SourceCollector:
    """Collector of the definitions that generated code needs, in order, and of their imports."""

    imports: dict[str, set[str]] = field(default_factory=dict)  # module -> names; "" for the module itself
    definitions: dict[str, str] = field(default_factory=dict)

    def add(self, definition: Callable[..., Any]) -> None:
        """Add a class or function of cnnrun, after everything that its source uses."""
        name = definition.__name__
        if name in self.definitions:
            return
        text = textwrap.dedent(inspect.getsource(definition))
        self.definitions[name] = ""  # so that it is not added again while its dependencies are
        self.add_dependencies(text, sys.modules[definition.__module__])
        del self.definitions[name]
        self.definitions[name] = text.rstrip()

    def add_dependencies(self, text: str, module: types.ModuleType) -> None:
        """Add every definition and import that a piece of a module's source uses."""
        imported = _imported_names(module)
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
                self.definitions.setdefault(name, f"{name} = {_alias_text(value)}")

    def import_lines(self) -> list[str]:
        """Import statements, those of the standard library first."""
        lines = []
        for module, names in self.imports.items():
            lines += [f"import {module}{name}" for name in names if name.startswith(" as ") or not name]
            members = sorted(name for name in names if name and not name.startswith(" as "))
            lines += [f"from {module} import {', '.join(members)}"] if members else []
        lines.sort(key=lambda line: (line.startswith("from"), line))
        torch_lines = [line for line in lines if " torch" in line]
        return [*(line for line in lines if line not in torch_lines), "", *torch_lines]


def _imported_names(module: types.ModuleType) -> dict[str, tuple[str, str]]:
    """Origin of each name that a module imports: (module, name), or (module, "" or " as name") for a whole module."""
    origins: dict[str, tuple[str, str]] = {}
    for node in ast.parse(inspect.getsource(module)).body:
        if isinstance(node, ast.ImportFrom) and node.module:
            origins |= {alias.asname or alias.name: (node.module, alias.name) for alias in node.names}
        elif isinstance(node, ast.Import):
            origins |= {a.asname or a.name: (a.name, f" as {a.asname}" if a.asname else "") for a in node.names}
    return origins


def _alias_text(value: Any) -> str:
    return repr(value).replace("torch.Tensor", "Tensor")
