"""A pretended GPU, with which CUDA tests are rehearsed on machines without one.

Its tensors are host tensors with a mark on their storage. Their `Tensor.device` is "cuda:0". An operation that mixes
them with host tensors raises the error of CUDA, `.numpy()` refuses them, and synchronizing operations raise under
`torch.cuda.set_sync_debug_mode`. The numerics, kernels, streams and memory of a real GPU are not imitated.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from typing import Any

import pytest
import torch
import torch._dynamo  # what modes import when they are first used; it must not meet the pretended `torch.cuda`
from torch import Tensor
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cnnrun.base.device import choose_device

REHEARSAL = "CNNRUN_CUDA_REHEARSAL"

_MARK = "_on_pretended_gpu"
_GPU, _HOST = torch.device("cuda", 0), torch.device("cpu")
_MEMORY = 8 << 30  # bytes that it reports

_GROUP = torch._C._group_tensors_by_device_and_dtype
_aten = torch.ops.aten
_ACROSS = {_aten.copy_, _aten.set_}  # operations that may take tensors of both sides, and give the first
_INDEXING = {_aten.index, _aten.index_put_, _aten.index_put, _aten._index_put_impl_}  # a GPU's tensor by the host's
_WAITING = {  # what the host cannot go on without
    *(_aten._local_scalar_dense, _aten.nonzero, _aten.masked_select, _aten.equal, _aten._linalg_check_errors),
    *(_aten._unique2, _aten.unique_dim, _aten.unique_consecutive),
}


def is_on_gpu(tensor: Tensor) -> bool:
    """Return whether a tensor is pretended to be on the GPU."""
    return getattr(tensor.untyped_storage(), _MARK, False)


def _put(found: Any, on_gpu: bool) -> Any:
    for tensor in _tensors(found):
        setattr(tensor.untyped_storage(), _MARK, on_gpu)
    return found


def _tensors(values: Any) -> Iterator[Tensor]:
    if isinstance(values, Tensor):
        yield values
    elif isinstance(values, list | tuple):
        for value in values:
            yield from _tensors(value)
    elif isinstance(values, dict):
        yield from _tensors(list(values.values()))


class _State:
    """Settings of the pretended GPU, and whether a call on its tensors is in progress."""

    def __init__(self) -> None:
        self.in_call = False
        self.waiting_raises = False
        self.largest = _MEMORY

    def wait(self, what: object) -> None:
        """Raise if synchronization is forbidden, because the host waits for the GPU here."""
        if self.waiting_raises:
            raise RuntimeError(f"called a synchronizing CUDA operation ({what})")


class _Operations(TorchDispatchMode):
    """Mark the results of operations on GPU tensors, including backward passes and operations of other libraries."""

    def __init__(self, state: _State) -> None:
        super().__init__()
        self._state = state

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        tensors = list(_tensors([args, kwargs]))
        ours = [is_on_gpu(tensor) for tensor in tensors]
        if not any(ours):
            found = func(*args, **kwargs)
            # What a call on the GPU's tensors makes for itself, as `one_hot` does, is on the GPU as well.
            return found if tensors else _put(found, self._state.in_call)
        packet = func.overloadpacket
        self._refuse_mixing(packet, tensors, ours)
        if packet in _WAITING or (packet in _INDEXING and _by_mask(args[1])):
            self._state.wait(func)
        found = func(*args, **kwargs)
        if packet not in _ACROSS:
            for tensor in _tensors(found):
                if tensor.untyped_storage().nbytes() > self._state.largest:
                    raise torch.OutOfMemoryError("CUDA out of memory (pretended)")
            _put(found, True)
        return found

    def _refuse_mixing(self, packet: Any, tensors: list[Tensor], ours: list[bool]) -> None:
        if packet in _INDEXING and ours[0]:  # the last is the values, where some are put
            values = [(tensors[-1], ours[-1])] if packet is not _aten.index else []
            tensors, ours = [tensors[0], *(each for each, _ in values)], [True, *(own for _, own in values)]
        if packet in _ACROSS:
            return
        if any(tensor.dim() and not own for tensor, own in zip(tensors, ours, strict=True)):
            raise RuntimeError(f"Expected all tensors to be on the same device, but {packet} got cuda:0 and cpu")


def _by_mask(indices: Any) -> bool:
    return any(tensor.dtype in (torch.bool, torch.uint8) for tensor in _tensors(indices))


class _Calls(TorchFunctionMode):
    """Replace what Python sees of devices: `device`, `to`, `cpu`, `numpy` and every `device=` argument."""

    def __init__(self, state: _State) -> None:
        super().__init__()
        self._state = state
        self._own = {
            Tensor.device.__get__: lambda tensor: _GPU if is_on_gpu(tensor) else tensor.device,
            Tensor.is_cuda.__get__: is_on_gpu,
            Tensor.to: self._to,
            Tensor.cpu: lambda tensor, **kwargs: self._moved(tensor, _HOST, False),
            Tensor.cuda: lambda tensor, *args, **kwargs: self._moved(tensor, _GPU, kwargs.get("non_blocking", False)),
            Tensor.numpy: self._numpy,
            Tensor.__array__: self._array,
            Tensor.copy_: self._copy,
            Tensor.tolist: self._tolist,
            torch.nn.functional.one_hot: self._one_hot,
            Tensor.__deepcopy__: lambda tensor, memo: _put(Tensor.__deepcopy__(tensor, memo), is_on_gpu(tensor)),
        }

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        own = self._own.get(func)
        if own is not None:
            return own(*args, **kwargs)
        kwargs.pop("pin_memory", None)
        if func is torch.device or kwargs.get("device") is None:
            return self._called(func, args, kwargs)
        on_gpu = torch.device(kwargs["device"]).type == "cuda"
        if on_gpu and func in (torch.tensor, torch.as_tensor):
            self._state.wait(func)
        return _put(func(*args, **{**kwargs, "device": _HOST if on_gpu else kwargs["device"]}), on_gpu)

    def _called(self, func: Any, args: Any, kwargs: Any) -> Any:
        self._state.in_call = any(is_on_gpu(tensor) for tensor in _tensors([args, kwargs]))
        try:
            return func(*args, **kwargs)
        finally:
            self._state.in_call = False

    def _to(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        rest, target = [], kwargs.pop("device", None)
        other = kwargs.pop("other", None)
        for value in args:
            if isinstance(value, str | torch.device | int) and not isinstance(value, bool) and target is None:
                target = value
            elif isinstance(value, Tensor):
                other = value
            else:
                rest.append(value)
        if other is not None:
            target, rest = (_GPU if is_on_gpu(other) else _HOST), [other.dtype, *rest]
        booleans = [value for value in rest if isinstance(value, bool)]  # non_blocking, copy
        dtypes = [value for value in rest if isinstance(value, torch.dtype)]
        non_blocking = kwargs.pop("non_blocking", booleans[0] if booleans else False)
        copy = kwargs.pop("copy", booleans[1] if len(booleans) > 1 else False)
        moved = tensor if target is None else self._moved(tensor, torch.device(target), non_blocking)
        if not dtypes and "dtype" not in kwargs and "memory_format" not in kwargs:
            return moved.clone() if copy and moved is tensor else moved
        return moved.to(kwargs.pop("dtype", dtypes[0] if dtypes else moved.dtype), copy=copy, **kwargs)

    def _moved(self, tensor: Tensor, target: torch.device, non_blocking: bool) -> Tensor:
        on_gpu = target.type == "cuda"
        if on_gpu and target.index:
            raise RuntimeError("CUDA error: invalid device ordinal")
        if on_gpu == is_on_gpu(tensor):
            return tensor
        if not non_blocking:
            self._state.wait("a copy")
        return _put(tensor.clone(), on_gpu)

    def _numpy(self, tensor: Tensor, **kwargs: Any) -> Any:
        self._refuse_numpy(tensor)
        return tensor.numpy(**kwargs)

    def _array(self, tensor: Tensor, *args: Any, **kwargs: Any) -> Any:
        self._refuse_numpy(tensor)
        return tensor.__array__(*args, **kwargs)

    def _refuse_numpy(self, tensor: Tensor) -> None:
        if is_on_gpu(tensor):
            raise TypeError("can't convert cuda:0 device type tensor to numpy. Use Tensor.cpu()")

    def _copy(self, tensor: Tensor, source: Tensor, non_blocking: bool = False) -> Tensor:
        if is_on_gpu(tensor) != is_on_gpu(source) and not non_blocking:
            self._state.wait("copy_")
        return tensor.copy_(source)

    def _tolist(self, tensor: Tensor) -> Any:
        if is_on_gpu(tensor):
            self._state.wait("tolist")
        return tensor.tolist()

    def _one_hot(self, tensor: Tensor, num_classes: int = -1) -> Tensor:
        """The host reads the values. A GPU reads them only if the number of classes is not given."""
        if is_on_gpu(tensor) and num_classes == -1:
            self._state.wait("one_hot")
        raises, self._state.waiting_raises = self._state.waiting_raises, False
        try:
            return self._called(torch.nn.functional.one_hot, (tensor, num_classes), {})
        finally:
            self._state.waiting_raises = raises


class _Event:
    def record(self, stream: object = None) -> None:
        pass

    def synchronize(self) -> None:
        pass


class _Stream:
    def is_capturing(self) -> bool:
        return False


class _Autocast(torch.autocast):
    def __init__(self, device_type: str, *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


class _Scaler(torch.amp.GradScaler):
    def __init__(self, device: str = "cuda", *args: Any, **kwargs: Any) -> None:
        super().__init__("cpu", *args, **kwargs)


def _of_cuda(state: _State) -> dict[str, Any]:
    """Replacements for attributes of `torch.cuda`."""

    def allow_waiting(mode: int | str) -> None:
        state.waiting_raises = mode in (2, "error")

    def allow_memory(fraction: float, device: object = None) -> None:
        state.largest = int(fraction * _MEMORY)

    return {
        "is_available": lambda: True,
        "is_initialized": lambda: True,
        "is_current_stream_capturing": lambda: False,
        "device_count": lambda: 1,
        "current_device": lambda: 0,
        "is_bf16_supported": lambda including_emulation=True: True,
        "get_device_name": lambda device=None: "a pretended GPU",
        "get_device_capability": lambda device=None: (9, 0),
        "mem_get_info": lambda device=None: (_MEMORY, _MEMORY),
        "max_memory_allocated": lambda device=None: 1 << 20,
        "memory_allocated": lambda device=None: 0,
        "memory_reserved": lambda device=None: 0,
        "default_generators": (torch.default_generator,),
        "Event": _Event,
        "set_sync_debug_mode": allow_waiting,
        "set_per_process_memory_fraction": allow_memory,
        **{
            name: _nothing()
            for name in ("set_device", "empty_cache", "synchronize", "reset_peak_memory_stats", "_sleep")
        },
    }


def _grouped(tensors: Any, with_indices: bool = False) -> dict[Any, Any]:
    """Group tensors as PyTorch's optimizers do, by their pretended devices."""
    found = _GROUP(tensors, with_indices)
    return {(_GPU if is_on_gpu(of[0][0][0]) else device, dtype): of for (device, dtype), of in found.items()}


