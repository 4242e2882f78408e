"""Batches as pure functions of the step: order, augmentation and all."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from cnnrun.augment import Augment
from cnnrun.batch import Batch
from cnnrun.dataset import Examples
from cnnrun.randomness import permutation

# Several batches are prepared in one go, so that a small network does not wait for many small operations; float
# pictures of this many bytes stay in the processor's cache.
AHEAD_BYTES = 4 << 20


class TrainingBatches:
    """The training batches of a run; `at(step)` depends on nothing but the arguments given here and the step."""

    def __init__(
        self, examples: Examples, augment: Augment, batch: int, steps_per_epoch: int, seed: int, device: torch.device
    ) -> None:
        self._examples, self._augment, self._batch, self._seed, self._device = examples, augment, batch, seed, device
        self.steps_per_epoch = steps_per_epoch
        self._order: tuple[int, Tensor] = (-1, torch.empty(0))
        self._ready: dict[int, Batch] = {}
        bytes_each = 4 * batch * examples.pictures[0].numel()
        self._ahead = max(1, AHEAD_BYTES // bytes_each)

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step` (from 0), on the device."""
        if step not in self._ready:
            self._ready = self._prepare(step)
        return self._ready.pop(step)

    def indices(self, step: int) -> Tensor:
        """The samples of that step, as numbers in their split: int64 [B]."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if self._order[0] != epoch:
            self._order = (epoch, permutation(self._seed, epoch, len(self._examples)))
        return self._order[1][place * self._batch : (place + 1) * self._batch]

    def _prepare(self, step: int) -> dict[int, Batch]:
        epoch = step // self.steps_per_epoch
        last = min(step + self._ahead, (epoch + 1) * self.steps_per_epoch)
        parts = [self.indices(number) for number in range(step, last)]
        index = torch.cat(parts)
        examples = self._examples
        raw = examples.pictures.index_select(0, examples.rows[index]).to(self._device, non_blocking=True)
        on_device = index.to(self._device, non_blocking=True)
        pictures = self._augment.apply(raw, on_device, self._seed, epoch)
        targets = {name: values[index].to(self._device) for name, values in examples.targets.items()}
        sizes = [len(part) for part in parts]
        pieces = {name: values.split(sizes) for name, values in targets.items()}
        return {
            step + i: Batch(piece, {name: values[i] for name, values in pieces.items()}, parts[i])
            for i, piece in enumerate(pictures.split(sizes))
        }


def in_order(examples: Examples, batch: int, device: torch.device) -> Iterator[Batch]:
    """Every sample once, in order, unchanged: for evaluation."""
    for index in torch.arange(len(examples)).split(batch):
        pictures = examples.pictures.index_select(0, examples.rows[index]).to(device).float()
        targets = {name: values[index].to(device) for name, values in examples.targets.items()}
        yield Batch(pictures, targets, index)
