"""The `blocks:` section: named lists of layers with parameters, expanded before the config is validated.

    blocks:
      bottleneck:
        parameters: {width, stride: 1}        # a parameter without a default, or with null, is required
        layers:
          - conv: {out_channels: $width, stride: $stride}
    model:
      - bottleneck: {width: 64}               # or `bottleneck: 64`: the first parameter

`$name` replaces a whole value; there are no expressions. The blocks in blocks.yaml are available in every config.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrun.config import yaml_reader
from cnnrun.config.messages import did_you_mean, format_value
from cnnrun.config.tree import INVALID, Map, Position, Problem, Seq, copy_tree
from cnnrun.config.yaml_reader import MAX_DEPTH, MAX_NODES

BLOCKS_FILE = Path(__file__).parent / "blocks.yaml"

# The setting that a bare list stands for: `residual: [...]` is `residual: {layers: [...]}`.
_MAIN_SETTINGS = {"sequential": "layers", "residual": "layers", "parallel": "branches"}
_LAYER_KEYS = ("name", "from")  # every layer takes them, so the use of a block does too


@dataclass(frozen=True)
class Block:
    """A named list of layers; `parameters` maps each parameter to its default, or to None if it is required."""

    name: str
    parameters: Map
    layers: Seq


def expand_blocks(tree: Map, kinds: Collection[str]) -> list[Problem]:
    """Replace every use of a block under `model:` by its layers, remove `blocks:`, and return the problems.

    Changes `tree` in place. `kinds` are the names of the layers, which a block may not take.
    """
    expander = _Expander(kinds)
    built_in, _ = yaml_reader.read_yaml(BLOCKS_FILE)
    expander.define_blocks(built_in["blocks"], built_in.positions["blocks"])
    if "blocks" in tree:
        expander.define_blocks(tree.pop("blocks"), tree.positions["blocks"])
    model = tree.get("model")
    expander.expand_list(model["layers"] if isinstance(model, Map) and "layers" in model else model, ())
    return expander.problems


class _Expander:
    """Expands blocks in place and collects problems. `stack` holds the blocks being expanded, outermost first."""

    def __init__(self, kinds: Collection[str]) -> None:
        self.problems: list[Problem] = []
        self._kinds = kinds
        self._blocks: dict[str, Block] = {}
        self._nodes = 0

    def define_blocks(self, section: Any, position: Position) -> None:
        """Add the blocks of a `blocks:` section, which stands at `position`."""
        if not isinstance(section, Map):
            self._add_problem(position, "blocks", "expected a mapping of block names to {parameters, layers}")
            return
        for name, body in section.items():
            path, key_position = f"blocks.{name}", section.key_positions[name]
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                text = f"{format_value(name)} is not a name: use letters, digits and _, and begin with a letter"
                self._add_problem(key_position, "blocks", text)
            elif name in self._kinds:
                self._add_problem(key_position, path, f"{name!r} is a layer of cnnrun; choose another name")
            elif not isinstance(body, Map) or not isinstance(body.get("layers"), Seq):
                self._add_problem(section.positions[name], path, "expected {parameters: {...}, layers: [...]}")
            elif unknown := [key for key in body if key not in ("parameters", "layers")]:
                text = f"unknown key{did_you_mean(unknown[0], ('parameters', 'layers'))}"
                self._add_problem(body.key_positions[unknown[0]], f"{path}.{unknown[0]}", text)
            elif not isinstance(parameters := body.get("parameters", Map()), Map):
                text = "expected a mapping: {width, stride: 1}"
                self._add_problem(body.positions["parameters"], f"{path}.parameters", text)
            else:
                self._blocks[name] = Block(name, parameters, body["layers"])

    def expand_list(self, layers: Any, stack: tuple[str, ...]) -> None:
        """Expand the blocks in a list of layers, and in the lists inside its layers."""
        if not isinstance(layers, Seq):
            return
        for index, layer in enumerate(layers):
            self._nodes += 1
            if (name := self._block_name(layer)) is not None:
                layers[index] = self._expand_use(self._blocks[name], layer, layers.positions[index], stack)
            if isinstance(layers[index], Map):
                for kind, body in layers[index].items():
                    self._expand_body(kind, body, (*stack, name) if name else stack)

    def _expand_body(self, kind: str, body: Any, stack: tuple[str, ...]) -> None:
        """Expand the lists of layers in a structure's settings, or in its main setting if that is all it has."""
        settings = body if isinstance(body, Map) else {_MAIN_SETTINGS.get(kind): body}
        for key in ("layers", "shortcut"):
            self.expand_list(settings.get(key), stack)
        branches = settings.get("branches")
        for branch in branches if isinstance(branches, Seq) else ():
            self.expand_list(branch, stack)

    def _block_name(self, layer: Any) -> str | None:
        """Name of the block that an item of a list of layers uses, or None."""
        is_single_key = isinstance(layer, Map) and len(layer) == 1
        word = layer if isinstance(layer, str) else next(iter(layer)) if is_single_key else None
        return word if word in self._blocks else None

    def _expand_use(self, block: Block, use: Any, position: Position, stack: tuple[str, ...]) -> Any:
        """The layer that replaces a use of a block: its only layer, or a `sequential` of several."""
        if block.name in stack or self._nodes > MAX_NODES or len(stack) >= MAX_DEPTH:
            is_recursive = block.name in stack
            problem = "contains itself" if is_recursive else f"grows beyond {MAX_NODES:,} layers or {MAX_DEPTH} levels"
            self._add_problem(position, f"blocks.{block.name}", f"the block {problem}")
            return INVALID
        arguments = self._bind_arguments(block, use, position)
        layers = self._substitute(copy_tree(block.layers), arguments, block.name)
        if layer := _unwrap_single_layer(layers):
            layer.display_name = f"{block.name}.{next(iter(layer))}"
        else:
            layer = self._wrap_in_sequential(layers, block.name, position)
            layer.display_name = block.name
        body = next(iter(layer.values()))
        for key in _LAYER_KEYS:
            if key in arguments:
                body.put(key, arguments[key], arguments.key_positions[key], arguments.positions[key])
        return layer

    def _wrap_in_sequential(self, layers: Seq, name: str, position: Position) -> Map:
        layer, body = Map(), Map()
        body.put("layers", layers, position, position)
        body.put("block", name, position, position)
        layer.put("sequential", body, position, position)
        return layer

    def _bind_arguments(self, block: Block, use: Any, position: Position) -> Map:
        """Values of a block's parameters, and name and from, for one use: written there, or the block's defaults."""
        value = use[block.name] if isinstance(use, Map) else None
        written = Map()
        if isinstance(value, Map):
            written = value
        elif value is not None and block.parameters:
            written.put(next(iter(block.parameters)), value, position, use.positions[block.name])
        elif value is not None:
            self._add_problem(position, block.name, "the block has no parameters")
        arguments = Map()
        for key, argument in written.items():
            if key in block.parameters or key in _LAYER_KEYS:
                arguments.put(key, argument, written.key_positions[key], written.positions[key])
            else:
                text = f"unknown parameter{did_you_mean(key, [*block.parameters, *_LAYER_KEYS])}"
                self._add_problem(written.key_positions[key], f"{block.name}.{key}", text)
        for key, default in block.parameters.items():
            if key not in arguments and default is None:
                self._add_problem(position, block.name, f"parameter {key!r} is required")
                arguments.put(key, INVALID, position, position)
            elif key not in arguments:
                arguments.put(key, default, block.parameters.key_positions[key], block.parameters.positions[key])
        return arguments

    def _substitute(self, node: Any, arguments: Map, name: str) -> Any:
        """Replace every `$parameter` in `node`, in place, by its value with the position where that was written."""
        if isinstance(node, Seq | Map):
            keys: Any = range(len(node)) if isinstance(node, Seq) else list(node)
            for key in keys:
                value = node[key]
                if isinstance(value, str) and value.startswith("$"):
                    parameter = value[1:]
                    if parameter in arguments:
                        node[key] = copy_tree(arguments[parameter])
                        node.positions[key] = arguments.positions[parameter]
                    else:
                        text = f"no parameter {value!r}{did_you_mean(parameter, arguments)}"
                        self._add_problem(node.positions[key], f"blocks.{name}", text)
                        node[key] = INVALID
                else:
                    self._substitute(value, arguments, name)
        return node

    def _add_problem(self, position: Position, path: str, message: str) -> None:
        problem = Problem(position, path, message)
        if problem not in self.problems:
            self.problems.append(problem)


def _unwrap_single_layer(layers: Seq) -> Map | None:
    """Return the only layer of a block, or None if there are several or it has a name or `from` of its own.

    A bare list in it is put under its setting, in place, so that a name and `from` can be added.
    """
    layer = layers[0] if len(layers) == 1 else None
    if not isinstance(layer, Map) or len(layer) != 1:
        return None
    (kind, body), position = next(iter(layer.items())), layers.positions[0]
    if isinstance(body, Seq) and kind in _MAIN_SETTINGS:
        layer[kind] = Map()
        layer[kind].put(_MAIN_SETTINGS[kind], body, position, position)
    return layer if isinstance(layer[kind], Map) and not any(key in layer[kind] for key in _LAYER_KEYS) else None
