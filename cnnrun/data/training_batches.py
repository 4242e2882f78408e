"""Batches as pure functions of the step: order, augmentation and all."""

from __future__ import annotations

import itertools
import time
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor, wait
from dataclasses import dataclass

import torch
from torch import Tensor

from cnnrun.base.ranks import Ranks
from cnnrun.contracts.batch import Batch
from cnnrun.contracts.objects import OBJECT_COLUMNS, padded_width
from cnnrun.data.augment.random_slots import Draws
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Examples
from cnnrun.data.decode import ReadTimeoutError
from cnnrun.data.epoch_order import EpochOrder, uniform_order

# Several batches are prepared in one go, so that a small network does not wait for many small operations; pictures of
# this many bytes stay in the processor's cache.
AHEAD_BYTES = 8 << 20

Targets = dict[str, Tensor]
Blend = Callable[[Targets, Targets, Tensor], Targets]  # targets, their partners', how much of each is its own


@dataclass(frozen=True)
class Share:
    """What a rank needs of a batch: the places of its own pictures, micro-batch by micro-batch, and of their partners.

    `needed` are places in the batch; `own` and, for each of those needed, its `partner`s [n, P] are places in `needed`.
    """

    global_size: int
    micro_sizes: tuple[int, ...]
    needed_places: Tensor
    own_places: Tensor
    partner_places: Tensor


def compute_share(whole: int, parts: int, ranks: Ranks, partners: int) -> Share:
    """A rank's share of a batch of `whole` pictures in `parts` micro-batches, each of which all ranks work on.

    So a micro-batch has the same pictures whatever the number of ranks. A picture's partners are the batch's next ones.
    """
    pieces = [micro.tensor_split(ranks.world_size)[ranks.rank] for micro in torch.arange(whole).tensor_split(parts)]
    own = torch.cat(pieces)
    others = (own[:, None] + torch.arange(1, partners + 1)) % whole
    needed = torch.cat([own, others.flatten()]).unique() if partners else own
    at = torch.searchsorted(needed, own)
    partner = torch.arange(len(needed))[:, None].repeat(1, partners)
    partner[at] = torch.searchsorted(needed, others)
    return Share(whole, tuple(len(piece) for piece in pieces if len(piece)), needed, at, partner)


