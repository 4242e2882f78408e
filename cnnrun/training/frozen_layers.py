"""The layers that do not learn: held still, and their features computed once where the pictures never change."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.base.errors import NonFiniteError, escape
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.storage import InMemory
from cnnrun.data.training_batches import batches_in_order
from cnnrun.model.network import Network
from cnnrun.model.structures import LinkedChain

_READ = ("train", "val")  # the splits that training reads

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


class Trunk(nn.Module):
    """The pictures through normalisation and the frozen layers: [B, C, H, W] -> features."""

    def __init__(self, normalize: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.normalize, self.layers = normalize, layers

    def forward(self, pictures_BCHW: Tensor) -> Tensor:
        out: Tensor = self.layers(self.normalize(pictures_BCHW))
        return out


def layers_until(network: Network, until: str | None) -> dict[str, nn.Module]:
    """The top-level layers up to the one named `until`; none without."""
    children = dict(network.layers.named_children())
    names = list(children)
    return {name: children[name] for name in names[: names.index(until) + 1]} if until else {}


def set_training_mode(network: Network, until: str | None) -> None:
    """Neither gradients nor batch statistics nor dropout in that part; the rest in training mode."""
    network.train()
    for module in layers_until(network, until).values():
        module.eval().requires_grad_(False)


def separate_trunk(network: Network, until: str) -> tuple[Trunk, Network] | None:
    """The network as (frozen part, rest), sharing its modules and names; None where a later layer takes from inside."""
    layers, frozen = network.layers, layers_until(network, until)
    kept = {name: module for name, module in layers.named_children() if name not in frozen}
    if not isinstance(layers, LinkedChain):
        return Trunk(network.normalize, _sequence(frozen)).eval(), Network(nn.Identity(), _sequence(kept), network.head)
    inputs = [{name: layers.inputs[name] for name in names if name in layers.inputs} for names in (frozen, kept)]
    nested = [module.inputs for each in kept.values() for module in each.modules() if isinstance(module, LinkedChain)]
    taken = {source for links in (inputs[1], *nested) for sources in links.values() for source in sources}
    if (taken | set(layers.outputs)) & frozen.keys():
        return None
    trunk, tail = LinkedChain(frozen, inputs[0], layers.kept), LinkedChain(kept, inputs[1], layers.kept, layers.outputs)
    return Trunk(network.normalize, trunk).eval(), Network(nn.Identity(), tail, network.head)


def _sequence(layers: dict[str, nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def compute_features(trunk: nn.Module, dataset: Dataset, batch: int, device: torch.device, bar: ProgressBar) -> Dataset:
    """What training reads, with features in the place of pictures: float, on the host, in the order of the samples."""

    def computed(examples: Examples) -> Examples:
        made: Tensor | None = None
        with bar("features of the frozen layers", len(examples)) as advance, torch.no_grad():
            for pictures in batches_in_order(examples, batch, device):
                out = trunk(pictures.images.contiguous(memory_format=torch.channels_last)).float().cpu()
                bad = (~out.flatten(1).isfinite().all(1)).nonzero()
                if len(bad):
                    name = escape(examples.sample_name(int(pictures.index_B[bad[0, 0]])))
                    raise NonFiniteError(f"the frozen layers' features of {name} are not finite: their weights are bad")
                if made is None:
                    made = out.new_empty(len(examples), *out.shape[1:])
                made[pictures.index_B] = out
                advance(len(pictures))
        assert made is not None, "no split is empty"
        return replace(examples, images=InMemory(made.numpy()), rows=torch.arange(len(examples)))

    return replace(dataset, splits={name: computed(dataset.splits[name]) for name in _READ})


def feature_bytes(trunk: nn.Module, dataset: Dataset, device: torch.device) -> int:
    """What the features that training reads take in memory."""
    examples = dataset.splits["train"]
    with torch.no_grad():
        one: Tensor = trunk(next(iter(batches_in_order(examples, 1, device))).images)
    return 4 * one.numel() * sum(len(dataset.splits[name]) for name in _READ)
