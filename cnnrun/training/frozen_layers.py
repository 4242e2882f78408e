"""Frozen layers: training without changing them, and computing their features once if the images never change."""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from itertools import chain
from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.base.errors import NonFiniteError, escape
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.layer import Shape
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.image_stores import MemoryStore
from cnnrun.data.training_batches import batches_in_order
from cnnrun.model.network import Network
from cnnrun.model.structures import LinkedChain

_TRAINING_SPLITS = ("train", "val")

ProgressBar = Callable[[str, int], AbstractContextManager[Callable[[int], Any]]]


class Trunk(nn.Module):
    """Normalisation and the frozen layers: images [B, C, H, W] -> features."""

    def __init__(self, normalize: nn.Module, layers: nn.Module) -> None:
        super().__init__()
        self.normalize, self.layers = normalize, layers

    def forward(self, images_BCHW: Tensor) -> Tensor:
        out: Tensor = self.layers(self.normalize(images_BCHW))
        return out


def layers_until(network: Network, until: str | None) -> dict[str, nn.Module]:
    """The top-level layers up to and including `until`; empty if `until` is None."""
    children = dict(network.layers.named_children())
    names = list(children)
    return {name: children[name] for name in names[: names.index(until) + 1]} if until else {}


def set_training_mode(network: Network, until: str | None) -> None:
    """Put the network in training mode, except the layers up to `until`: no gradients, batch statistics or dropout."""
    network.train().requires_grad_()
    for module in layers_until(network, until).values():
        module.eval().requires_grad_(False)


def separate_trunk(network: Network, until: str) -> tuple[Trunk, Network] | None:
    """Split the network into (frozen trunk, rest), which share its modules and names.

    Returns None if a later layer takes an inner layer of the trunk as its input, or if the network also sees mirror
    images.
    """
    if network.averages_mirror:
        return None
    layers, frozen = network.layers, layers_until(network, until)
    rest = {name: module for name, module in layers.named_children() if name not in frozen}
    if not isinstance(layers, LinkedChain):
        return Trunk(network.normalize, _sequence(frozen)).eval(), Network(nn.Identity(), _sequence(rest), network.head)
    inputs = [{name: layers.inputs[name] for name in names if name in layers.inputs} for names in (frozen, rest)]
    nested = [module.inputs for layer in rest.values() for module in layer.modules() if isinstance(module, LinkedChain)]
    used = {source for links in (inputs[1], *nested) for sources in links.values() for source in sources}
    if (used | set(layers.outputs)) & frozen.keys():
        return None
    trunk, tail = LinkedChain(frozen, inputs[0], layers.kept), LinkedChain(rest, inputs[1], layers.kept, layers.outputs)
    return Trunk(network.normalize, trunk).eval(), Network(nn.Identity(), tail, network.head)


def _sequence(layers: dict[str, nn.Module]) -> nn.Module:
    return nn.Sequential(OrderedDict(layers))


def compute_features(
    trunk: nn.Module,
    dataset: Dataset,
    batch: int,
    device: torch.device,
    train_precision: Callable[[], AbstractContextManager[Any]],
    progress: ProgressBar,
) -> Dataset:
    """Return `dataset` with the trunk's features instead of images: float32, in host memory, in sample order.

    Those of the training split are computed in the context `train_precision`, the others in float32. Only the splits
    that training reads are returned. Raises NonFiniteError if a feature is not finite.
    """

    def with_features(examples: Examples, precision: Callable[[], AbstractContextManager[Any]]) -> Examples:
        features: Tensor | None = None
        with progress("features of the frozen layers", len(examples)) as advance, torch.no_grad(), precision():
            for part in batches_in_order(examples, batch, device):
                out = trunk(part.images.contiguous(memory_format=torch.channels_last)).float().cpu()
                bad = (~out.flatten(1).isfinite().all(1)).nonzero()
                if len(bad):
                    name = escape(examples.sample_name(int(part.index_B[bad[0, 0]])))
                    raise NonFiniteError(f"the frozen layers' features of {name} are not finite: their weights are bad")
                if features is None:
                    features = out.new_empty(len(examples), *out.shape[1:])
                features[part.index_B] = out
                advance(len(part))
        assert features is not None, "no split is empty"
        return replace(examples, images=MemoryStore(features.numpy()), rows=torch.arange(len(examples)))

    contexts = {"train": train_precision, "val": nullcontext}  # the splits that training reads
    return replace(dataset, splits={name: with_features(dataset.splits[name], contexts[name]) for name in contexts})


def feature_shape(trunk: Trunk, image_shape: Shape) -> Shape:
    """Shape of one image's features. The trunk may be on the meta device."""
    tensors = chain(trunk.layers.parameters(), trunk.layers.buffers())
    device = next((tensor.device for tensor in tensors), torch.device("cpu"))
    with torch.no_grad():
        features: Tensor = trunk.layers(torch.zeros(1, *image_shape, device=device))
    return tuple(features.shape[1:])


def recompute_reason(trunk: Trunk | None, facts: DataFacts, augment: Augment, memory_gib: float) -> str | None:
    """Reason that the frozen layers' features cannot be computed once, or None. `trunk` is `separate_trunk`'s."""
    if trunk is None:
        return "a later layer takes one of their inner layers by name, or mirror images are averaged"
    if augment.has_changes:
        return "augmentation changes the images"
    values = math.prod(feature_shape(trunk, facts.image_shape)) * sum(facts.counts[name] for name in _TRAINING_SPLITS)
    gib = 4 * values / 2**30
    return f"they would take {gib:.1f} GiB (data.memory_gib)" if gib > memory_gib else None
