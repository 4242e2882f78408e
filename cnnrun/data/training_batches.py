"""Training batches as pure functions of the step, order and augmentation included; and batches for evaluation."""

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
from cnnrun.data.decode import DEFAULT_TIMEOUT, ReadTimeoutError
from cnnrun.data.epoch_order import EpochOrder, uniform_order

# Several successive batches are prepared together, as a chunk, so that a small network does not wait for many small
# operations. Images of this many bytes stay in the processor's cache.
AHEAD_BYTES = 8 << 20

Targets = dict[str, Tensor]
# (targets, partners' targets, weight of each image's own targets) -> mixed targets
MixTargets = Callable[[Targets, Targets, Tensor], Targets]


@dataclass(frozen=True)
class RankShare:
    """The images of a batch that a rank needs: its own, micro-batch by micro-batch, and their mixing partners.

    `needed_indices` [n] are indices in the batch. `own_indices`, and `partner_indices` [n, P], the P partners of each
    needed image, are indices in `needed_indices`.
    """

    global_size: int
    micro_sizes: tuple[int, ...]
    needed_indices: Tensor
    own_indices: Tensor
    partner_indices: Tensor


def compute_share(global_size: int, micro_batch_count: int, ranks: Ranks, partner_count: int) -> RankShare:
    """Compute a rank's share of a batch of `global_size` images in `micro_batch_count` micro-batches.

    Each micro-batch is divided among all ranks, so that it has the same images for any number of ranks. An image's
    partners are the next images of the batch.
    """
    pieces = [
        micro.tensor_split(ranks.world_size)[ranks.rank]
        for micro in torch.arange(global_size).tensor_split(micro_batch_count)
    ]
    own = torch.cat(pieces)
    own_partners = (own[:, None] + torch.arange(1, partner_count + 1)) % global_size
    needed = torch.cat([own, own_partners.flatten()]).unique() if partner_count else own
    own_indices = torch.searchsorted(needed, own)
    partner_indices = torch.arange(len(needed))[:, None].repeat(1, partner_count)
    partner_indices[own_indices] = torch.searchsorted(needed, own_partners)
    micro_sizes = tuple(len(piece) for piece in pieces if len(piece))
    return RankShare(global_size, micro_sizes, needed, own_indices, partner_indices)


@dataclass(frozen=True)
class BatchPlan:
    """Plan of the batches: sizes, the seed, and the order of the samples in each epoch (by default the uniform one)."""

    batch: int
    steps_per_epoch: int
    seed: int
    order: EpochOrder | None = None
    micro_batch_count: int = 1


@dataclass(frozen=True)
class BatchReading:
    """The device that batches are put on, how many are read ahead, and the seconds to wait for images."""

    device: torch.device
    prefetch: int = 0
    timeout: float = DEFAULT_TIMEOUT


