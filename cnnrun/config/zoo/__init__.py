"""The zoo: the networks shipped as YAML beside this file, and `model: NAME` put in their place.

Each file opens with the paper and its figures, is a config without data or training, and has a name on each of its
top-level layers that has weights: what `until`, `train.freeze` and `from` may name.
"""

from __future__ import annotations

import difflib
import re
from collections.abc import Collection
from dataclasses import dataclass
from functools import cache
from pathlib import Path

from cnnrun.base.errors import ConfigError
from cnnrun.config import blocks, yaml_reader
from cnnrun.config.messages import did_you_mean, format_value
from cnnrun.config.tree import INVALID, Map, Position, Problem, Seq

FOLDER = Path(__file__).parent
_FIGURES = re.compile(r"# ([\d,]+) parameters, ([\d.]+) GMACs at (\d+)x(\d+)x(\d+) with (\d+) classes\.")


@dataclass(frozen=True)
class ZooEntry:
    """A network of the zoo as its file's head describes it; `macs` are the multiply-adds of one picture."""

    name: str
    paper: str
    parameters: int
    macs: float
    image: tuple[int, int, int]
    classes: int


def network_names() -> list[str]:
    """Every network, sorted."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml"))


def network_yaml(name: str) -> str:
    """The file of a network. Raises ConfigError for an unknown name."""
    if name not in network_names():
        raise ConfigError(f"no network {name!r} in the zoo{_suggested(name)}")
    return (FOLDER / f"{name}.yaml").read_text()


@cache
def read_entry(name: str) -> ZooEntry:
    """What the head of a network's file says. The tests hold it to what is built. Raises ConfigError."""
    written = network_yaml(name)
    found = _FIGURES.search(written)
    assert found, f"{name}: the head has no figures"
    parameters, gmacs, *image, classes = found.groups()
    paper = " ".join(line.lstrip("# ") for line in written[: found.start()].splitlines())
    channels, height, width = map(int, image)
    size = (channels, height, width)
    return ZooEntry(name, paper, int(parameters.replace(",", "")), float(gmacs) * 1e9, size, int(classes))


def expand_shorthand(tree: Map) -> None:
    """`model: NAME` as `model: {zoo: NAME}`, so that an override can add to it."""
    if isinstance(name := tree.get("model"), str):
        tree["model"] = Map()
        tree["model"].put("zoo", name, tree.positions["model"], tree.positions["model"])


def expand_model(tree: Map, kinds: Collection[str]) -> list[Problem]:
    """Replace, in place, the zoo network under `model:` by its layers, and a bare list by `{layers: list}`."""
    expand_shorthand(tree)
    model = tree.get("model")
    if isinstance(model, Seq):
        tree["model"] = _only_layers(model, tree.positions["model"])
    if isinstance(model, Map) and not model.keys() & {"zoo", "layers"}:
        mark, tree["model"] = tree.positions["model"], INVALID
        return [
            Problem(mark, "model", "expected a list (- conv: ...), a network of the zoo, or {zoo, weights, layers}")
        ]
    if not isinstance(model, Map) or "zoo" not in model:
        return []
    mark, name = model.positions["zoo"], model["zoo"]
    if name not in network_names():
        tree["model"] = INVALID
        return [Problem(mark, "model.zoo", f"no network {format_value(name)} in the zoo{_suggested(name)}")]
    network, problems = yaml_reader.parse_yaml(network_yaml(name), f"{mark}: zoo/{name}.yaml")
    problems += blocks.expand_blocks(network, kinds)
    if not model.keys() & {"until", "layers"}:
        _inherit_task(tree, network)
    tree["model"], found = _joined(model, network["model"], mark)
    return problems + found


def _joined(model: Map, layers: Seq, mark: Position) -> tuple[Map, list[Problem]]:
    """The `model` section with the zoo's layers up to `until`, then the config's own."""
    named = {name: place for place, layer in enumerate(layers) if (name := _name(layer))}
    until, own, problems = model.get("until"), model.get("layers", Seq()), []
    if until is not None and (not isinstance(until, str) or until not in named):
        problems = [Problem(model.positions["until"], "model.until", f"no layer {until!r}{did_you_mean(until, named)}")]
        until = None
    kept = Seq()
    for place in range((named[until] if until else len(layers) - 1) + 1):
        kept.put(layers[place], layers.positions[place])
    if isinstance(own, Seq):
        for layer, at in zip(own, own.positions, strict=True):
            kept.put(layer, at)
    made = _only_layers(kept, mark) if isinstance(own, Seq) else _only_layers(own, model.positions["layers"])
    if model.get("weights") is not None and (until or own):
        made.put("until", until or list(named)[-1], mark, mark)
    for key in model.keys() - {"zoo", "until", "layers"}:
        made.put(key, model[key], model.key_positions[key], model.positions[key])
    return made, problems


def _inherit_task(tree: Map, network: Map) -> None:
    """The network's own task settings where the config has the same task and does not give them."""
    theirs, mine = network.get("task"), tree.get("task")
    if not isinstance(theirs, Map):
        return
    kind, settings = next(iter(theirs.items()))
    if mine == kind:
        tree["task"] = mine = Map()
        mine.put(kind, Map(), tree.positions["task"], tree.positions["task"])
    if isinstance(mine, Map) and kind in mine and mine[kind] is None:
        mine[kind] = Map()
    if isinstance(mine, Map) and isinstance(own := mine.get(kind), Map):
        for key, value in settings.items():
            if key not in own:
                own.put(key, value, settings.key_positions[key], settings.positions[key])


def _only_layers(layers: Seq, mark: Position) -> Map:
    made = Map()
    made.put("layers", layers, mark, mark)
    made.display_name = ""  # the user wrote the list alone, so messages shall not say `layers`
    return made


def _name(layer: object) -> str | None:
    body = next(iter(layer.values())) if isinstance(layer, Map) else None
    return body.get("name") if isinstance(body, Map) else None


def _suggested(name: object) -> str:
    near = difflib.get_close_matches(str(name), network_names(), n=1)
    return (f"; did you mean {near[0]!r}?" if near else "") + " (`cnnrun zoo list` shows them)"
