"""Read a PyTorch state dict (.pth, .pt) of unknown origin in a separate, guarded process.

A pickle is a program. `weights_only` runs a small part of it, yet it has had security holes, and a small file can ask
for any amount of memory. Therefore the zip's table of contents is checked first. Then torch reads the file with
`weights_only`, without a fallback, in a separate process with limits on memory, time and file size. In that process an
audit hook refuses what reading never needs: sockets, processes, changes to files, foreign functions. The hook is a
second line of defence, not a sandbox. The process returns the tensors as a safetensors file.
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
_MAX_SECONDS = 120
_EXTRA_BYTES = 256 << 20
_FORBIDDEN_EVENTS = (
    *("socket.", "subprocess.", "os.exec", "os.spawn", "os.posix_spawn", "os.system", "os.fork", "os.kill", "pty."),
    *("os.remove", "os.rename", "os.link", "os.symlink", "os.mkdir", "os.rmdir", "os.truncate", "os.chmod", "os.chown"),
    *("os.putenv", "os.setxattr", "os.utime", "shutil.", "ctypes.dlopen", "ctypes.dlsym", "ctypes.call_function"),
)
_NESTED_KEYS = ("state_dict", "model")  # where training scripts nest the state dict


def read_state_dict(path: Path) -> dict[str, Tensor]:
    """Read the tensors of the state dict in `path`, in its order. Raises CheckpointError."""
    _check_file(path)
    with TemporaryDirectory(prefix="cnnrun-") as folder:
        out = Path(folder) / "tensors.safetensors"
        # -P and an empty working directory: a `torch.py` beside the file must not be imported.
        command = [sys.executable, "-P", "-m", "cnnrun.model.untrusted_pickle", str(path.resolve()), str(out)]
        settings: dict[str, Any] = {"capture_output": True, "text": True, "timeout": 2 * _MAX_SECONDS, "check": False}
        try:
            process = subprocess.run(command, cwd=folder, env=_child_environment(), **settings)  # noqa: S603
        except subprocess.TimeoutExpired:
            raise CheckpointError(f"{path}: reading it took more than {2 * _MAX_SECONDS} s; refused") from None
        if process.returncode != 0 or not out.exists():
            reason = process.stdout.strip().split("\n")[-1] or f"its reader died (code {process.returncode})"
            raise CheckpointError(f"{path}: {escape(reason)}")
        tensors = safetensors.torch.load_file(out)
    return {name.split(":", 1)[1]: tensors[name] for name in sorted(tensors)}


def _check_file(path: Path) -> None:
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode) or not 0 < status.st_size <= MAX_BYTES:
            raise CheckpointError(f"{path}: not a regular file of at most {MAX_BYTES >> 30} GiB")
        if not zipfile.is_zipfile(path):
            return  # torch's format before 2020: one pickle, then the values
        with zipfile.ZipFile(path) as archive:
            members = archive.infolist()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from None
    except (zipfile.BadZipFile, ValueError, NotImplementedError) as error:
        raise CheckpointError(f"{path}: a damaged zip archive ({error})") from None
    problem = None
    if any(member.compress_type != zipfile.ZIP_STORED for member in members):
        problem = "compressed members"
    elif len(members) > _MAX_MEMBERS or len({member.filename for member in members}) < len(members):
        problem = "too many members, or two of one name"
    elif sum(member.file_size for member in members) > status.st_size:
        problem = "members larger than the file"
    if problem:
        raise CheckpointError(f"{path}: an archive with {problem}, which torch.save never writes; refused")


def _child_environment() -> dict[str, str]:
    """This process's environment; the paths in PYTHONPATH are absolute, so they hold in another working directory."""
    paths = [str(Path(entry).resolve()) for entry in os.environ.get("PYTHONPATH", "").split(os.pathsep) if entry]
    return os.environ | ({"PYTHONPATH": os.pathsep.join(paths)} if paths else {})


class _RefusedError(Exception):
    pass


