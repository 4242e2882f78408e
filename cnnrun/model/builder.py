"""From the YAML's list of layers to modules: structures, links by name, shapes found on the way.

Shapes are found by running each layer on PyTorch's meta device, which computes shapes and nothing else, so no kind of
layer writes channel arithmetic.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnrun.config.tree import KeyPath, path_text
from cnnrun.contracts.facts import Facts
from cnnrun.contracts.layer import HeightWidth, LayerSpec, Shape, ShapeError, Window
from cnnrun.contracts.task import TaskSpec
from cnnrun.model.layers.activation import make_in_place
from cnnrun.model.layers.merge import Concatenation, Product, Sum
from cnnrun.model.layers.norm_and_activation import add_norm_and_activation
from cnnrun.model.receptive_field import Signal, propagate_window
from cnnrun.model.structures import (
    Branches,
    LinkedChain,
    Parallel,
    Repeat,
    Residual,
    Sequential,
    SumOfBranches,
    link_names,
)

MAX_LAYERS = 3_000  # what no network of today comes near; building so many takes two seconds


@dataclass(frozen=True)
class SummaryRow:
    """A leaf (or the head) in the summary; `activation_bytes` for one picture in float32."""

    path: str
    kind: str
    module: str
    in_shape: Shape
    out_shape: Shape
    parameters: int
    activation_bytes: int
    receptive_field: HeightWidth | None
    stride: tuple[float, float] | None


@dataclass(frozen=True)
class BuiltLayer:
    """A layer of the list, structures too: where it stands, the shapes that go in, and what comes out."""

    path: str
    spec: LayerSpec
    in_shapes: tuple[Shape, ...]
    out: Signal

    @property
    def out_shape(self) -> Shape:
        return self.out.shape


@dataclass(frozen=True)
class ShapeProblem:
    """A layer that cannot take what arrives: its path in the model section, and the sentence for the user."""

    path: KeyPath
    message: str


class BuildError(Exception):
    """The network cannot be built; carries every ShapeProblem found."""

    def __init__(self, problems: list[ShapeProblem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


class Builder:
    """Builds lists of layers; keeps rows for the summary, every layer's shapes, and every problem found."""

    def __init__(self) -> None:
        self.rows: list[SummaryRow] = []
        self.layers: dict[str, BuiltLayer] = {}
        self.problems: list[ShapeProblem] = []

    def build_body(self, nodes: Sequence[Any], signal: Signal, taken: Sequence[str]) -> tuple[nn.Module, list[Signal]]:
        """The network's layers, and what its head takes of them: the outputs named in `taken`, or the last one's."""
        known: dict[str, Signal] = {}
        layers, signal = self.build_chain(nodes, signal, ("model",), known)
        if not taken or self.problems:
            return layers, [signal]
        for name in taken:
            if name not in known:
                self.problems.append(ShapeProblem(("model",), f"no layer {name!r}, which the task's head takes"))
                return layers, [signal]
        kept, inputs = ([*layers.kept], layers.inputs) if isinstance(layers, LinkedChain) else ([], {})
        modules = dict(layers.named_children())
        kept = [key for key in modules if key in kept or key in taken]
        return LinkedChain(modules, inputs, kept, list(taken)), [known[name] for name in taken]

    def build_chain(
        self, nodes: Sequence[Any], signal: Signal, path: KeyPath, known: dict[str, Signal], prefix: str = "layers"
    ) -> tuple[nn.Module, Signal]:
        """The layers of one list, in order; `known` learns their names. After one that fails, the rest is unbuilt."""
        modules, keys = {}, _Keys(nodes)
        for index, node in enumerate(nodes):
            here = (*path, index, node.kind)
            try:
                key = keys.take(node)
                sources = [self._named(name, known) for name in node.input_names()] or [signal]
                node.check_inputs([source.shape for source in sources])
                before = len(self.problems)
                module, signal = self.build_layer(node, sources, here, known, f"{prefix}.{key}")
                shapes = tuple(each.shape for each in sources)
                self.layers[f"{prefix}.{key}"] = BuiltLayer(path_text(None, here), node, shapes, signal)
                if len(self.problems) > before:
                    break
            except ShapeError as problem:
                arrived = (
                    " and ".join(str(source.shape) for source in sources) if node.input_names() else str(signal.shape)
                )
                self.problems.append(ShapeProblem(here, f"{node.kind} cannot take {arrived}: {problem}"))
                break
            except _BadName as problem:
                self.problems.append(ShapeProblem((*here, problem.setting), str(problem)))
                break
            modules[key] = module
            if node.name is not None:
                known[node.name] = signal
        return _chained(nodes, modules), signal

    def build_layer(
        self, node: Any, sources: list[Signal], path: KeyPath, known: dict[str, Signal], prefix: str
    ) -> tuple[nn.Module, Signal]:
        signal = sources[0]
        if isinstance(node, Sequential):
            return self.build_chain(node.layers, signal, (*path, "layers"), dict(known), prefix)
        if isinstance(node, Repeat):
            return self._repeat(node, signal, path, known, prefix)
        if isinstance(node, Residual):
            return self._residual(node, signal, path, known, prefix)
        if isinstance(node, Parallel):
            return self._parallel(node, signal, path, known, prefix)
        return self._leaf(node, sources, path, prefix)

    def build_head(self, task: TaskSpec, facts: Facts, levels: list[Signal]) -> nn.Module:
        """The task's last layer, as a row like any other."""
        shapes = [each.shape for each in levels]
        try:
            head = task.head(shapes, facts)
        except ShapeError as problem:
            message = f"the task's head ({task.kind}) cannot take {' and '.join(map(str, shapes))}: {problem}"
            raise BuildError([ShapeProblem(("model",), message)]) from None
        self._row("task", task.kind, "head", head, levels, Window())
        return head

    def _leaf(self, node: LayerSpec, sources: list[Signal], path: KeyPath, prefix: str) -> tuple[nn.Module, Signal]:
        if len(self.rows) >= MAX_LAYERS:
            raise ShapeError(f"the network has more than {MAX_LAYERS:,} layers", "repeat less")
        module = node.build(sources[0].shape)
        try:
            return module, self._row(
                path_text(None, path), node.kind, prefix, module, sources, node.window(sources[0].shape)
            )
        except (RuntimeError, ValueError) as error:
            raise self._reason(node, sources[0].shape, error) from None

    def _row(
        self, path: str, kind: str, prefix: str, module: nn.Module, sources: list[Signal], window: Window
    ) -> Signal:
        with torch.no_grad():
            out = module.eval()(*[torch.empty(1, *source.shape, device="meta") for source in sources])
        module.train()
        signal = propagate_window(window, sources, tuple(out.shape[1:]))
        if 0 in signal.shape:
            raise ShapeError(f"nothing would be left: {signal.shape}", "use fewer or smaller strides and poolings")
        self.rows.append(
            SummaryRow(
                path=path,
                kind=kind,
                module=prefix,
                in_shape=sources[0].shape,
                out_shape=signal.shape,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                activation_bytes=4 * out[0].numel(),
                receptive_field=None if signal.whole else signal.field,
                stride=None if signal.whole else signal.stride,
            )
        )
        return signal

    def _reason(self, node: LayerSpec, shape: Shape, error: Exception) -> ShapeError:
        """PyTorch's refusal of a shape, in terms of the picture where a window does not fit."""
        kernel = node.window(shape).kernel
        if len(shape) == 3 and (kernel[0] > shape[1] or kernel[1] > shape[2]):
            reason = f"a window of {kernel[0]}x{kernel[1]} does not fit a map of {shape[1]}x{shape[2]}"
            return ShapeError(reason, "pool or stride less before it, or give a larger data.image.size")
        return ShapeError(str(error).split("\n")[0].rstrip("."), "change this layer or what comes before it")

    def _named(self, name: str, known: dict[str, Signal]) -> Signal:
        if name not in known:
            before = f"named before it: {', '.join(known)}" if known else "no layer before it has a name"
            raise _BadName("from", f"no layer {name!r} to take from here; {before}")
        return known[name]

    def _repeat(
        self, node: Repeat, signal: Signal, path: KeyPath, known: dict[str, Signal], prefix: str
    ) -> tuple[nn.Module, Signal]:
        modules, linked = {}, bool(link_names(node.layers))
        for number in range(1, node.times + 1):
            before = len(self.problems)
            module, signal = self.build_chain(node.layers, signal, (*path, "layers"), dict(known), f"{prefix}.{number}")
            modules[str(number)] = module
            if len(self.problems) > before:
                break
        if linked:
            return LinkedChain(modules, {}, []), signal
        return nn.Sequential(OrderedDict(modules)), signal

    def _residual(
        self, node: Residual, signal: Signal, path: KeyPath, known: dict[str, Signal], prefix: str
    ) -> tuple[nn.Module, Signal]:
        before = len(self.problems)
        layers, out = self.build_chain(node.layers, signal, (*path, "layers"), dict(known), f"{prefix}.layers")
        if len(self.problems) > before:
            return layers, out
        if isinstance(node.shortcut, list):
            shortcut, other = self.build_chain(
                node.shortcut, signal, (*path, "shortcut"), dict(known), f"{prefix}.shortcut"
            )
            if other.shape != out.shape and len(self.problems) == before:
                reason = f"its layers give {out.shape}, its shortcut {other.shape}"
                raise ShapeError(reason, "make them agree")
        else:
            shortcut, other = self._shortcut(node, signal, out, path_text(None, path), f"{prefix}.shortcut")
        joined = propagate_window(Window(), [out, other], out.shape)
        activation: nn.Module = nn.Identity()
        if node.activation is not None:
            activation = make_in_place(node.activation.build(out.shape))
            kind, where = node.activation.kind, f"{path_text(None, path)}.activation"
            self._row(where, kind, f"{prefix}.activation", activation, [joined], Window())
        return SumOfBranches(layers, shortcut, activation), joined

    def _shortcut(
        self, node: Residual, signal: Signal, out: Signal, path: str, prefix: str
    ) -> tuple[nn.Module, Signal]:
        agree = signal.shape == out.shape
        if node.shortcut == "identity" and not agree:
            raise ShapeError(f"its layers give {out.shape}, the identity {signal.shape}", "use `shortcut: auto`")
        if agree and node.shortcut != "conv":
            return nn.Identity(), signal
        if len(out.shape) != 3 or len(signal.shape) != 3:
            raise ShapeError(f"no 1x1 conv leads to {out.shape}", "give the shortcut's layers")
        stride = (-(-signal.shape[1] // out.shape[1]), -(-signal.shape[2] // out.shape[2]))
        conv = nn.Conv2d(signal.shape[0], out.shape[0], 1, stride, bias=node.norm is None)
        module = add_norm_and_activation("conv", conv, out.shape, node.norm, None)
        made = self._row(f"{path}.shortcut", "conv", prefix, module, [signal], Window(stride=stride))
        if made.shape != out.shape:
            raise ShapeError(f"its layers give {out.shape}, a 1x1 conv {made.shape}", "give the shortcut's layers")
        return module, made

    def _parallel(
        self, node: Parallel, signal: Signal, path: KeyPath, known: dict[str, Signal], prefix: str
    ) -> tuple[nn.Module, Signal]:
        before = len(self.problems)
        modules, signals = [], []
        for number, layers in enumerate(node.branches):
            here = (*path, "branches", number)
            module, out = self.build_chain(layers, signal, here, dict(known), f"{prefix}.branch{number + 1}")
            modules.append(module)
            signals.append(out)
        merge = {"concat": Concatenation, "add": Sum, "multiply": Product}[node.merge]()
        if len(self.problems) > before:
            return merge, signal
        shapes = " and ".join(str(out.shape) for out in signals)
        same = {out.shape[1:] if node.merge == "concat" else out.shape for out in signals}
        if len(same) > 1:
            raise ShapeError(f"its branches give {shapes}, which do not {node.merge}", "make them agree")
        channels = sum(out.shape[0] for out in signals) if node.merge == "concat" else signals[0].shape[0]
        widest = propagate_window(Window(), signals, (channels, *signals[0].shape[1:]))
        return Branches(modules, merge), widest


class _BadName(Exception):
    """A `name` or `from` that cannot be; `setting` says which of the two."""

    def __init__(self, setting: str, message: str) -> None:
        super().__init__(message)
        self.setting = setting


_TAKEN = {*dir(nn.Sequential()), *dir(LinkedChain({}, {}, []))}  # what a module already has cannot name a layer


class _Keys:
    """Module names of a chain: a layer's own name, or its kind (or block) and a count (conv1, conv2)."""

    def __init__(self, nodes: Sequence[Any]) -> None:
        self._given = {node.name for node in nodes}
        self._count: dict[str, int] = {}
        self._names: set[str] = set()

    def take(self, node: LayerSpec) -> str:
        if node.name is not None:
            if node.name in self._names or node.name in _TAKEN:
                why = "stands twice in this list" if node.name in self._names else "is a word of PyTorch's modules"
                raise _BadName("name", f"the name {node.name!r} {why}; choose another")
            self._names.add(node.name)
            return node.name
        kind = getattr(node, "block", None) or node.kind
        while True:
            self._count[kind] = self._count.get(kind, 0) + 1
            key = f"{kind}{self._count[kind]}"
            if key not in self._given:  # somebody's conv may be named conv2
                return key


def _chained(nodes: Sequence[Any], modules: dict[str, nn.Module]) -> nn.Module:
    """A plain nn.Sequential unless a layer inside takes another's output by name."""
    taken = set(link_names(nodes))
    if not taken:
        return nn.Sequential(OrderedDict(modules))
    inputs = {key: node.input_names() for key, node in zip(modules, nodes, strict=False) if node.input_names()}
    return LinkedChain(modules, inputs, [key for key in modules if key in taken])
