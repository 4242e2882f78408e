"""The network as people draw it: layers in words with their shapes, structures with what they hold; and as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cnnrun.contracts.layer import LayerSpec, Shape
from cnnrun.model.builder import BuiltLayer
from cnnrun.model.network import BuiltNetwork
from cnnrun.model.structures import Parallel, Repeat, Residual, Sequential, Structure

_UNSAID = {"name", "from_", "layers", "branches", "shortcut", "times", "block"}
_SAID_ELSEWHERE = {"residual": {"norm"}}  # the shortcut's convolution carries it


@dataclass(frozen=True)
class OutlineEntry:
    """A layer in words: `lanes` are the lists of layers that a structure holds, side by side."""

    kind: str
    title: str
    notes: list[str]
    shape: str
    name: str | None = None
    sources: list[str] = field(default_factory=list)
    lanes: list[list[OutlineEntry]] = field(default_factory=list)


def build_outline(built: BuiltNetwork, task: str) -> list[OutlineEntry]:
    """The network's top-level layers, the input before them and the task's head after them."""
    head = built.rows[-1]
    parts = [OutlineEntry("input", "input", [], _shown(built.image))]
    parts += _list(built.layers, "layers")
    return [*parts, OutlineEntry("head", task, [f"{head.parameters:,} parameters"], _shown(head.out_shape))]


def format_outline(parts: list[OutlineEntry]) -> str:
    """The outline as a tree of lines, shapes in a column of their own."""
    lines = _lines(parts, "")
    width = max(len(left) for left, _ in lines) + 2
    return "\n".join(f"{left:<{width}}{shape}".rstrip() for left, shape in lines)


def _lines(parts: list[OutlineEntry], before: str) -> list[tuple[str, str]]:
    found: list[tuple[str, str]] = []
    for part in parts:
        last = part is parts[-1]
        branch, inside = (before + ("└─ " if last else "├─ "), before + ("   " if last else "│  "))
        name = f"{part.name}: " if part.name else ""
        taken = f"  ← {', '.join(part.sources)}" if part.sources else ""
        found.append((f"{branch}{name}{', '.join([part.title, *part.notes])}{taken}", part.shape))
        if len(part.lanes) == 1:
            found += _lines(part.lanes[0], inside)
        for number, lane in enumerate(part.lanes if len(part.lanes) > 1 else []):
            end = number == len(part.lanes) - 1
            title = ("layers", "shortcut")[number] if part.kind == "residual" else f"branch {number + 1}"
            found.append((f"{inside}{'└─ ' if end else '├─ '}{title}{'' if lane else ': as it is'}", ""))
            found += _lines(lane, inside + ("   " if end else "│  "))
    return found


def _list(nodes: dict[str, BuiltLayer], prefix: str) -> list[OutlineEntry]:
    """The layers directly under a name of the weights, in order."""
    return [_part(nodes, name, node) for name, node in nodes.items() if name.rpartition(".")[0] == prefix]


def _part(nodes: dict[str, BuiltLayer], name: str, node: BuiltLayer) -> OutlineEntry:
    spec, shape = node.spec, _shown(node.out_shape)
    common: dict[str, Any] = {"shape": shape, "name": spec.name, "sources": spec.input_names()}
    if isinstance(spec, Repeat):
        lanes = [_list(nodes, f"{name}.1")]
        return OutlineEntry(
            "repeat", f"{spec.times} times", ["the first shown"] if spec.times > 1 else [], lanes=lanes, **common
        )
    if isinstance(spec, Sequential):
        return OutlineEntry("sequential", spec.block or "sequential", [], lanes=[_list(nodes, name)], **common)
    if isinstance(spec, Parallel):
        lanes = [_list(nodes, f"{name}.branch{number}") for number in range(1, len(spec.branches) + 1)]
        return OutlineEntry("parallel", f"parallel, {spec.merge}", [], lanes=lanes, **common)
    if isinstance(spec, Residual):
        lanes = [_list(nodes, f"{name}.layers"), _shortcut(nodes, name, node)]
        return OutlineEntry("residual", "residual", _notes(spec), lanes=lanes, **common)
    title, *notes = [_title(spec), *_notes(spec)]
    return OutlineEntry(spec.kind, title, notes, **common)


def _shortcut(nodes: dict[str, BuiltLayer], name: str, node: BuiltLayer) -> list[OutlineEntry]:
    """What the shortcut holds: its own layers, the 1x1 convolution that was put there, or nothing."""
    spec = node.spec
    assert isinstance(spec, Residual)
    if isinstance(spec.shortcut, list):
        return _list(nodes, f"{name}.shortcut")
    if spec.shortcut != "conv" and node.in_shapes[0] == node.out_shape:
        return []
    norm = [spec.norm.kind] if spec.norm else []
    return [OutlineEntry("conv", f"conv {node.out_shape[0]}", ["1x1", *norm], _shown(node.out_shape))]


def _title(spec: LayerSpec) -> str:
    main = getattr(spec, spec.main, None) if spec.main not in (None, "from") else None
    return spec.kind if main is None else f"{spec.kind} {_value(main)}"


def _notes(spec: LayerSpec) -> list[str]:
    """The settings that are not the default's, the main one aside; a norm or an activation by its kind alone."""
    found = []
    unsaid = _UNSAID | _SAID_ELSEWHERE.get(spec.kind, set()) | {spec.main}
    for key in [key for key in type(spec).model_fields if key not in unsaid]:
        value = getattr(spec, key)
        if key == "kernel_size":  # the one default that a drawing must say
            found.append("x".join(map(str, value)))
        elif value == type(spec).model_fields[key].default:
            continue
        elif isinstance(value, LayerSpec):
            found.append(value.kind if not isinstance(spec, Structure) else f"then {value.kind}")
        else:
            found.append(key if value is True else f"no {key}" if value is False else f"{key} {_value(value)}")
    return found


def _value(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _shown(shape: Shape) -> str:
    return "x".join(map(str, shape))