def _nothing() -> Any:
    return lambda *args, **kwargs: None


@contextmanager
def pretended_gpu() -> Iterator[torch.device]:
    """Pretend a `cuda` device for this thread inside the context."""
    state = _State()
    with pytest.MonkeyPatch.context() as patched, ExitStack() as modes:
        for name, value in _of_cuda(state).items():
            patched.setattr(torch.cuda, name, value)
        patched.setattr(torch.accelerator, "current_stream", lambda device=None: _Stream())
        patched.setattr(torch._C, "_group_tensors_by_device_and_dtype", _grouped)
        patched.setattr(torch, "autocast", _Autocast)
        patched.setattr(torch.amp, "GradScaler", _Scaler)
        patched.setattr(Tensor, "pin_memory", lambda tensor, device=None: tensor.clone())  # other threads call it too
        modes.enter_context(_Operations(state))
        modes.enter_context(_Calls(state))
        yield torch.device("cuda")


@contextmanager
def some_gpu() -> Iterator[torch.device]:
    """A real GPU, or a pretended one if there is none and CNNRUN_CUDA_REHEARSAL=1. Otherwise the test is skipped."""
    if torch.cuda.is_available():
        yield choose_device("cuda")
    elif os.environ.get(REHEARSAL) == "1":
        with pretended_gpu():
            yield choose_device("cuda")
    else:
        pytest.skip(f"needs a CUDA device; {REHEARSAL}=1 rehearses it on a pretended one")
