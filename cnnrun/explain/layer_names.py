"""Looking into a network: its layers by the names people use, what comes out of them, and the way back to pixels."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cnnrun.base.error_lines import join_names
from cnnrun.base.errors import ConfigError, escape
from cnnrun.config.messages import nearest_suggestion
from cnnrun.contracts.layer import Shape
from cnnrun.model.network import BuiltNetwork, Network
from cnnrun.model.receptive_field import Signal

_MOST_NAMED = 40  # layers in a message


@dataclass(frozen=True)
class LayerPlace:
    """A layer, or a structure of layers: its path in the YAML, its name in the weights, what comes out of it.

    `title` is what to call it: the path, or where a `repeat` has several of that path, the name in the weights.
    """

    title: str
    path: str
    module_name: str
    kind: str
    name: str | None
    output: Signal

    @property
    def shape(self) -> Shape:
        return self.output.shape

    def aliases(self) -> set[str]:
        """What it may be called."""
        without = self.path.removesuffix(f".{self.kind}")
        found = {self.path, without, self.module_name, self.module_name.removeprefix("layers.")}
        return found | {self.name} if self.name else found


def layer_places(built: BuiltNetwork) -> list[LayerPlace]:
    """Every layer of a network in its order, structures after what they hold, the task's head last."""
    times = Counter(node.path for node in built.layers.values())
    found = [
        LayerPlace(
            node.path if times[node.path] == 1 else name, node.path, name, node.spec.kind, node.spec.name, node.out
        )
        for name, node in built.layers.items()
    ]
    head = built.rows[-1]
    return [*found, LayerPlace(head.path, head.path, head.module, head.kind, None, Signal(head.out_shape, whole=True))]


def find_layer(
    known: Sequence[LayerPlace], word: str | None, suits: Sequence[LayerPlace], need: str, option: str = "--layer"
) -> LayerPlace:
    """The layer of that name among those that suit; without one the last conv. Raises ConfigError.

    `need` says what it takes to suit, such as "feature maps".
    """
    if not suits:
        raise ConfigError(f"this network has no layer with {need}")
    if word is None:
        convs = [place for place in suits if place.kind == "conv"]
        return convs[-1] if convs else suits[-1]
    found = [place for place in known if word in place.aliases()]
    if len(found) > 1:
        names = join_names([place.module_name for place in found], _MOST_NAMED)
        raise ConfigError(f"{option} {escape(word)}: stands {len(found)} times in the network; say which: {names}")
    if found and found[0] in suits:
        return found[0]
    known_suits = join_names([place.title for place in suits], _MOST_NAMED)
    known_suits += " (`cnnrun summary`)" if len(suits) > _MOST_NAMED else ""
    if found:
        shape = "x".join(map(str, found[0].shape))
        raise ConfigError(f"{option} {escape(word)}: gives {shape}, without {need}; such layers are: {known_suits}")
    near = nearest_suggestion(word, sorted({each for place in suits for each in place.aliases()}))
    raise ConfigError(f"{option} {escape(word)}: no such layer{near} (layers with {need}: {known_suits})")


@contextmanager
def capture_outputs(network: Network, modules: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What comes out of those modules whenever the network runs inside."""
    kept: dict[str, Tensor] = {}

    def keep(name: str) -> Any:
        return lambda module, inputs, output: kept.__setitem__(name, output)

    handles = [network.get_submodule(name).register_forward_hook(keep(name)) for name in modules]
    try:
        yield kept
    finally:
        for handle in handles:
            handle.remove()


class _Reached(Exception):
    """The network has come as far as is asked for."""


def run_upto(network: Network, module: str, pictures_BCHW: Tensor) -> None:
    """Run the network as far as a module: what comes after it is not computed."""

    def stop(*_: Any) -> None:
        raise _Reached

    handle = network.get_submodule(module).register_forward_hook(stop)
    try:
        network(pictures_BCHW)
    except _Reached:
        pass
    finally:
        handle.remove()


def layer_features(network: Network, place: LayerPlace, pictures_BCHW: Tensor) -> Tensor:
    """What comes out of a layer, for pixel values 0..255, without gradients."""
    with torch.no_grad(), capture_outputs(network, [place.module_name]) as kept:
        run_upto(network, place.module_name, pictures_BCHW)
    return kept[place.module_name]
