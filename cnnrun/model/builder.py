"""Build modules from the YAML's list of layers: structures, links by name, and the shape of every output.

Each layer runs once on PyTorch's meta device, which computes shapes alone; no kind of layer computes its own. Norms and
activations that keep the shape are not run: they take most of the time there.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from cnnrun.config.tree import KeyPath, path_text
from cnnrun.contracts.layer import HeightWidth, LayerSpec, Shape, ShapeError, Window
from cnnrun.contracts.task import Task
from cnnrun.model import structures
from cnnrun.model.layer_keys import InvalidNameError, LayerKeys
from cnnrun.model.layers.activation import make_in_place
from cnnrun.model.layers.merge import Concatenation, Product, Sum
from cnnrun.model.layers.norm_and_activation import add_norm_and_activation
from cnnrun.model.receptive_field import LayerOutput, propagate_window
from cnnrun.model.structures import Branches, LinkedChain, SumOfBranches, link_names

MAX_LAYERS = 3_000  # far above any real network; building 3,000 layers takes about two seconds


@dataclass(frozen=True)
class SummaryRow:
    """One layer (or the head) in the summary; `activation_bytes` is the size of its output for one image in float32."""

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
    """A layer or structure that was built: its path in the YAML, its settings, its input shapes and its output."""

    path: str
    spec: LayerSpec
    in_shapes: tuple[Shape, ...]
    out: LayerOutput

    @property
    def out_shape(self) -> Shape:
        """The shape of the output for one image."""
        return self.out.shape


@dataclass(frozen=True)
class ShapeProblem:
    """A layer that cannot take its input: the layer's path in the config, and the message for the user."""

    path: KeyPath
    message: str


class BuildError(Exception):
    """The network cannot be built; `problems` lists every ShapeProblem."""

    def __init__(self, problems: list[ShapeProblem]) -> None:
        super().__init__("; ".join(problem.message for problem in problems))
        self.problems = problems


