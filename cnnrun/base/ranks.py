"""Communication between the processes that train together under torchrun, and errors when one of them is lost.

All ranks have the same weights, statistics and counters after each step; only rank 0 writes files. Ranks exchange
tensors and JSON, never pickles.
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
from cnnrun.base.device import is_out_of_memory
from cnnrun.base.errors import ConfigError, NoAnswerError, OtherRankError, ResourceError, first_line
from cnnrun.base.progress import say

_BUCKET_BYTES = 32 << 20  # size of gradients that are summed in one exchange
_LONG_TIMEOUT = timedelta(days=1)  # decoding a data set may take hours on one host and no time on another


class Ranks:
    """Communication of a single process, which has no other ranks."""

    rank, world_size = 0, 1

    @property
    def is_first(self) -> bool:
        """True for rank 0, which alone writes files."""
        return self.rank == 0

    def barrier(self, *, long_timeout: bool = False) -> None:
        """Wait until every rank is here; with `long_timeout` for up to a day."""

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        """Maximum of each number over all ranks."""
        return list(numbers)

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        """Replace each tensor by its sum over all ranks, bit for bit the same on every rank."""

    def all_gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        """Every rank's tensors in the order of the ranks; those from other ranks are on the CPU."""
        return [tensors]

    def broadcast(self, compute: Callable[[], Any]) -> Any:
        """Run `compute` on rank 0 alone and return its JSON data on every rank; if it fails, every rank ends."""
        return compute()

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        """Rank 0's tensors on every rank, on the CPU; other ranks pass None."""
        assert tensors is not None
        return tensors


class RankGroup(Ranks):
    """Communication of one of several processes.

    If a rank ends, or does not answer for `timeout` seconds, the others raise NoAnswerError.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.world_size = dist.get_rank(), dist.get_world_size()
        self._timeout = timeout
        self._long_timeout_group: Any = dist.new_group(backend="gloo", timeout=_LONG_TIMEOUT)

    def barrier(self, *, long_timeout: bool = False) -> None:
        with self._convert_errors(long_timeout=long_timeout):
            # A tensor on the CPU, so that no GPU has to finish its work first.
            dist.all_reduce(torch.zeros(1), group=self._long_timeout_group if long_timeout else None)

    def all_reduce_max(self, numbers: Sequence[int]) -> list[int]:
        shared = torch.tensor(numbers, dtype=torch.int64)
        with self._convert_errors():
            dist.all_reduce(shared, op=dist.ReduceOp.MAX)
        return [int(number) for number in shared]

    def all_reduce_sum(self, tensors: Sequence[Tensor]) -> None:
        for bucket in _buckets(tensors):
            flat = torch.cat([tensor.reshape(-1) for tensor in bucket])
            with self._convert_errors():
                dist.all_reduce(flat)
            pieces = flat.split([tensor.numel() for tensor in bucket])
            for tensor, piece in zip(bucket, pieces, strict=True):
                tensor.copy_(piece.view(tensor.shape))

    def all_gather(self, tensors: dict[str, Tensor]) -> list[dict[str, Tensor]]:
        on_host = {name: value.detach().cpu().contiguous() for name, value in tensors.items()}
        own_bytes = _as_tensor(safetensors.torch.save(on_host))
        lengths = [torch.zeros(1, dtype=torch.int64) for _ in range(self.world_size)]
        with self._convert_errors():
            dist.all_gather(lengths, torch.tensor([len(own_bytes)]))
        max_length = max(int(length) for length in lengths)
        padded = torch.cat([own_bytes, own_bytes.new_zeros(max_length - len(own_bytes))])
        parts = [torch.empty_like(padded) for _ in range(self.world_size)]
        with self._convert_errors():
            dist.all_gather(parts, padded)
        return [
            safetensors.torch.load(part[: int(length)].numpy().tobytes())
            for part, length in zip(parts, lengths, strict=True)
        ]

    def broadcast(self, compute: Callable[[], Any]) -> Any:
        if not self.is_first:
            message = json.loads(self._broadcast_bytes(None))
            if "failed" in message:
                raise OtherRankError
            return message["result"]
        try:
            result = compute()
            data = json.dumps({"result": result}).encode()
        except BaseException:  # after any error, the other ranks must not wait for a result
            with suppress(NoAnswerError):
                self._broadcast_bytes(b'{"failed": true}')
            raise
        self._broadcast_bytes(data)
        return result

    def broadcast_tensors(self, tensors: dict[str, Tensor] | None) -> dict[str, Tensor]:
        data = safetensors.torch.save(tensors) if tensors is not None else None
        return safetensors.torch.load(self._broadcast_bytes(data))

    def _broadcast_bytes(self, data: bytes | None) -> bytes:
        """Rank 0's bytes on every rank; other ranks pass None."""
        length = torch.tensor([len(data or b"")])
        with self._convert_errors(long_timeout=True):
            dist.broadcast(length, 0, group=self._long_timeout_group)
            shared = _as_tensor(data) if data is not None else torch.empty(int(length), dtype=torch.uint8)
            dist.broadcast(shared, 0, group=self._long_timeout_group)
        return shared.numpy().tobytes()

    @contextmanager
    def _convert_errors(self, *, long_timeout: bool = False) -> Iterator[None]:
        """Turn an error of an exchange into NoAnswerError. Put nothing but exchanges inside: gloo has no error type."""
        try:
            yield
        except RuntimeError as error:
            if is_out_of_memory(error):
                raise
            self._raise_no_answer(error, "1 day" if long_timeout else f"{self._timeout:g} s (train.timeout)")

    def _raise_no_answer(self, error: RuntimeError, timeout: str) -> NoReturn:
        is_timeout = "imed out" in str(error)
        event = f"did not answer for {timeout}" if is_timeout else f"ended ({first_line(error)})"
        raise NoAnswerError(
            f"another rank {event}: see its messages above or below; --resume continues from the last checkpoint"
        )


