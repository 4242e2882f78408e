"""The processes that train together, as torchrun starts them: what they exchange, and what happens when one is lost.

Every rank holds the same weights, statistics and counters after each step; rank 0 alone writes. What is exchanged is
tensors and JSON, never a pickle.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import timedelta
from typing import Any, NoReturn

import safetensors.torch
import torch
import torch.distributed as dist
from torch import Tensor
from torch.distributed.rendezvous import rendezvous

from cnnrun.base import torchrun
from cnnrun.base.errors import ConfigError, NoAnswerError, OtherRankError, ResourceError, first_line
from cnnrun.base.progress import say

_BUCKET_BYTES = 32 << 20  # gradients that are added up at a time
_PATIENT = timedelta(days=1)  # for decoding a data set, which may take hours on one host and not on another


class Ranks:
    """A process on its own: there is nobody to exchange anything with."""

    rank, world_size = 0, 1

    @property
    def is_first(self) -> bool:
        """Whether this one writes."""
        return self.rank == 0

    def barrier(self, *, long_timeout: bool = False) -> None:
        """Until all are here; with `long_timeout` however long that takes."""

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """The largest of each number over all ranks."""
        return list(numbers)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Put the sum over all ranks in the place of each tensor; the same bits on every rank."""

    def all_gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors, in the order of the ranks; on the host where they come from elsewhere."""
        return [tensors]

    def broadcast(self, make: Callable[[], Any]) -> Any:
        """What `make` returns on rank 0, as JSON data; it runs nowhere else, and its error ends all of them."""
        return make()

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors, on the host; the others give None."""
        assert tensors is not None
        return tensors


class RankGroup(Ranks):
    """One of several processes. A rank that is lost, or slower than `timeout` seconds, ends the others with Lost."""

    def __init__(self, timeout: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        self._patient: Any = dist.new_group(backend="gloo", timeout=_PATIENT)

    def barrier(self, *, long_timeout: bool = False) -> None:
        with self._losing():
            # Of numbers on the host, which no GPU has a part in.
            dist.all_reduce(torch.zeros(1), group=self._patient if long_timeout else None)

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        shared = torch.tensor(numbers, dtype=torch.int64)
        with self._losing():
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [int(number) for number in shared]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._losing():
                dist.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def all_gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        own = _as_tensor(safetensors.torch.save(on_host))
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with self._losing():
            dist.all_gather(lengths, torch.tensor([len(own)]))
            longest = max(int(length) for length in lengths)
            padded = torch.cat([own, own.new_zeros(longest - len(own))])
            parts = [torch.empty_like(padded) for _ in range(self.world_size)]
            dist.all_gather(parts, padded)
        return [
            safetensors.torch.load(part[: int(length)].numpy().tobytes())
            for part, length in zip(parts, lengths, strict=True)
        ]

    def broadcast(self, make: Callable[[], Any]) -> Any:
        if not self.is_first:
            told = json.loads(self._broadcast(None))
            if "failed" in told:
                raise OtherRankError
            return told["made"]
        try:
            made = make()
            told = json.dumps({"made": made}).encode()
        except BaseException:  # whatever it is, the others must not wait for what does not come
            with suppress(NoAnswerError):
                self._broadcast(b'{"failed": true}')
            raise
        self._broadcast(told)
        return made

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        return safetensors.torch.load(self._broadcast(safetensors.torch.save(tensors) if tensors is not None else None))

    def _broadcast(self, data: bytes | None) -> bytes:
        """Rank 0's bytes; the others give None."""
        length = torch.tensor([len(data or b"")])
        with self._losing():
            dist.broadcast(length, 0, group=self._patient)
            shared = _as_tensor(data) if data is not None else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(shared, 0, group=self._patient)
        return shared.numpy().tobytes()

    @contextmanager
    def _losing(self) -> Iterator[None]:
        try:
            yield
        except RuntimeError as error:
            self._lost(str(error))

    def _lost(self, why: str) -> NoReturn:
        late = "imed out" in why
        what = f"did not answer for {self._timeout:g} s (train.timeout)" if late else "ended"
        raise NoAnswerError(
            f"another rank {what}: see its own lines above or below; the last checkpoint stands, --resume goes on"
        )


@contextmanager
def join_ranks(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """This process among those that torchrun started with it; on its own otherwise. Raises ResourceError."""
    if torchrun.world_size() == 1:
        yield Ranks()
        return
    try:
        store, rank, size = _meeting(timedelta(seconds=timeout))
        backend = "cpu:gloo,cuda:nccl" if has_gpu_of_its_own(store, rank, size, device) else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        ranks = RankGroup(timeout)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(f"the ranks cannot find each other ({first_line(error)})") from None
    yield ranks
    dist.destroy_process_group()  # not after an error: it would wait for ranks that are gone


def _meeting(timeout: timedelta) -> tuple[Any, int, int]:
    """Where the ranks find each other, and which of how many this one is.

    torchrun on one host keeps its store when it starts ranks again: what an earlier attempt wrote there is set apart,
    or a rank would wait for a process that is gone (torch 2.5 to 2.14). Between hosts attempts are counted by each on
    its own, and `--rdzv-backend c10d` gives a new store.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if torchrun.is_single_host():
        store = dist.PrefixStore(f"attempt-{torchrun.restart_count()}", store)  # type: ignore[attr-defined]
    return store, rank, size


def has_gpu_of_its_own(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Return whether every rank has a GPU of its own, as NCCL wants it; say so where ranks share one.

    Raises ConfigError where only some of the ranks are on GPUs.
    """
    on_gpu = device.type == "cuda"
    store.set(f"device-{rank}", str(torch.cuda.get_device_properties(device).uuid) if on_gpu else device.type)
    names = [store.get(f"device-{other}").decode() for other in range(size)]
    if 0 < names.count("cpu") < size:
        raise ConfigError(f"{names.count('cpu')} of {size} ranks are on processors, the others on GPUs: give --device")
    if on_gpu and len(set(names)) < size:
        say("ranks share a GPU: they exchange by gloo, which is slow")
    return on_gpu and len(set(names)) == size


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """The tensors in order, of one type and about _BUCKET_BYTES at a time."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        full = sum(each.numel() * each.element_size() for each in bucket) >= _BUCKET_BYTES
        if bucket and (full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