class Builder:
    """Builds lists of layers; collects the summary's rows, every layer by its module name, and every problem."""

    def __init__(self) -> None:
        self.rows: list[SummaryRow] = []
        self.layers: dict[str, BuiltLayer] = {}
        self.problems: list[ShapeProblem] = []

    def build_body(
        self, nodes: Sequence[Any], signal: LayerOutput, feature_names: Sequence[str]
    ) -> tuple[nn.Module, list[LayerOutput]]:
        """Build the layers; also return the head's inputs: the outputs named in `feature_names`, or the last one."""
        signals: dict[str, LayerOutput] = {}
        layers, signal = self.build_chain(nodes, signal, ("model",), signals)
        if not feature_names or self.problems:
            return layers, [signal]
        for name in feature_names:
            if name not in signals:
                self.problems.append(ShapeProblem(("model",), f"no layer {name!r}, which the task's head takes"))
                return layers, [signal]
        kept, inputs = (layers.kept, layers.inputs) if isinstance(layers, LinkedChain) else ([], {})
        modules = dict(layers.named_children())
        kept = [key for key in modules if key in kept or key in feature_names]
        features = [signals[name] for name in feature_names]
        return LinkedChain(modules, inputs, kept, list(feature_names)), features

    def build_chain(
        self,
        nodes: Sequence[Any],
        signal: LayerOutput,
        path: KeyPath,
        signals: dict[str, LayerOutput],
        prefix: str = "layers",
    ) -> tuple[nn.Module, LayerOutput]:
        """Build the layers of one list and add their outputs to `signals`. Stop at the first failure."""
        modules, keys = {}, LayerKeys(nodes)
        for index, node in enumerate(nodes):
            layer_path = (*path, index, node.kind)
            try:
                key = keys.assign_name(node)
                sources = [self._find_signal(name, signals) for name in node.input_names()] or [signal]
                node.check_inputs([source.shape for source in sources])
                problem_count = len(self.problems)
                module, signal = self.build_layer(node, sources, layer_path, signals, f"{prefix}.{key}")
                in_shapes = tuple(source.shape for source in sources)
                self.layers[f"{prefix}.{key}"] = BuiltLayer(path_text(None, layer_path), node, in_shapes, signal)
                if len(self.problems) > problem_count:
                    break
            except ShapeError as error:
                arrivals = sources if node.input_names() else [signal]
                shapes = " and ".join(str(arrival.shape) for arrival in arrivals)
                self.problems.append(ShapeProblem(layer_path, f"{node.kind} cannot take {shapes}: {error}"))
                break
            except InvalidNameError as error:
                self.problems.append(ShapeProblem((*layer_path, error.setting), str(error)))
                break
            modules[key] = module
            if node.name is not None:
                signals[node.name] = signal
        return _build_chain_module(nodes, modules), signal

    def build_layer(
        self, node: Any, sources: list[LayerOutput], path: KeyPath, signals: dict[str, LayerOutput], prefix: str
    ) -> tuple[nn.Module, LayerOutput]:
        """Build one layer or structure. Raises ShapeError."""
        signal = sources[0]
        if isinstance(node, structures.Sequential):
            return self.build_chain(node.layers, signal, (*path, "layers"), dict(signals), prefix)
        if isinstance(node, structures.Repeat):
            return self._build_repeat(node, signal, path, signals, prefix)
        if isinstance(node, structures.Residual):
            return self._build_residual(node, signal, path, signals, prefix)
        if isinstance(node, structures.Parallel):
            return self._build_parallel(node, signal, path, signals, prefix)
        return self._build_leaf(node, sources, path, prefix)

    def build_head(self, task: Task, levels: list[LayerOutput]) -> nn.Module:
        """Build the task's head on the feature maps `levels` and add its summary row. Raises BuildError."""
        shapes = [level.shape for level in levels]
        try:
            head = task.learning.build_head(shapes)
        except ShapeError as error:
            message = f"the task's head ({task.kind}) cannot take {' and '.join(map(str, shapes))}: {error}"
            raise BuildError([ShapeProblem(("model",), message)]) from None
        self._add_row("task", task.kind, "head", head, levels, _run_on_meta(head, levels, Window()))
        return head

    def _build_leaf(
        self, node: LayerSpec, sources: list[LayerOutput], path: KeyPath, prefix: str
    ) -> tuple[nn.Module, LayerOutput]:
        if len(self.rows) >= MAX_LAYERS:
            raise ShapeError(f"the network has more than {MAX_LAYERS:,} layers", "repeat less")
        module = node.build(sources[0].shape)
        try:
            signal = _run_on_meta(node.shape_module(module), sources, node.window(sources[0].shape))
        except (RuntimeError, ValueError) as error:
            raise self._describe_failure(node, sources[0].shape, error) from None
        self._add_row(path_text(None, path), node.kind, prefix, module, sources, signal)
        return module, signal

    def _add_row(
        self, path: str, kind: str, prefix: str, module: nn.Module, sources: list[LayerOutput], signal: LayerOutput
    ) -> None:
        """Add the summary row of a module whose output is `signal`."""
        self.rows.append(
            SummaryRow(
                path=path,
                kind=kind,
                module=prefix,
                in_shape=sources[0].shape,
                out_shape=signal.shape,
                parameters=sum(parameter.numel() for parameter in module.parameters()),
                activation_bytes=4 * math.prod(signal.shape),
                receptive_field=None if signal.is_global else signal.field,
                stride=None if signal.is_global else signal.stride,
            )
        )

    def _describe_failure(self, node: LayerSpec, shape: Shape, error: Exception) -> ShapeError:
        """PyTorch's error as a ShapeError; a kernel larger than the feature map gets a message of its own."""
        kernel = node.window(shape).kernel
        if len(shape) == 3 and (kernel[0] > shape[1] or kernel[1] > shape[2]):
            reason = f"a window of {kernel[0]}x{kernel[1]} does not fit a map of {shape[1]}x{shape[2]}"
            return ShapeError(reason, "pool or stride less before it, or give a larger data.image.size")
        return ShapeError(str(error).split("\n")[0].rstrip("."), "change this layer or what comes before it")

    def _find_signal(self, name: str, signals: dict[str, LayerOutput]) -> LayerOutput:
        if name not in signals:
            names = f"earlier names: {', '.join(signals)}" if signals else "no earlier layer has a name"
            raise InvalidNameError("from", f"no earlier layer is named {name!r}; {names}")
        return signals[name]

    def _build_repeat(
        self, node: structures.Repeat, signal: LayerOutput, path: KeyPath, signals: dict[str, LayerOutput], prefix: str
    ) -> tuple[nn.Module, LayerOutput]:
        modules, has_links = {}, bool(link_names(node.layers))
        for number in range(1, node.times + 1):
            problem_count = len(self.problems)
            module, signal = self.build_chain(
                node.layers, signal, (*path, "layers"), dict(signals), f"{prefix}.{number}"
            )
            modules[str(number)] = module
            if len(self.problems) > problem_count:
                break
        if has_links:
            return LinkedChain(modules, {}, []), signal
        return nn.Sequential(OrderedDict(modules)), signal

    def _build_residual(
        self,
        node: structures.Residual,
        signal: LayerOutput,
        path: KeyPath,
        signals: dict[str, LayerOutput],
        prefix: str,
    ) -> tuple[nn.Module, LayerOutput]:
        problem_count = len(self.problems)
        layers, out = self.build_chain(node.layers, signal, (*path, "layers"), dict(signals), f"{prefix}.layers")
        if len(self.problems) > problem_count:
            return layers, out
        if isinstance(node.shortcut, list):
            shortcut, shortcut_out = self.build_chain(
                node.shortcut, signal, (*path, "shortcut"), dict(signals), f"{prefix}.shortcut"
            )
            if shortcut_out.shape != out.shape and len(self.problems) == problem_count:
                reason = f"its layers give {out.shape}, its shortcut {shortcut_out.shape}"
                raise ShapeError(reason, "make them agree")
        else:
            shortcut, shortcut_out = self._build_shortcut(
                node, signal, out, path_text(None, path), f"{prefix}.shortcut"
            )
        total = propagate_window(Window(), [out, shortcut_out], out.shape)
        activation: nn.Module = nn.Identity()
        if node.activation is not None:
            activation = make_in_place(node.activation.build(out.shape))
            kind, activation_path = node.activation.kind, f"{path_text(None, path)}.activation"
            self._add_row(activation_path, kind, f"{prefix}.activation", activation, [total], total)
        return SumOfBranches(layers, shortcut, activation), total

    def _build_shortcut(
        self, node: structures.Residual, signal: LayerOutput, out: LayerOutput, path: str, prefix: str
    ) -> tuple[nn.Module, LayerOutput]:
        """Build the identity, or a 1x1 conv with the stride that brings `signal` to the shape of `out`."""
        shapes_agree = signal.shape == out.shape
        if node.shortcut == "identity" and not shapes_agree:
            raise ShapeError(f"its layers give {out.shape}, the identity {signal.shape}", "use `shortcut: auto`")
        if shapes_agree and node.shortcut != "conv":
            return nn.Identity(), signal
        if len(out.shape) != 3 or len(signal.shape) != 3:
            raise ShapeError(f"no 1x1 conv leads to {out.shape}", "give the shortcut's layers")
        stride = (-(-signal.shape[1] // out.shape[1]), -(-signal.shape[2] // out.shape[2]))
        conv = nn.Conv2d(signal.shape[0], out.shape[0], 1, stride, bias=node.norm is None)
        module = add_norm_and_activation("conv", conv, out.shape, node.norm, None)
        shortcut_out = _run_on_meta(conv, [signal], Window(stride=stride))
        self._add_row(f"{path}.shortcut", "conv", prefix, module, [signal], shortcut_out)
        if shortcut_out.shape != out.shape:
            reason = f"its layers give {out.shape}, a 1x1 conv {shortcut_out.shape}"
            raise ShapeError(reason, "give the shortcut's layers")
        return module, shortcut_out

    def _build_parallel(
        self,
        node: structures.Parallel,
        signal: LayerOutput,
        path: KeyPath,
        signals: dict[str, LayerOutput],
        prefix: str,
    ) -> tuple[nn.Module, LayerOutput]:
        problem_count = len(self.problems)
        modules, branch_signals = [], []
        for number, layers in enumerate(node.branches):
            layer_path = (*path, "branches", number)
            module, out = self.build_chain(layers, signal, layer_path, dict(signals), f"{prefix}.branch{number + 1}")
            modules.append(module)
            branch_signals.append(out)
        merge = {"concat": Concatenation, "add": Sum, "multiply": Product}[node.merge]()
        if len(self.problems) > problem_count:
            return merge, signal
        shapes = " and ".join(str(out.shape) for out in branch_signals)
        merge_shapes = {out.shape[1:] if node.merge == "concat" else out.shape for out in branch_signals}
        if len(merge_shapes) > 1:
            raise ShapeError(f"its branches give {shapes}, which do not {node.merge}", "make them agree")
        channels = sum(out.shape[0] for out in branch_signals) if node.merge == "concat" else branch_signals[0].shape[0]
        merged = propagate_window(Window(), branch_signals, (channels, *branch_signals[0].shape[1:]))
        return Branches(modules, merge), merged


def _run_on_meta(module: nn.Module, sources: list[LayerOutput], window: Window) -> LayerOutput:
    """Run a module on the meta device, without memory. Raises ShapeError if its output is empty."""
    with torch.no_grad():
        out = module.eval()(*[torch.empty(1, *source.shape, device="meta") for source in sources])
    module.train()
    signal = propagate_window(window, sources, tuple(out.shape[1:]))
    if 0 in signal.shape:
        raise ShapeError(f"nothing would be left: {signal.shape}", "use fewer or smaller strides and poolings")
    return signal


def _build_chain_module(nodes: Sequence[Any], modules: dict[str, nn.Module]) -> nn.Module:
    """Join modules into a plain nn.Sequential, or a LinkedChain if a layer inside takes an output by name."""
    if not (names := set(link_names(nodes))):
        return nn.Sequential(OrderedDict(modules))
    inputs = {key: node.input_names() for key, node in zip(modules, nodes, strict=False) if node.input_names()}
    return LinkedChain(modules, inputs, [key for key in modules if key in names])