@contextmanager
def join_ranks(device: torch.device, timeout: float) -> Iterator[Ranks]:
    """Connect this process to the other ranks that torchrun started; without torchrun it is alone.

    Raises ResourceError if the ranks cannot connect.
    """
    if torchrun.world_size() == 1:
        yield Ranks()
        return
    try:
        store, rank, size = _open_store(timedelta(seconds=timeout))
        backend = "cpu:gloo,cuda:nccl" if has_gpu_of_its_own(store, rank, size, device) else "gloo"
        dist.init_process_group(backend, store=store, rank=rank, world_size=size, timeout=timedelta(seconds=timeout))
        ranks = RankGroup(timeout)
    except (RuntimeError, ValueError) as error:
        raise ResourceError(f"the ranks cannot find each other ({first_line(error)})") from None
    yield ranks
    dist.destroy_process_group()  # not after an error: it would wait for ranks that have ended


def _open_store(timeout: timedelta) -> tuple[Any, int, int]:
    """Return the store through which the ranks connect, this process's rank, and the world size.

    On one host torchrun keeps its store when it restarts the ranks. Each attempt gets its own prefix there, or a rank
    would wait for a process that has ended (torch 2.5 to 2.14). With several hosts each counts attempts on its own,
    and `--rdzv-backend c10d` gives a new store.
    """
    store, rank, size = next(rendezvous("env://", timeout=timeout))
    if torchrun.is_single_host():
        store = dist.PrefixStore(f"attempt-{torchrun.restart_count()}", store)  # type: ignore[attr-defined]
    return store, rank, size


def has_gpu_of_its_own(store: Any, rank: int, size: int, device: torch.device) -> bool:
    """Return whether every rank has its own GPU, as NCCL requires; print a note if ranks share one.

    Raises ConfigError if only some ranks are on GPUs.
    """
    on_gpu = device.type == "cuda"
    store.set(f"device-{rank}", str(torch.cuda.get_device_properties(device).uuid) if on_gpu else device.type)
    names = [store.get(f"device-{any_rank}").decode() for any_rank in range(size)]
    if 0 < names.count("cpu") < size:
        raise ConfigError(f"{names.count('cpu')} of {size} ranks are on CPUs, the others on GPUs: give --device")
    if on_gpu and len(set(names)) < size:
        say("ranks share a GPU: they communicate by gloo, which is slow")
    return on_gpu and len(set(names)) == size


def _buckets(tensors: Sequence[Tensor]) -> Iterator[list[Tensor]]:
    """Split tensors, in order, into groups of one dtype and about _BUCKET_BYTES."""
    bucket: list[Tensor] = []
    for tensor in tensors:
        is_full = sum(member.numel() * member.element_size() for member in bucket) >= _BUCKET_BYTES
        if bucket and (is_full or tensor.dtype != bucket[0].dtype):
            yield bucket
            bucket = []
        bucket.append(tensor)
    if bucket:
        yield bucket


def _as_tensor(data: bytes) -> Tensor:
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)
