"""Search for the first value of a step that is not finite."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from cnnrun.base.error_lines import join_names
from cnnrun.contracts.batch import Batch
from cnnrun.training.learner import Learner


def finite_image_mask(images: Tensor) -> Tensor:
    """Mask, bool [B] on the CPU, of the images whose values are all finite."""
    return images.flatten(1).isfinite().all(1).cpu()


def first_nonfinite(learner: Learner, batch: Batch, bad_images: list[str], loss_is_finite: bool) -> tuple[int, str]:
    """Find the first value that is not finite; returns its order (lower is earlier) and a description.

    `bad_images` are the names of images that are not finite themselves.
    """
    with learner.autocast():  # a layer may overflow in the config's precision alone
        layer = _first_layer(learner.active_network, batch)  # first, because synchronised norms need all ranks
    if bad_images:
        return 0, f"the image {join_names(bad_images, 8)}"
    if layer:
        return 1, layer
    for name, value in learner.changing_tensors.items():
        if not value.isfinite().all():
            return 2, name
    gradients = {name: parameter.grad for name, parameter in learner.network_and_criterion.named_parameters()}
    for name, gradient in gradients.items() if loss_is_finite else ():
        if gradient is not None and not gradient.isfinite().all():
            return 3, f"the gradient of {name.removeprefix('network.')}"
    return 4, "none (the loss itself)"


def _first_layer(network: nn.Module, batch: Batch) -> str | None:
    """Describe the first module whose weights, statistics or output are not finite; None if there is none."""
    descriptions: list[str] = []

    def watch(name: str) -> Any:
        def hook(module: nn.Module, inputs: Any, output: Any) -> None:
            tensors = {**dict(module.named_parameters(recurse=False)), **dict(module.named_buffers(recurse=False))}
            bad = [key for key, tensor in tensors.items() if not tensor.isfinite().all()]
            if bad:
                descriptions.append(f"{name} (its {bad[0]})")
            elif isinstance(output, Tensor) and not output.isfinite().all():
                descriptions.append(f"{name} (its output)")

        return hook

    leaves = [(name, module) for name, module in network.named_modules() if not list(module.children())]
    handles = [module.register_forward_hook(watch(name)) for name, module in leaves]
    with torch.no_grad():
        for micro_batch in batch.micro_batches():
            network(micro_batch.images)
    for handle in handles:
        handle.remove()
    return descriptions[0] if descriptions else None
