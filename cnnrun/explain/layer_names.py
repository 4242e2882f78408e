"""Looking into a network: its layers by the names people use, what comes out of them, and the way back to pixels."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.base.errors import ConfigError, printable
from cnnrun.base.labelling import listed
from cnnrun.config.spec import nearest
from cnnrun.contracts.layer import Shape
from cnnrun.explain.method_base import Rule
from cnnrun.model.network import Built, Network
from cnnrun.model.receptive_field import Signal

_MOST_NAMED = 40  # layers in a message


@dataclass(frozen=True)
class Place:
    """A layer, or a structure of layers: its path in the YAML, its name in the weights, what comes out of it.

    `title` is what to call it: the path, or where a `repeat` has several of that path, the name in the weights.
    """

    title: str
    path: str
    module: str
    kind: str
    name: str | None
    out: Signal

    @property
    def shape(self) -> Shape:
        return self.out.shape

    def words(self) -> set[str]:
        """What it may be called."""
        without = self.path.removesuffix(f".{self.kind}")
        found = {self.path, without, self.module, self.module.removeprefix("layers.")}
        return found | {self.name} if self.name else found


def places(built: Built) -> list[Place]:
    """Every layer of a network in its order, structures after what they hold, the task's head last."""
    times = Counter(node.path for node in built.nodes.values())
    found = [
        Place(node.path if times[node.path] == 1 else name, node.path, name, node.spec.kind, node.spec.name, node.out)
        for name, node in built.nodes.items()
    ]
    head = built.rows[-1]
    return [*found, Place(head.path, head.path, head.module, head.kind, None, Signal(head.out_shape, whole=True))]


def located(
    known: Sequence[Place], word: str | None, suits: Sequence[Place], need: str, option: str = "--layer"
) -> Place:
    """The layer of that name among those that suit; without one the last conv. Raises ConfigError.

    `need` says what it takes to suit, such as "feature maps".
    """
    if not suits:
        raise ConfigError(f"this network has no layer with {need}")
    if word is None:
        convs = [place for place in suits if place.kind == "conv"]
        return convs[-1] if convs else suits[-1]
    found = [place for place in known if word in place.words()]
    if len(found) > 1:
        names = listed([place.module for place in found], _MOST_NAMED)
        raise ConfigError(f"{option} {printable(word)}: stands {len(found)} times in the network; say which: {names}")
    if found and found[0] in suits:
        return found[0]
    known_suits = listed([place.title for place in suits], _MOST_NAMED)
    known_suits += " (`cnnrun summary`)" if len(suits) > _MOST_NAMED else ""
    if found:
        shape = "x".join(map(str, found[0].shape))
        raise ConfigError(f"{option} {printable(word)}: gives {shape}, without {need}; such layers are: {known_suits}")
    near = nearest(word, sorted({each for place in suits for each in place.words()}))
    raise ConfigError(f"{option} {printable(word)}: no such layer{near} (layers with {need}: {known_suits})")


@contextmanager
def captured(network: Network, modules: Sequence[str]) -> Iterator[dict[str, Tensor]]:
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


def features(network: Network, place: Place, pictures_BCHW: Tensor) -> Tensor:
    """What comes out of a layer, for pixel values 0..255, without gradients."""
    with torch.no_grad(), captured(network, [place.module]) as kept:
        run_upto(network, place.module, pictures_BCHW)
    return kept[place.module]


@contextmanager
def passing_back(network: nn.Module, rule: Rule) -> Iterator[None]:
    """What ReLUs hand back inside: the slope (`plain`), that where it is above 0 (`guided`), or the signal from above
    where it is above 0, whatever came in (`deconv`).

    `guided`: Springenberg et al. 2015; `deconv`: Zeiler and Fergus 2014, section 2.1. Other activations hand their
    slope back.
    """
    changed = rectifiers(network) if rule != "plain" else []
    for module in changed:
        module.forward = _changed(module, rule)
    try:
        yield
    finally:
        for module in changed:
            del module.forward


def rectifiers(network: nn.Module) -> list[nn.Module]:
    """The activations that rules of handing back are about."""
    return [module for module in network.modules() if isinstance(module, nn.ReLU | nn.ReLU6)]


def _changed(module: nn.Module, rule: Rule) -> Any:
    forward, most = module.forward, 6.0 if isinstance(module, nn.ReLU6) else math.inf
    return lambda x: _Rectified.apply(x, forward, most if rule == "guided" else None)


class _Rectified(torch.autograd.Function):
    """An activation whose signal back is rectified as its signal forth is."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, activation: Any, most: float | None) -> Tensor:
        """`most` is the value from which on it is flat, where its slope counts; None where that does not."""
        ctx.save_for_backward(*([] if most is None else [(x > 0) & (x < most)]))
        out: Tensor = activation(x.clone())  # it may write over its input
        return out

    @staticmethod
    def backward(ctx: Any, *signals: Tensor) -> tuple[Tensor, None, None]:
        back = signals[0].clamp(min=0)
        return (back * ctx.saved_tensors[0] if ctx.saved_tensors else back), None, None


def projected(network: Network, place: Place, pictures_BCHW: Tensor, cells_B3: Tensor) -> Tensor:
    """The part of each picture that one activation stands for, as the deconvnet has it: [B, C, H, W].

    The cell (channel, row, column) is put back alone, with its value, through the filters transposed, the positions
    that each max-pooling chose, and ReLUs (Zeiler and Fergus 2014, section 2.1). In units of the normalised input.
    Other poolings hand their part to each cell, sums of branches to each branch.
    """
    pictures = pictures_BCHW.detach().requires_grad_()
    picture = torch.arange(len(pictures), device=pictures.device)
    channel, row, column = cells_B3.to(pictures.device).unbind(1)
    with torch.enable_grad(), passing_back(network, "deconv"), captured(network, ["normalize", place.module]) as kept:
        run_upto(network, place.module, pictures)
        value_B = kept[place.module][picture, channel, row, column]
        (found,) = torch.autograd.grad(value_B, kept["normalize"], value_B.detach())
    return found