def _main(path: str, out: str) -> None:
    """Unpickle within limits and write safetensors, in the guarded process; print the reason of a failure last."""
    import torch

    try:
        _set_limits(2 * Path(path).stat().st_size + _EXTRA_BYTES)
        sys.addaudithook(_build_audit_hook(out))
        # Explicit, because an environment variable can turn the default off, but not this.
        loaded = torch.load(path, map_location="cpu", weights_only=True)
        state = _extract_state_dict(loaded, Path(path).stat().st_size)
        # safetensors does not keep the order, so the names begin with their position.
        numbered = {
            f"{position:06d}:{name}": value.detach().clone(memory_format=torch.contiguous_format)
            for position, (name, value) in enumerate(state.items())
        }
        safetensors.torch.save_file(numbered, out)
    except _RefusedError as error:
        _exit_with(str(error))
    except Exception as error:  # any failure that a hostile file causes becomes one line
        _exit_with(_describe_error(error))


def _describe_error(error: Exception) -> str:
    """Reason that torch could not read the file, without torch's advice to read it unsafely."""
    text = str(error)
    if isinstance(error, MemoryError) or "allocate memory" in text:
        return "not a state dict: asks for more memory than its size explains; refused"
    if match := re.search(r"(?:GLOBAL|global|class|function) ([\w.]+\.[\w.]+)", text):
        return f"not a state dict: it holds {match[1]}, which is not a tensor; save the state_dict() alone"
    if isinstance(error, pickle.UnpicklingError):
        return "not a state dict: it holds more than names and tensors"
    return f"not a state dict that can be read: {text.strip().splitlines()[0][:200] if text.strip() else repr(error)}"


def _exit_with(reason: str) -> None:
    print(reason.replace("\n", " "))  # noqa: T201
    sys.exit(3)


def _set_limits(extra_bytes: int) -> None:
    """Limit this process's CPU time, its files' size and, on Linux, its memory to `extra_bytes` more than now."""
    import resource

    resource.setrlimit(resource.RLIMIT_CPU, (_MAX_SECONDS, _MAX_SECONDS))
    resource.setrlimit(resource.RLIMIT_FSIZE, (extra_bytes, extra_bytes))
    if sys.platform == "linux":  # elsewhere the limit is ignored, or counts other things
        pages = int(Path("/proc/self/statm").read_text().split()[0])
        max_bytes = pages * os.sysconf("SC_PAGE_SIZE") + extra_bytes
        resource.setrlimit(resource.RLIMIT_AS, (max_bytes, max_bytes))


def _build_audit_hook(out: str) -> Any:
    """Return an audit hook that refuses what reading a file never needs."""
    write_flags = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        if event.startswith(_FORBIDDEN_EVENTS):
            raise _RefusedError(f"tried {event}; refused")
        if event == "open" and isinstance(arguments[2], int) and arguments[2] & write_flags and arguments[0] != out:
            raise _RefusedError("tried to write a file; refused")

    return hook


def _extract_state_dict(loaded: Any, file_bytes: int) -> dict[str, Tensor]:
    """Find the state dict in the loaded object. Raises _RefusedError unless it holds only plain, finite tensors."""
    for key in _NESTED_KEYS:
        if isinstance(loaded, dict) and isinstance(loaded.get(key), dict):
            loaded = loaded[key]
    if not isinstance(loaded, dict) or not loaded:
        raise _RefusedError("not a state dict (names and tensors)")
    for name, value in loaded.items():
        if not isinstance(name, str) or not isinstance(value, Tensor) or not _is_plain(value):
            raise _RefusedError(f"not a state dict: {str(name)[:60]!r} is {type(value).__name__}, not a plain tensor")
    # Tied tensors (one storage, one shape) count once.
    unique = {(value.data_ptr(), value.shape, value.stride()): value for value in loaded.values()}
    tensor_bytes = sum(value.numel() * value.element_size() for value in unique.values())
    if tensor_bytes > file_bytes:
        raise _RefusedError(f"{file_bytes:,} bytes that would become {tensor_bytes:,}; refused")
    non_finite = next((name for name, value in loaded.items() if not value.isfinite().all()), None)
    if non_finite is not None:
        raise _RefusedError(f"{non_finite} is not finite")
    return loaded


def _is_plain(value: Tensor) -> bool:
    return value.device.type == "cpu" and not (value.is_sparse or value.is_quantized or value.is_complex())


if __name__ == "__main__":
    _main(sys.argv[1], sys.argv[2])
