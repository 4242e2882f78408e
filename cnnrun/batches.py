"""Batches as pure functions of the step: order, augmentation and all."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from cnnrun.augment import Augment
from cnnrun.batch import Batch
from cnnrun.dataset import Examples
from cnnrun.draws import Draws
from cnnrun.sampling import Order, uniform_order

# Several batches are prepared in one go, so that a small network does not wait for many small operations; pictures of
# this many bytes stay in the processor's cache.
AHEAD_BYTES = 8 << 20

Targets = dict[str, Tensor]
Blend = Callable[[Targets, Targets, Tensor], Targets]  # targets, their partners', how much of each is its own


class TrainingBatches:
    """The training batches of a run; `at(step)` depends on nothing but the arguments given here and the step.

    With `prefetch` a thread reads (and decodes, where pictures are not kept) so many batches ahead, and no less than
    what is prepared in one go; what is done with them is done when they are asked for, on the device.
    """

    def __init__(
        self,
        examples: Examples,
        augment: Augment,
        batch: int,
        steps_per_epoch: int,
        seed: int,
        device: torch.device,
        *,
        order: Order | None = None,
        blend: Blend | None = None,
        prefetch: int = 0,
    ) -> None:
        self._examples, self._augment, self._batch, self._seed, self._device = examples, augment, batch, seed, device
        self._order, self._blend = order or uniform_order(len(examples)), blend
        self._slots = augment.slots()
        self.steps_per_epoch = steps_per_epoch
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._ready: dict[int, Batch] = {}
        bytes_each = (1 if augment.copies else 4) * batch * int(torch.Size(examples.pictures.shape).numel())
        self._ahead = max(1, AHEAD_BYTES // bytes_each)
        self._prefetch = -(-prefetch // self._ahead)  # in goes
        self._reader = ThreadPoolExecutor(1, "read ahead") if prefetch else None
        self._coming: dict[int, Future[Tensor]] = {}

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step` (from 0), on the device."""
        if step not in self._ready:
            self._ready = self._prepare(step)
        return self._ready.pop(step)

    def indices(self, step: int) -> Tensor:
        """The samples of that step, as numbers in their split: int64 [B]."""
        return self._places(step, step + 1)[0]

    def close(self) -> None:
        """End the reading thread."""
        if self._reader:
            self._reader.shutdown(cancel_futures=True)

    def _places(self, step: int, end: int) -> tuple[Tensor, Tensor]:
        """The samples of those steps of one epoch, and the numbers that their draws go by."""
        epoch, first = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders = {n: made for n, made in self._orders.items() if n == epoch - 1}
            self._orders[epoch] = self._order(self._seed, epoch)
        chosen = slice(first * self._batch, (first + end - step) * self._batch)
        samples, numbers = self._orders[epoch]
        return samples[chosen], numbers[chosen]

    def _rows(self, step: int) -> Tensor:
        """Which pictures the go that begins at `step` takes. In the main thread: see `Held.take`."""
        return self._examples.rows[self._places(step, self._end(step))[0]]

    def _end(self, step: int) -> int:
        """Where the go that begins at `step` ends: with the epoch at the latest."""
        return min(step + self._ahead, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)

    def _read(self, rows: Tensor) -> Tensor:
        raw = self._examples.pictures.take(rows)
        return raw.pin_memory() if self._device.type == "cuda" else raw

    def _raw(self, step: int) -> Tensor:
        """The pictures of the go that begins at `step`, on the host; the next ones are begun."""
        if self._reader is None:
            return self._read(self._rows(step))
        wanted = step
        goes = []
        for _ in range(self._prefetch + 1):
            goes.append(wanted)
            wanted = self._end(wanted)
        self._coming = {start: future for start, future in self._coming.items() if start in goes}
        for start in goes:
            if start not in self._coming:
                self._coming[start] = self._reader.submit(self._read, self._rows(start))
        return self._coming.pop(step).result()

    def _prepare(self, step: int) -> dict[int, Batch]:
        raw = self._raw(step).to(self._device, non_blocking=True)
        samples, numbers = self._places(step, self._end(step))
        draws = Draws(
            self._seed, step // self.steps_per_epoch, numbers.to(self._device, non_blocking=True), self._slots
        )
        pictures = self._augment.apply(raw, draws)
        targets = {name: values[samples].to(self._device) for name, values in self._examples.targets.items()}
        parts = samples.split(self._batch)
        if self._augment.mixes and self._blend:
            # Each picture's partner is the next one of its own batch.
            places = torch.arange(len(samples), device=self._device).split(self._batch)
            partner = torch.cat([part.roll(-1) for part in places])
            pictures, own = self._augment.mix(pictures, partner, draws)
            targets = self._blend(targets, {name: values[partner] for name, values in targets.items()}, own)
        pieces = {name: values.split(self._batch) for name, values in targets.items()}
        return {
            step + i: Batch(piece, {name: values[i] for name, values in pieces.items()}, parts[i])
            for i, piece in enumerate(pictures.split(self._batch))
        }


def in_order(examples: Examples, batch: int, device: torch.device) -> Iterator[Batch]:
    """Every sample once, in order, unchanged: for evaluation."""
    for index in torch.arange(len(examples)).split(batch):
        pictures = examples.take(index).to(device).float()
        targets = {name: values[index].to(device) for name, values in examples.targets.items()}
        yield Batch(pictures, targets, index)


def default_prefetch(examples: Examples, device: torch.device) -> int:
    """Batches to read ahead where the config does not say.

    None where pictures in memory meet a network on the same processors: reading takes a hundredth of a step, and a
    thread that does it takes that time from the network all the same (benchmarks/README.md).
    """
    return 0 if device.type == "cpu" and examples.pictures.in_memory else 2
