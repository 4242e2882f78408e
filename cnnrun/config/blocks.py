"""The `blocks:` section: lists of layers with parameters, expanded where they are used, before anything is checked.

    blocks:
      bottleneck:
        parameters: {width, stride: 1}        # without a value: must be given
        layers:
          - conv: {out_channels: $width, stride: $stride}
    model:
      - bottleneck: {width: 64}               # or `bottleneck: 64`: the first parameter

`$name` stands for a whole value. There are no expressions. Every file has the blocks of blocks.yaml.
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

_MAIN = {"sequential": "layers", "residual": "layers", "parallel": "branches"}  # what `kind: [...]` sets
_AT_USE = ("name", "from")  # every layer may carry them, so a block where it is used may, too


@dataclass(frozen=True)
class Block:
    name: str
    parameters: Map
    layers: Seq


def expand_blocks(tree: Map, kinds: Collection[str]) -> list[Problem]:
    """Replace, in place, every use of a block under `model:` by its layers, and remove `blocks:`."""
    expander = _Expander(kinds)
    shipped, _ = yaml_reader.read_yaml(BLOCKS_FILE)
    expander.define(shipped["blocks"], shipped.positions["blocks"])
    if "blocks" in tree:
        expander.define(tree.pop("blocks"), tree.positions["blocks"])
    model = tree.get("model")
    expander.walk_list(model["layers"] if isinstance(model, Map) and "layers" in model else model, ())
    return expander.problems


class _Expander:
    def __init__(self, kinds: Collection[str]) -> None:
        self.problems: list[Problem] = []
        self._kinds = kinds
        self._blocks: dict[str, Block] = {}
        self._nodes = 0

    def define(self, section: Any, mark: Position) -> None:
        if not isinstance(section, Map):
            return self._problem(mark, "blocks", "expected a mapping of block names to {parameters, layers}")
        for name, body in section.items():
            path, at = f"blocks.{name}", section.positions[name]
            if not re.fullmatch("[A-Za-z_][A-Za-z0-9_]*", name):
                self._problem(
                    section.key_positions[name], "blocks", f"{format_value(name)} is no name: letters, digits and _"
                )
            elif name in self._kinds:
                self._problem(section.key_positions[name], path, f"{name!r} is a layer of cnnrun; choose another name")
            elif not isinstance(body, Map) or not isinstance(body.get("layers"), Seq):
                self._problem(at, path, "expected {parameters: {...}, layers: [...]}")
            elif unknown := [key for key in body if key not in ("parameters", "layers")]:
                text = f"unknown key{did_you_mean(unknown[0], ('parameters', 'layers'))}"
                self._problem(body.key_positions[unknown[0]], f"{path}.{unknown[0]}", text)
            elif not isinstance(parameters := body.get("parameters", Map()), Map):
                self._problem(
                    body.positions["parameters"], f"{path}.parameters", "expected a mapping: {width, stride: 1}"
                )
            else:
                self._blocks[name] = Block(name, parameters, body["layers"])
        return None

    def walk_list(self, layers: Any, inside: tuple[str, ...]) -> None:
        """Expand a list of layers; `inside` are the blocks being expanded, outermost first."""
        if not isinstance(layers, Seq):
            return
        for number, item in enumerate(layers):
            self._nodes += 1
            if (name := self._block_used(item)) is not None:
                layers[number] = self._use(self._blocks[name], item, layers.positions[number], inside)
            if isinstance(layers[number], Map):
                for kind, body in layers[number].items():
                    self._walk_body(kind, body, (*inside, name) if name else inside)

    def _walk_body(self, kind: str, body: Any, inside: tuple[str, ...]) -> None:
        """Expand the lists of layers that a structure holds, written out or as its main setting."""
        held = body if isinstance(body, Map) else {_MAIN.get(kind): body}
        for key in ("layers", "shortcut"):
            self.walk_list(held.get(key), inside)
        branches = held.get("branches")
        for branch in branches if isinstance(branches, Seq) else ():
            self.walk_list(branch, inside)

    def _block_used(self, item: Any) -> str | None:
        word = item if isinstance(item, str) else next(iter(item)) if isinstance(item, Map) and len(item) == 1 else None
        return word if word in self._blocks else None

    def _use(self, block: Block, item: Any, mark: Position, inside: tuple[str, ...]) -> Any:
        if block.name in inside or self._nodes > MAX_NODES or len(inside) >= MAX_DEPTH:
            why = (
                "contains itself" if block.name in inside else f"grows beyond {MAX_NODES} layers or {MAX_DEPTH} levels"
            )
            self._problem(mark, f"blocks.{block.name}", f"the block {why}")
            return INVALID
        given = self._arguments(block, item, mark)
        layers = self._filled(copy_tree(block.layers), given, block.name)
        if made := _alone(layers):
            made.display_name = f"{block.name}.{next(iter(made))}"
        else:
            made = self._sequential(layers, block.name, mark)
            made.display_name = block.name
        body = next(iter(made.values()))
        for key in _AT_USE:
            if key in given:
                body.put(key, given[key], given.key_positions[key], given.positions[key])
        return made

    def _sequential(self, layers: Seq, name: str, mark: Position) -> Map:
        made, body = Map(), Map()
        body.put("layers", layers, mark, mark)
        body.put("block", name, mark, mark)
        made.put("sequential", body, mark, mark)
        return made

    def _arguments(self, block: Block, item: Any, mark: Position) -> Map:
        """The parameters' values for this use: given here, or the block's defaults."""
        value = item[block.name] if isinstance(item, Map) else None
        given = Map()
        if isinstance(value, Map):
            given = value
        elif value is not None and block.parameters:
            given.put(next(iter(block.parameters)), value, mark, item.positions[block.name])
        elif value is not None:
            self._problem(mark, block.name, "the block has no parameters")
        made = Map()
        for key, argument in given.items():
            if key in block.parameters or key in _AT_USE:
                made.put(key, argument, given.key_positions[key], given.positions[key])
            else:
                known = [*block.parameters, *_AT_USE]
                self._problem(
                    given.key_positions[key], f"{block.name}.{key}", f"unknown parameter{did_you_mean(key, known)}"
                )
        for key, default in block.parameters.items():
            if key not in made and default is None:
                self._problem(mark, block.name, f"needs {key!r}")
                made.put(key, INVALID, mark, mark)
            elif key not in made:
                made.put(key, default, block.parameters.key_positions[key], block.parameters.positions[key])
        return made

    def _filled(self, node: Any, given: Map, name: str) -> Any:
        """`node` with every `$parameter` replaced; the value keeps the place where it was given."""
        if isinstance(node, Seq | Map):
            keys: Any = range(len(node)) if isinstance(node, Seq) else list(node)
            for key in keys:
                value = node[key]
                if isinstance(value, str) and value.startswith("$"):
                    parameter = value[1:]
                    if parameter in given:
                        node[key], node.positions[key] = copy_tree(given[parameter]), given.positions[parameter]
                    else:
                        text = f"no parameter {value!r}{did_you_mean(parameter, given)}"
                        self._problem(node.positions[key], f"blocks.{name}", text)
                        node[key] = INVALID
                else:
                    self._filled(value, given, name)
        return node

    def _problem(self, mark: Position, path: str, message: str) -> None:
        problem = Problem(mark, path, message)
        if problem not in self.problems:
            self.problems.append(problem)


def _alone(layers: Seq) -> Map | None:
    """The single layer of a block that has one, where that can carry the name given at the block's use."""
    layer = layers[0] if len(layers) == 1 else None
    if not isinstance(layer, Map) or len(layer) != 1:
        return None
    (kind, body), mark = next(iter(layer.items())), layers.positions[0]
    if isinstance(body, Seq) and kind in _MAIN:
        layer[kind] = Map()
        layer[kind].put(_MAIN[kind], body, mark, mark)
    return layer if isinstance(layer[kind], Map) and not any(key in layer[kind] for key in _AT_USE) else None