class TrainingBatches:
    """The training batches of a run, of each this rank's share.

    `at(step)` depends on nothing but the arguments given here and the step.

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
        order: EpochOrder | None = None,
        blend: Blend | None = None,
        prefetch: int = 0,
        timeout: float = 120.0,
        micro_batch_count: int = 1,
        ranks: Ranks | None = None,
    ) -> None:
        self._examples, self._augment, self._batch, self._seed, self._device = examples, augment, batch, seed, device
        self._order, self._blend = order or uniform_order(len(examples)), blend
        self._slots, self._ranks = augment.slots(), ranks or Ranks()
        self._parts, self._shares = micro_batch_count, dict[int, Share]()
        self._timeout = timeout
        self.steps_per_epoch = steps_per_epoch
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._ready: dict[int, Batch] = {}
        bytes_each = (1 if augment.is_copy_only else 4) * batch * int(torch.Size(examples.images.shape).numel())
        self._ahead = max(1, AHEAD_BYTES * self._ranks.world_size // bytes_each)
        self._prefetch = -(-prefetch // self._ahead)  # in goes
        self._reader = ThreadPoolExecutor(1, "read ahead") if prefetch else None
        self._coming: dict[int, Future[Tensor]] = {}
        self._stuck = False

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step` (from 0), on the device."""
        if step not in self._ready:
            self._ready = self._prepare(step)
        return self._ready.pop(step)

    def set_micro_batches(self, parts: int) -> None:
        """From now on in so many micro-batches."""
        self._parts, self._shares = parts, {}
        self._ready, self._coming = {}, {}

    def sample_indices(self, step: int) -> Tensor:
        """The samples of that step on all ranks, as numbers in their split: int64 [B]."""
        return self._places(step, step + 1)[0]

    def close(self) -> None:
        """End the reading thread."""
        if self._reader:
            self._reader.shutdown(wait=not self._stuck, cancel_futures=True)

    def _places(self, step: int, end: int) -> tuple[Tensor, Tensor]:
        """The samples of those steps of one epoch, and the numbers that their draws go by."""
        epoch, first = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders = {n: made for n, made in self._orders.items() if n == epoch - 1}
            self._orders[epoch] = self._order(self._seed, epoch)
        chosen = slice(first * self._batch, (first + end - step) * self._batch)
        samples, numbers = self._orders[epoch]
        return samples[chosen], numbers[chosen]

    def _share(self, whole: int) -> Share:
        if whole not in self._shares:
            self._shares[whole] = compute_share(whole, self._parts, self._ranks, self._augment.partner_count)
        return self._shares[whole]

    def _needed(self, step: int) -> tuple[Tensor, Tensor, list[Share]]:
        """Samples and draws' numbers that this rank takes in the go that begins at `step`, and its shares by step."""
        samples, numbers = self._places(step, self._end(step))
        shares = [self._share(len(part)) for part in samples.split(self._batch)]
        places = torch.cat([each.needed_places + place * self._batch for place, each in enumerate(shares)])
        return samples[places], numbers[places], shares

    def _rows(self, step: int) -> Tensor:
        """Which pictures the go that begins at `step` takes. In the main thread: see `Held.take`."""
        return self._examples.rows[self._needed(step)[0]]

    def _end(self, step: int) -> int:
        """Where the go that begins at `step` ends: with the epoch at the latest."""
        return min(step + self._ahead, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)

    def _read(self, rows: Tensor) -> Tensor:
        raw = self._examples.images.take(rows)
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
        return self._arrived(self._coming.pop(step))

    def _arrived(self, coming: Future[Tensor]) -> Tensor:
        """What the reading thread brings. Raises Stuck when for too long it has been at the same pictures."""
        seen, since = self._examples.images.rows_being_read(), time.monotonic()
        while not wait([coming], min(1.0, self._timeout / 4)).done:
            now = self._examples.images.rows_being_read()
            if now != seen:
                seen, since = now, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._stuck = True
                raise ReadTimeoutError(self._timeout, [self._examples.source.sample_name(number) for number in now])
        try:
            return coming.result()
        except ReadTimeoutError:
            self._stuck = True
            raise

    def _prepare(self, step: int) -> dict[int, Batch]:
        raw = self._raw(step).to(self._device, non_blocking=True)
        samples, numbers, shares = self._needed(step)
        draws = Draws(
            self._seed, step // self.steps_per_epoch, numbers.to(self._device, non_blocking=True), self._slots
        )
        targets = self._examples.batch_targets(samples, self._device)
        pictures = self._augment.apply(raw, draws, targets)
        targets = self._augment.move_targets(targets, pictures.shape, draws)
        sizes = [len(each.needed_places) for each in shares]
        at = _shifted([each.partner_places for each in shares], sizes)
        widths, partners = self._widths(samples, at, sizes), at.to(self._device, non_blocking=True)
        if self._augment.mosaic:
            pictures, targets = self._augment.make_mosaics(pictures, partners, targets, draws)
        if self._augment.has_mixing and self._blend:
            partner = partners[:, 0]
            pictures, part = self._augment.mix(pictures, partner, draws)
            targets = self._blend(targets, {name: values[partner] for name, values in targets.items()}, part)
        if self._ranks.world_size > 1:  # what was needed for others' sake goes
            own = _shifted([each.own_places for each in shares], sizes)
            here = own.to(self._device, non_blocking=True)
            pictures, samples = pictures[here], samples[own]
            targets = {name: values[here] for name, values in targets.items()}
            sizes = [len(each.own_places) for each in shares]
        pieces = {name: values.split(sizes) for name, values in targets.items()}
        return {
            step + i: Batch(
                picture_B,
                {
                    name: values[i][:, : widths[i]] if name in OBJECT_COLUMNS else values[i]
                    for name, values in pieces.items()
                },
                index_B,
                of.global_size,
                of.micro_sizes,
            )
            for i, (picture_B, index_B, of) in enumerate(
                zip(pictures.split(sizes), samples.split(sizes), shares, strict=True)
            )
        }

    def _widths(self, samples: Tensor, partners: Tensor, sizes: list[int]) -> list[int]:
        """The most objects that a picture of each batch may have: its own alone decide how wide its targets are.

        What is prepared in one go, which another go may begin within after a resume, has no part in it.
        """
        if self._examples.objects is None:
            return [0] * len(sizes)
        counts = self._examples.objects.counts_N[samples]
        if self._augment.mosaic:
            counts = counts + counts[partners].sum(1)
        return [padded_width(of_batch) for of_batch in counts.split(sizes)]


def _shifted(places: list[Tensor], sizes: list[int]) -> Tensor:
    """Places within several batches as places within all of them."""
    firsts = [0, *itertools.accumulate(sizes)]
    return torch.cat([each + first for each, first in zip(places, firsts, strict=False)])


def batches_in_order(
    examples: Examples, batch: int, device: torch.device, ranks: Ranks | None = None
) -> Iterator[Batch]:
    """Every sample once, in order, unchanged: for evaluation. Of several ranks each takes every so-many-th batch."""
    rank, size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    for index in torch.arange(len(examples)).split(batch)[rank::size]:
        pictures = examples.load_images(index).to(device).float()
        yield Batch(pictures, examples.batch_targets(index, device), index, len(index), (len(index),))


def default_prefetch(examples: Examples, device: torch.device) -> int:
    """Batches to read ahead where the config does not say.

    None where pictures in memory meet a network on the same processors: reading takes a hundredth of a step, and a
    thread that does it takes that time from the network all the same (benchmarks/README.md).
    """
    return 0 if device.type == "cpu" and examples.images.is_in_memory else 2
