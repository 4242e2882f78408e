"""The network's outline: its layers in words with their shapes, nested as the structures are; and the same as text."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

from cnnrun.contracts.layer import LayerSpec, Shape
from cnnrun.model.builder import BuiltLayer
from cnnrun.model.network import BuiltNetwork
from cnnrun.model.structures import Parallel, Repeat, Residual, Sequential, Structure

_HIDDEN_SETTINGS = {"name", "from_", "layers", "branches", "shortcut", "times", "block"}
_HIDDEN_BY_KIND = {"residual": {"norm"}}  # it is shown at the shortcut's convolution


@dataclass(frozen=True)
class OutlineEntry:
    """A layer in words; `lanes` are the lists of layers that a structure contains, side by side."""

    kind: str
    title: str
    notes: list[str]
    shape: str
    name: str | None = None
    sources: list[str] = field(default_factory=list)
    lanes: list[list[OutlineEntry]] = field(default_factory=list)


def build_outline(built_network: BuiltNetwork, task: str) -> list[OutlineEntry]:
    """Describe the input, the network's top-level layers and the task's head."""
    head = built_network.rows[-1]
    parts = [OutlineEntry("input", "input", [], _format_shape(built_network.image_shape))]
    parts += _describe_children(built_network.layers, "layers")
    return [*parts, OutlineEntry("head", task, [f"{head.parameters:,} parameters"], _format_shape(head.out_shape))]


def format_outline(parts: list[OutlineEntry]) -> str:
    """Format the outline as a tree of text lines, with the shapes in a column."""
    lines = _format_lines(parts, "")
    width = max(len(left) for left, _ in lines) + 2
    return "\n".join(f"{left:<{width}}{shape}".rstrip() for left, shape in lines)


def _format_lines(parts: list[OutlineEntry], indent: str) -> list[tuple[str, str]]:
    """The lines of a tree as pairs (text, shape)."""
    lines: list[tuple[str, str]] = []
    for part in parts:
        is_last = part is parts[-1]
        branch, child_indent = (indent + ("└─ " if is_last else "├─ "), indent + ("   " if is_last else "│  "))
        name = f"{part.name}: " if part.name else ""
        sources = f"  ← {', '.join(part.sources)}" if part.sources else ""
        lines.append((f"{branch}{name}{', '.join([part.title, *part.notes])}{sources}", part.shape))
        if len(part.lanes) == 1:
            lines += _format_lines(part.lanes[0], child_indent)
        for number, lane in enumerate(part.lanes if len(part.lanes) > 1 else []):
            is_last_lane = number == len(part.lanes) - 1
            title = ("layers", "shortcut")[number] if part.kind == "residual" else f"branch {number + 1}"
            lines.append((f"{child_indent}{'└─ ' if is_last_lane else '├─ '}{title}{'' if lane else ': identity'}", ""))
            lines += _format_lines(lane, child_indent + ("   " if is_last_lane else "│  "))
    return lines


def _describe_children(built_layers: dict[str, BuiltLayer], prefix: str) -> list[OutlineEntry]:
    """Describe the layers directly below the module name `prefix`, in order."""
    return [
        _describe_layer(built_layers, name, layer)
        for name, layer in built_layers.items()
        if name.rpartition(".")[0] == prefix
    ]


def _describe_layer(built_layers: dict[str, BuiltLayer], name: str, layer: BuiltLayer) -> OutlineEntry:
    spec, shape = layer.spec, _format_shape(layer.out_shape)
    common: dict[str, Any] = {"shape": shape, "name": spec.name, "sources": spec.input_names()}
    if isinstance(spec, Repeat):
        lanes = [_describe_children(built_layers, f"{name}.1")]
        return OutlineEntry(
            "repeat",
            f"{spec.times} times",
            ["only the first is shown"] if spec.times > 1 else [],
            lanes=lanes,
            **common,
        )
    if isinstance(spec, Sequential):
        lanes = [_describe_children(built_layers, name)]
        return OutlineEntry("sequential", spec.block or "sequential", [], lanes=lanes, **common)
    if isinstance(spec, Parallel):
        lanes = [
            _describe_children(built_layers, f"{name}.branch{number}") for number in range(1, len(spec.branches) + 1)
        ]
        return OutlineEntry("parallel", f"parallel, {spec.merge}", [], lanes=lanes, **common)
    if isinstance(spec, Residual):
        lanes = [_describe_children(built_layers, f"{name}.layers"), _describe_shortcut(built_layers, name, layer)]
        return OutlineEntry("residual", "residual", _notes(spec), lanes=lanes, **common)
    title, *notes = [_title(spec), *_notes(spec)]
    return OutlineEntry(spec.kind, title, notes, **common)


def _describe_shortcut(built_layers: dict[str, BuiltLayer], name: str, layer: BuiltLayer) -> list[OutlineEntry]:
    """Describe a residual's shortcut: its own layers, the added 1x1 convolution, or nothing for an identity."""
    spec = layer.spec
    assert isinstance(spec, Residual)
    if isinstance(spec.shortcut, list):
        return _describe_children(built_layers, f"{name}.shortcut")
    if spec.shortcut != "conv" and layer.in_shapes[0] == layer.out_shape:
        return []
    norm = [spec.norm.kind] if spec.norm else []
    return [OutlineEntry("conv", f"conv {layer.out_shape[0]}", ["1x1", *norm], _format_shape(layer.out_shape))]


def _title(spec: LayerSpec) -> str:
    main = getattr(spec, spec.main, None) if spec.main not in (None, "from") else None
    return spec.kind if main is None else f"{spec.kind} {_format_value(main)}"


def _notes(spec: LayerSpec) -> list[str]:
    """The settings that differ from their defaults, without the main one; a norm or activation is named by its kind."""
    notes = []
    hidden = _HIDDEN_SETTINGS | _HIDDEN_BY_KIND.get(spec.kind, set()) | {spec.main}
    for key in [key for key in type(spec).model_fields if key not in hidden]:
        value = getattr(spec, key)
        if key == "kernel_size":  # shown even at its default
            notes.append("x".join(map(str, value)))
        elif value == type(spec).model_fields[key].default:
            continue
        elif isinstance(value, LayerSpec):
            notes.append(value.kind if not isinstance(spec, Structure) else f"then {value.kind}")
        else:
            notes.append(key if value is True else f"no {key}" if value is False else f"{key} {_format_value(value)}")
    return notes


def _format_value(value: Any) -> str:
    if isinstance(value, tuple):
        return str(value[0]) if len(set(value)) == 1 else "x".join(map(str, value))
    return f"{value:g}" if isinstance(value, float) else str(value)


def _format_shape(shape: Shape) -> str:
    return "x".join(map(str, shape))