class TrainingBatches:
    """The training batches of a run, with this rank's share of each.

    `at(step)` depends only on the constructor's arguments and the step. With `prefetch` a thread reads (or decodes) at
    least this many batches ahead, in whole chunks. Augmentation follows on the device, when a batch is asked for.
    """

    def __init__(
        self,
        examples: Examples,
        augment: Augment,
        plan: BatchPlan,
        reading: BatchReading,
        mix_targets: MixTargets | None = None,
        ranks: Ranks | None = None,
    ) -> None:
        self._examples, self._augment, self._batch, self._seed = examples, augment, plan.batch, plan.seed
        self._order, self._mix_targets = plan.order or uniform_order(len(examples)), mix_targets
        self._slots, self._ranks = augment.slots(), ranks or Ranks()
        self._micro_batch_count, self._shares = plan.micro_batch_count, dict[int, RankShare]()
        self._device, self._timeout = reading.device, reading.timeout
        self.steps_per_epoch = plan.steps_per_epoch
        self._orders: dict[int, tuple[Tensor, Tensor]] = {}
        self._ready: dict[int, Batch] = {}
        batch_bytes = (1 if augment.is_copy_only else 4) * plan.batch * int(torch.Size(examples.images.shape).numel())
        self._chunk_size = max(1, AHEAD_BYTES * self._ranks.world_size // batch_bytes)
        self._prefetch_chunks = -(-reading.prefetch // self._chunk_size)
        self._reader = ThreadPoolExecutor(1, "read ahead") if reading.prefetch else None
        self._pending: dict[int, Future[Tensor]] = {}
        self._is_hung = False

    def at(self, step: int) -> Batch:
        """The batch of optimizer step `step` (from 0), on the device."""
        if step not in self._ready:
            self._ready = self._prepare(step)
        return self._ready.pop(step)

    def set_micro_batches(self, count: int) -> None:
        """Divide the batches from now on into `count` micro-batches."""
        self._micro_batch_count, self._shares = count, {}
        self._ready, self._pending = {}, {}

    def sample_indices(self, step: int) -> Tensor:
        """The samples of a step's batch on all ranks, as indices in their split: int64 [B]."""
        return self._scheduled_samples(step, step + 1)[0]

    def close(self) -> None:
        """End the reading thread."""
        if self._reader:
            self._reader.shutdown(wait=not self._is_hung, cancel_futures=True)

    def _scheduled_samples(self, step: int, end: int) -> tuple[Tensor, Tensor]:
        """The samples of the steps `step` to `end` - 1 of one epoch, and the ids that seed their augmentation."""
        epoch, first = divmod(step, self.steps_per_epoch)
        if epoch not in self._orders:
            self._orders = {n: order for n, order in self._orders.items() if n == epoch - 1}
            self._orders[epoch] = self._order(self._seed, epoch)
        epoch_slice = slice(first * self._batch, (first + end - step) * self._batch)
        samples, augmentation_ids = self._orders[epoch]
        return samples[epoch_slice], augmentation_ids[epoch_slice]

    def _share(self, global_size: int) -> RankShare:
        if global_size not in self._shares:
            self._shares[global_size] = compute_share(
                global_size, self._micro_batch_count, self._ranks, self._augment.partner_count
            )
        return self._shares[global_size]

    def _needed_samples(self, step: int) -> tuple[Tensor, Tensor, list[RankShare]]:
        """Samples that this rank needs in the chunk that begins at `step`, their augmentation ids, and its shares."""
        samples, augmentation_ids = self._scheduled_samples(step, self._chunk_end(step))
        shares = [self._share(len(batch)) for batch in samples.split(self._batch)]
        needed = torch.cat([share.needed_indices + i * self._batch for i, share in enumerate(shares)])
        return samples[needed], augmentation_ids[needed], shares

    def _rows(self, step: int) -> Tensor:
        """The images of the chunk that begins at `step`. Call it in the main thread: it uses torch's threads."""
        return self._examples.rows[self._needed_samples(step)[0]]

    def _chunk_end(self, step: int) -> int:
        """The end of the chunk that begins at `step`, at the latest that of the epoch."""
        return min(step + self._chunk_size, (step // self.steps_per_epoch + 1) * self.steps_per_epoch)

    def _read(self, rows: Tensor) -> Tensor:
        images = self._examples.images.take(rows)
        return images.pin_memory() if self._device.type == "cuda" else images

    def _read_chunk(self, step: int) -> Tensor:
        """The images of the chunk that begins at `step`, on the host. Starts to read the next chunks."""
        if self._reader is None:
            return self._read(self._rows(step))
        starts = [step]
        for _ in range(self._prefetch_chunks):
            starts.append(self._chunk_end(starts[-1]))
        self._pending = {start: future for start, future in self._pending.items() if start in starts}
        for start in starts:
            if start not in self._pending:
                self._pending[start] = self._reader.submit(self._read, self._rows(start))
        return self._wait_for_images(self._pending.pop(step))

    def _wait_for_images(self, future: Future[Tensor]) -> Tensor:
        """Wait for the reading thread. Raises ReadTimeoutError if it reads the same images longer than `timeout`."""
        rows, since = self._examples.images.rows_being_read(), time.monotonic()
        while not wait([future], min(1.0, self._timeout / 4)).done:
            new_rows = self._examples.images.rows_being_read()
            if new_rows != rows:
                rows, since = new_rows, time.monotonic()
            elif time.monotonic() - since > self._timeout:
                self._is_hung = True
                raise ReadTimeoutError(self._timeout, [self._examples.source.sample_name(row) for row in rows])
        try:
            return future.result()
        except ReadTimeoutError:
            self._is_hung = True
            raise

    def _prepare(self, step: int) -> dict[int, Batch]:
        """The batches of the chunk that begins at `step`, by step."""
        images = self._read_chunk(step).to(self._device, non_blocking=True)
        samples, augmentation_ids, shares = self._needed_samples(step)
        draws = Draws(
            self._seed, step // self.steps_per_epoch, augmentation_ids.to(self._device, non_blocking=True), self._slots
        )
        targets = self._examples.batch_targets(samples, self._device)
        images = self._augment.apply(images, draws, targets)
        targets = self._augment.move_targets(targets, images.shape, draws)
        sizes = [len(share.needed_indices) for share in shares]
        partner_indices = _join_indices([share.partner_indices for share in shares], sizes)
        widths = self._object_widths(samples, partner_indices, sizes)
        images, targets = self._mix_partners(images, targets, partner_indices, draws)
        if self._ranks.world_size > 1:  # drop the images that were needed as partners only
            own = _join_indices([share.own_indices for share in shares], sizes)
            device_own = own.to(self._device, non_blocking=True)
            images, samples = images[device_own], samples[own]
            targets = {name: values[device_own] for name, values in targets.items()}
        return dict(enumerate(_split_into_batches(images, targets, samples, widths, shares), step))

    def _mix_partners(
        self, images: Tensor, targets: Targets, partner_indices: Tensor, draws: Draws
    ) -> tuple[Tensor, Targets]:
        """Make mosaics and mix images, as far as the config asks for it, with the partners `partner_indices` [n, P]."""
        partners = partner_indices.to(self._device, non_blocking=True)
        if self._augment.mosaic:
            images, targets = self._augment.make_mosaics(images, partners, targets, draws)
        if self._augment.has_mixing and self._mix_targets:
            partner = partners[:, 0]
            images, own_weight_B = self._augment.mix(images, partner, draws)
            partner_targets = {name: values[partner] for name, values in targets.items()}
            targets = self._mix_targets(targets, partner_targets, own_weight_B)
        return images, targets

    def _object_widths(self, samples: Tensor, partners: Tensor, sizes: list[int]) -> list[int]:
        """The maximum number of objects of an image in each batch, which is the width of the batch's object targets.

        It depends on the batch alone and not on the chunk, because chunks begin elsewhere after a resume.
        """
        if self._examples.objects is None:
            return [0] * len(sizes)
        counts = self._examples.objects.counts_N[samples]
        if self._augment.mosaic:
            counts = counts + counts[partners].sum(1)
        return [padded_width(batch_counts) for batch_counts in counts.split(sizes)]


def _join_indices(indices: list[Tensor], sizes: list[int]) -> Tensor:
    """Join indices within batches of these sizes to indices within all the batches."""
    starts = [0, *itertools.accumulate(sizes)]
    return torch.cat([batch_indices + start for batch_indices, start in zip(indices, starts, strict=False)])


def _split_into_batches(
    images: Tensor, targets: Targets, samples: Tensor, widths: list[int], shares: list[RankShare]
) -> list[Batch]:
    """Split a chunk into its batches; the targets of objects get the width of their batch."""
    sizes = [len(share.own_indices) for share in shares]
    pieces = {name: values.split(sizes) for name, values in targets.items()}
    batches = []
    for i, (images_B, index_B) in enumerate(zip(images.split(sizes), samples.split(sizes), strict=True)):
        targets_B = {
            name: parts[i][:, : widths[i]] if name in OBJECT_COLUMNS else parts[i] for name, parts in pieces.items()
        }
        batches.append(Batch(images_B, targets_B, index_B, shares[i].global_size, shares[i].micro_sizes))
    return batches


def batches_in_order(
    examples: Examples, batch: int, device: torch.device, ranks: Ranks | None = None
) -> Iterator[Batch]:
    """Yield every sample once, in order and without augmentation, for evaluation. Ranks take turns at the batches.

    Where `default_prefetch` reads ahead, the images of the next batch are read while the network computes.
    """
    rank, size = (ranks.rank, ranks.world_size) if ranks else (0, 1)
    indices = torch.arange(len(examples)).split(batch)[rank::size]
    all_rows = [examples.rows[index] for index in indices]
    reads_ahead = default_prefetch(examples, device) > 0
    loaded = _read_ahead(examples, all_rows, device) if reads_ahead else map(examples.images.take, all_rows)
    for index, images in zip(indices, loaded, strict=True):
        images_BCHW = images.to(device, non_blocking=True).float()
        yield Batch(images_BCHW, examples.batch_targets(index, device), index, len(index), (len(index),))


def _read_ahead(examples: Examples, all_rows: list[Tensor], device: torch.device) -> Iterator[Tensor]:
    """Yield the images of each item of `all_rows`, on the host; a thread reads those of the next one meanwhile."""

    def read(rows: Tensor) -> Tensor:
        images = examples.images.take(rows)
        return images.pin_memory() if device.type == "cuda" else images

    reader = ThreadPoolExecutor(1, "read ahead")
    pending: Future[Tensor] | None = None
    try:
        for rows in all_rows:
            following = reader.submit(read, rows)
            if pending:
                yield pending.result()
            pending = following
        if pending:
            yield pending.result()
    finally:  # an evaluation that ends early does not wait for a read that hangs
        reader.shutdown(wait=False, cancel_futures=True)


def default_prefetch(examples: Examples, device: torch.device) -> int:
    """Number of batches to read ahead by default.

    0 for images in memory and a network on the CPU: reading takes a hundredth of a step, and a thread for it would
    take the same time from the network (benchmarks/README.md).
    """
    return 0 if device.type == "cpu" and examples.images.is_in_memory else 2
