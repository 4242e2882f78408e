"""Layers of a network by the names that users give them, and their outputs."""

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
from cnnrun.model.receptive_field import LayerOutput

_MAX_NAMES = 40  # layers that a message lists


@dataclass(frozen=True)
class NamedLayer:
    """A layer, or a layer that contains others: its path in the YAML, its name in the weights and its output.

    `title` is the name to show: the path, or for copies in a `repeat`, which share a path, the name in the weights.
    """

    title: str
    path: str
    module_name: str
    kind: str
    name: str | None
    output: LayerOutput

    @property
    def shape(self) -> Shape:
        """Shape of the layer's output for one image."""
        return self.output.shape

    def aliases(self) -> set[str]:
        """Names by which a user may refer to the layer."""
        path_without_kind = self.path.removesuffix(f".{self.kind}")
        names = {self.path, path_without_kind, self.module_name, self.module_name.removeprefix("layers.")}
        return names | {self.name} if self.name else names


def list_layers(network: BuiltNetwork) -> list[NamedLayer]:
    """List the layers of a network in order: structures after the layers inside them, the task's head last."""
    counts = Counter(layer.path for layer in network.layers.values())
    places = []
    for name, layer in network.layers.items():
        title = layer.path if counts[layer.path] == 1 else name
        places.append(NamedLayer(title, layer.path, name, layer.spec.kind, layer.spec.name, layer.out))
    head = network.rows[-1]
    return [
        *places,
        NamedLayer(head.path, head.path, head.module, head.kind, None, LayerOutput(head.out_shape, is_global=True)),
    ]


def find_layer(
    places: Sequence[NamedLayer], name: str | None, suitable: Sequence[NamedLayer], need: str, option: str = "--layer"
) -> NamedLayer:
    """Find the layer called `name`, which must be one of `suitable`; by default their last conv. Raises ConfigError.

    `need` describes what suitable layers have, such as "feature maps", for the error message.
    """
    if not suitable:
        raise ConfigError(f"this network has no layer with {need}")
    if name is None:
        convs = [place for place in suitable if place.kind == "conv"]
        return convs[-1] if convs else suitable[-1]
    matches = [place for place in places if name in place.aliases()]
    if len(matches) > 1:
        module_names = join_names([place.module_name for place in matches], _MAX_NAMES)
        raise ConfigError(f"{option} {escape(name)}: matches {len(matches)} layers; give one of {module_names}")
    if matches and matches[0] in suitable:
        return matches[0]
    suitable_names = join_names([place.title for place in suitable], _MAX_NAMES)
    suitable_names += " (`cnnrun summary`)" if len(suitable) > _MAX_NAMES else ""
    if matches:
        shape = "x".join(map(str, matches[0].shape))
        problem = f"its output is {shape}, without {need}"
        raise ConfigError(f"{option} {escape(name)}: {problem}; layers with {need}: {suitable_names}")
    suggestion = nearest_suggestion(name, sorted({alias for place in suitable for alias in place.aliases()}))
    raise ConfigError(f"{option} {escape(name)}: no such layer{suggestion} (layers with {need}: {suitable_names})")


@contextmanager
def capture_outputs(network: Network, modules: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """Capture the latest output of each module while the network runs inside the context."""
    outputs: dict[str, Tensor] = {}

    def store_output(name: str) -> Any:
        return lambda module, inputs, output: outputs.__setitem__(name, output)

    handles = [network.get_submodule(name).register_forward_hook(store_output(name)) for name in modules]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


class _StopForward(Exception):
    """Signal that ends a forward pass early."""


def run_upto(network: Network, module: str, images_BCHW: Tensor) -> None:
    """Run the network up to a module; the layers after it are not computed."""

    def stop(*_: Any) -> None:
        raise _StopForward

    handle = network.get_submodule(module).register_forward_hook(stop)
    try:
        network(images_BCHW)
    except _StopForward:
        pass
    finally:
        handle.remove()


def layer_features(network: Network, place: NamedLayer, images_BCHW: Tensor) -> Tensor:
    """Compute a layer's output for pixel values 0..255, without gradients."""
    with torch.no_grad(), capture_outputs(network, [place.module_name]) as outputs:
        run_upto(network, place.module_name, images_BCHW)
    return outputs[place.module_name]
