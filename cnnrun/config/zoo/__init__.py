"""The zoo: published networks as YAML files in this folder, and the expansion of `model: NAME` into their layers.

Each file starts with the paper, the number of parameters and the cost. It is a config without data or training. Each
of its top-level layers with weights has a name, for `until`, `train.freeze` and `from`.
"""

from __future__ import annotations

import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cnnrun.base.errors import ConfigError
from cnnrun.config import blocks, yaml_reader
from cnnrun.config.messages import did_you_mean, format_value, nearest_suggestion
from cnnrun.config.tree import INVALID, Map, Position, Problem, Seq

__all__ = []


FOLDER = Path(__file__).parent
_SIZES_LINE = re.compile(r"# ([\d,]+) parameters, ([\d.]+) GMACs at (\d+)x(\d+)x(\d+) with (\d+) classes\.")


@dataclass(frozen=True)
class ZooEntry:
    """A network of the zoo as the comment at the top of its file describes it; `macs` are multiply-adds per image."""

    name: str
    paper: str
    parameters: int
    macs: float
    image: tuple[int, int, int]
    classes: int


def network_names() -> list[str]:
    """Names of all networks, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def network_yaml(name: str) -> str:
    """Text of a network's file. Raises ConfigError if there is no such network."""
    if name not in network_names():
        raise ConfigError(f"no network {name!r} in the zoo{_zoo_suggestion(name)}")
    return (FOLDER / f"{name}.yaml").read_text()


@cache
def read_entry(name: str) -> ZooEntry:
    """Read the comment of a network's file, which tests compare with the built network. Raises ConfigError."""
    text = network_yaml(name)
    sizes = _SIZES_LINE.search(text)
    assert sizes, f"{name}: the file's comment has no line of parameters and GMACs"
    parameters, gmacs, *image, classes = sizes.groups()
    paper = " ".join(line.lstrip("# ") for line in text[: sizes.start()].splitlines())
    channels, height, width = map(int, image)
    shape = (channels, height, width)
    return ZooEntry(name, paper, int(parameters.replace(",", "")), float(gmacs) * 1e9, shape, int(classes))


def expand_shorthand(tree: Map) -> None:
    """Replace `model: NAME` by `model: {zoo: NAME}`, in place, so that an override can add to it."""
    if isinstance(name := tree.get("model"), str):
        tree["model"] = Map()
        tree["model"].put("zoo", name, tree.positions["model"], tree.positions["model"])


def expand_model(tree: Map, kinds: Collection[str]) -> list[Problem]:
    """Replace a zoo network under `model:` by its layers and a bare list by `{layers: list}`; return the problems.

    Changes `tree` in place. `kinds` are the names of all layers.
    """
    expand_shorthand(tree)
    model = tree.get("model")
    if isinstance(model, Seq):
        tree["model"] = _layers_map(model, tree.positions["model"])
    if isinstance(model, Map) and not model.keys() & {"zoo", "layers"}:
        position, tree["model"] = tree.positions["model"], INVALID
        return [
            Problem(position, "model", "expected a list (- conv: ...), a network of the zoo, or {zoo, weights, layers}")
        ]
    if not isinstance(model, Map) or "zoo" not in model:
        return []
    position, name = model.positions["zoo"], model["zoo"]
    if name not in network_names():
        tree["model"] = INVALID
        return [Problem(position, "model.zoo", f"no network {format_value(name)} in the zoo{_zoo_suggestion(name)}")]
    network, problems = yaml_reader.parse_yaml(network_yaml(name), f"{position}: zoo/{name}.yaml")
    problems += blocks.expand_blocks(network, kinds)
    if not model.keys() & {"until", "layers"}:
        _inherit_task(tree, network)
    tree["model"], join_problems = _join_layers(model, network["model"], position)
    return problems + join_problems


def _join_layers(model: Map, zoo_layers: Seq, position: Position) -> tuple[Map, list[Problem]]:
    """Build the `model` section from the zoo's layers up to `until`, followed by the config's own layers."""
    index_by_name = {name: index for index, layer in enumerate(zoo_layers) if (name := _layer_name(layer))}
    until, own_layers, problems = model.get("until"), model.get("layers", Seq()), []
    if until is not None and (not isinstance(until, str) or until not in index_by_name):
        text = f"no layer {until!r}{did_you_mean(until, index_by_name)}"
        problems = [Problem(model.positions["until"], "model.until", text)]
        until = None
    layers = Seq()
    for index in range((index_by_name[until] if until else len(zoo_layers) - 1) + 1):
        layers.append_at(zoo_layers[index], zoo_layers.positions[index])
    if isinstance(own_layers, Seq):
        for layer, layer_position in zip(own_layers, own_layers.positions, strict=True):
            layers.append_at(layer, layer_position)
        section = _layers_map(layers, position)
    else:  # validation will report that it is not a list
        section = _layers_map(own_layers, model.positions["layers"])
    if model.get("weights") is not None and (until or own_layers):  # up to this layer pretrained weights are loaded
        section.put("until", until or list(index_by_name)[-1], position, position)
    for key in model:
        if key not in ("zoo", "until", "layers"):
            section.put(key, model[key], model.key_positions[key], model.positions[key])
    return section, problems


def _inherit_task(tree: Map, network: Map) -> None:
    """Add the network's task settings to the config, in place, if it has the same task; its own settings stay."""
    network_task, task = network.get("task"), tree.get("task")
    if not isinstance(network_task, Map):
        return
    kind, defaults = next(iter(network_task.items()))
    if task == kind:
        tree["task"] = task = Map()
        task.put(kind, Map(), tree.positions["task"], tree.positions["task"])
    if isinstance(task, Map) and kind in task and task[kind] is None:
        task[kind] = Map()
    if isinstance(task, Map) and isinstance(settings := task.get(kind), Map):
        for key, value in defaults.items():
            if key not in settings:
                settings.put(key, value, defaults.key_positions[key], defaults.positions[key])


def _layers_map(layers: Seq, position: Position) -> Map:
    section = Map()
    section.put("layers", layers, position, position)
    section.display_name = ""  # the user wrote only the list, so messages must not say `layers`
    return section


def _layer_name(layer: object) -> str | None:
    body = next(iter(layer.values())) if isinstance(layer, Map) else None
    return body.get("name") if isinstance(body, Map) else None


def _zoo_suggestion(name: object) -> str:
    return f"{nearest_suggestion(name, network_names())} (`cnnrun zoo list` shows them)"
