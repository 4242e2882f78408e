"""A PyTorch state dict (.pth, .pt) of unknown origin, read in a guarded process of its own.

Pickle is a program. `weights_only` runs a small part of it, yet had holes, and a small file may ask for any amount of
memory. So: the zip's table is checked first; torch reads with `weights_only`, without any fallback, in a process of its
own with limits on memory, time and file size; and there an audit hook refuses what reading never needs: sockets,
processes, changes of files, foreign functions. The hook is a second lock, not a sandbox. Back come safetensors.
"""

from __future__ import annotations

import os
import pickle
import re
import stat
import subprocess
import sys
import zipfile
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import safetensors.torch
from torch import Tensor

from cnnrun.base.errors import CheckpointError, escape

MAX_BYTES = 8 << 30
_MAX_MEMBERS = 20_000
_SECONDS = 120
_SPARE_BYTES = 256 << 20
_FORBIDDEN = (
    *("socket.", "subprocess.", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.fork", "os.kill", "pty."),
    *("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown"),
    *("os.putenv", "os.setxattr", "os.utime", "shutil.", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function"),
)
_NESTED = ("state_dict", "model")  # where training scripts put the state dict


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """The tensors of the state dict in `path`, in its order. Raises CheckpointError."""
    _check_file(path)
    with TemporaryDirectory(prefix="cnnrun-") as folder:
        out = Path(folder) / "tensors.safetensors"
        # -P and an empty working directory: a `torch.py` that lies beside the file must not be imported.
        command = [sys.executable, "-P", "-m", "cnnrun.model.untrusted_pickle", str(path.resolve()), str(out)]
        settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 2 * _SECONDS, "check": False}
        try:
            done = subprocess.run(command, cwd=folder, env=_environment(), **settings)  # noqa: S603
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"{path}: reading it took more than {2 * _SECONDS} s; refused") from None
        if done.returncode != 0 or not out.exists():
            reason = done.stdout.strip().split("\n")[-1] or f"its reader died (code {done.returncode})"
            raise CheckpointError(f"{path}: {escape(reason)}")
        tensors = safetensors.torch.load_file(out)
    return {name.split(":", 1)[1]: tensors[name] for name in sorted(tensors)}


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= MAX_BYTES:
            raise CheckpointError(f"{path}: not a regular file of at most {MAX_BYTES >> 30} GiB")
        if not zipfile.is_zipfile(path):
            return  # torch's old format, of before 2020: one pickle, then the numbers
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: a damaged zip archive ({error})") from None
    bad = None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        bad = "compressed members"
    elif len(members) > _MAX_MEMBERS or len({member.filename for member in members}) < len(members):
        bad = "too many members, or two of one name"
    elif sum(member.file_size for member in members) > status.st_size:
        bad = "members larger than the file"
    if bad:
        raise CheckpointError(f"{path}: an archive with {bad}, as torch.save writes none; refused")


def _environment() -> dict[str, str]:
    """This process's environment; what it says of module paths holds in another working directory, too."""
    paths = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


class _Refused(Exception):
    pass


def _main(path: str, out: str) -> None:
    """In the process apart: unpickle within limits, write safetensors; the last line printed is why not."""
    import torch

    try:
        _limit(2 * Path(path).stat().st_size + _SPARE_BYTES)
        sys.addaudithook(_guard(out))
        # Said outright: the environment can turn the default off, but not this.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = _state_dict(loaded, Path(path).stat().st_size)
        # safetensors forgets the order, so the names carry it.
        numbered = {
            f"{n:06d}:{name}": value.detach().clone(memory_format=torch.contiguous_format)
            for n, (name, value) in enumerate(state.items())
        }
        safetensors.torch.save_file(numbered, out)
    except _Refused as refused:
        _leave(str(refused))
    except Exception as error:  # whatever a hostile file provokes is one line
        _leave(_reason(error))


def _reason(error: Exception) -> str:
    """Why torch did not read the file, without its advice to read it unsafely."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "not a state dict: asks for more memory than its size explains; refused"
    if found := re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", text):
        return f"not a state dict: it holds {found[1]}, which is no tensor; save the state_dict() alone"
    if isinstance(error, pickle.UnpicklingError):
        return "not a state dict: it holds more than names and tensors"
    return f"not a state dict that can be read: {text.strip().splitlines()[0][:200] if text.strip() else repr(error)}"


def _leave(reason: str) -> None:
    print(reason.replace("\n", " "))  # noqa: T201
    sys.exit(3)


def _limit(more_bytes: int) -> None:
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_SECONDS, _SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (more_bytes, more_bytes))
    if sys.platform == "linux":  # elsewhere the limit is not kept, or counts other things
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        most = pages * os.sysconf("SC_PAGE_SIZE") + more_bytes
        resource.setrlimit(resource.RLIMIT_AS, (most, most))


def _guard(out: str) -> Any:
    """An audit hook that refuses what reading a file never needs."""
    writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN):
            raise _Refused(f"tried {event}; refused")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & writing and arguments[0] != out:
            raise _Refused("tried to write a file; refused")

    return hook


def _state_dict(loaded: Any, file_bytes: int) -> dict[str, Tensor]:
    for key in _NESTED:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise _Refused("no state dict (names and tensors)")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or _odd(value):
            raise _Refused(f"no state dict: {str(name)[:60]!r} is {type(value).__name__}, not a plain tensor")
    # Tied tensors (one storage, one shape) count once.
    once = {(value.data_ptr(), value.shape, value.stride()): value for value in loaded.values()}
    expanded = sum(value.numel() * value.element_size() for value in once.values())
    if expanded > file_bytes:
        raise _Refused(f"{file_bytes:,} bytes that would become {expanded:,}; refused")
    bad = next((name for name, value in loaded.items() if not value.isfinite().all()), None)
    if bad is not None:
        raise _Refused(f"{bad} is not finite")
    return loaded


def _odd(value: Tensor) -> bool:
    return value.device.type != "cpu" or value.is_sparse or value.is_quantized or value.is_complex()


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
