"""Damages to the files of a run that keep every hash correct, and a helper that runs a command on a damaged copy.

A test and a benchmark use them on copies of a finished and an unfinished run.
"""

from __future__ import annotations

import hashlib
import io
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import redirect_stderr, redirect_stdout
from pathlib import Path
from typing import Any

import safetensors.torch
import torch

from cnnrun.commands import app
from cnnrun.experiment import config_file
from cnnrun.results import calibrate
from cnnrun.results.studies.train_run import train_run
from tests.support.configs import TINY

CPU = torch.device("cpu")
Damage = Callable[[Path], None]
VALUES: tuple[Any, ...] = (None, -1, 0, 2.5, "x", "²³", [], {}, [[]], float("nan"), 10**30, True)
CONTENTS = {
    "empty": b"",
    "null": b"null",
    "a list": b"[]",
    "an object": b"{}",
    "a number": b"7",
    "bytes": bytes(range(256)),
    "deep": b"[" * 100_000,
    "half": None,
    "large": b" " * (5 << 20),
}
JSON_FILES = ("facts.json", "environment.json", "result.json", "weights.json", "calibration.json", "plan.json")
OTHER_FILES = ("config.yaml", "metrics.jsonl", "data.tsv.gz")


def newest_checkpoint(run: Path) -> Path:
    """The checkpoint that `latest` names."""
    return run / "checkpoints" / (run / "checkpoints" / "latest").read_text()


def reseal(generation: Path) -> None:
    """Give a changed checkpoint a manifest with the right sizes and hashes."""
    path = generation / "manifest.json"
    manifest = json.loads(path.read_text())
    for name, entry in list(manifest["files"].items()):
        if not (generation / name).exists():
            del manifest["files"][name]
            continue
        data = (generation / name).read_bytes()
        entry |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
        if "tensors" in entry:
            entry["tensors"] = len(safetensors.torch.load(data))
    path.write_text(json.dumps(manifest, indent=1))


def changed_values(data: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[str, Any]]:
    """Yield a description and the data with one entry removed, replaced or added."""
    keys = data.keys() if isinstance(data, dict) else range(min(2, len(data)))
    for key in keys:
        shown = ".".join(map(str, (*path, key)))
        without = [each for i, each in enumerate(data) if i != key] if isinstance(data, list) else {**data}
        if isinstance(data, dict):
            del without[key]
        yield f"{shown} left out", without
        for value in VALUES:
            if value != data[key] or type(value) is not type(data[key]):
                yield f"{shown} is {value!r}"[:60], _with_entry(data, key, value)
        if isinstance(data[key], dict | list):
            for what, inner in changed_values(data[key], (*path, key)):
                yield what, _with_entry(data, key, inner)
    if isinstance(data, dict):
        yield f"{'.'.join(map(str, path))} has a key more", {**data, "unknown": 1}


def _with_entry(data: Any, key: Any, value: Any) -> Any:
    made = dict(data) if isinstance(data, dict) else list(data)
    made[key] = value
    return made


def file_damages(run: Path) -> Iterator[tuple[str, Damage]]:
    """Damages to the files beside the checkpoints: other contents and other values."""
    for name in (*JSON_FILES, *OTHER_FILES):
        for what, content in CONTENTS.items():
            yield f"{name}: {what}", lambda run, name=name, content=content: _put(run / name, content)
        if name in JSON_FILES and (run / name).exists():
            for what, data in changed_values(json.loads((run / name).read_text())):
                text = json.dumps(data).encode()
                yield f"{name}: {what}", lambda run, name=name, text=text: _put(run / name, text)
    for name in (*JSON_FILES, "metrics.jsonl", "data.tsv.gz"):
        yield f"{name}: gone", lambda run, name=name: (run / name).unlink(missing_ok=True)
    for line in (
        b'{"step": 1}\n',
        b'{"step": "x", "epoch": 1}\n',
        b'{"step": 1, "epoch": 1, "val/loss": []}\n',
        b"[]\n",
    ):
        yield f"metrics.jsonl: {line!r}", lambda run, line=line: _put(run / "metrics.jsonl", line)


def checkpoint_damages(run: Path) -> Iterator[tuple[str, Damage]]:
    """Damages to manifests, states, pointers, folder names and tensors. The hashes are updated."""
    generation = newest_checkpoint(run)
    for name in ("state.json", "evaluation.json", "manifest.json"):
        if not (generation / name).exists():
            continue
        for what, content in CONTENTS.items():
            yield f"{name}: {what}", lambda run, name=name, content=content: _replace_and_seal(run, name, content)
        for what, data in changed_values(json.loads((generation / name).read_text())):
            text = json.dumps(data, indent=1).encode()
            yield f"{name}: {what}", lambda run, name=name, text=text: _replace_and_seal(run, name, text)
    for pointer in ("latest", "best"):
        for content in (b"", b"step-\xc2\xb2\xc2\xb3", b"step-x", b"../../..", b"step-" + b"9" * 400, b"step-99999999"):
            yield f"{pointer}: {content[:20]!r}", lambda run, p=pointer, c=content: _put(run / "checkpoints" / p, c)
    for name in ("step-²³", "step-", "step-x", "step-1", "step-" + "9" * 40):
        yield f"a folder {name}", lambda run, name=name: (run / "checkpoints" / name).mkdir()
    yield from _tensor_damages(generation)


def _tensor_damages(generation: Path) -> Iterator[tuple[str, Damage]]:
    for part in sorted(path.name for path in generation.glob("*.safetensors")):
        tensors = safetensors.torch.load_file(generation / part)
        yield f"{part}: gone", lambda run, part=part: _remove_file(run, part)
        for what, content in (("empty", b""), ("half", None), ("header", b"\xff" * 8 + b"{}")):
            yield (
                f"{part}: {what}",
                lambda run, part=part, content=content: _replace_and_seal(run, part, content, keep=True),
            )
        changes: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
            "NaN": lambda value: torch.full_like(value, float("nan")),
            "infinity": lambda value: torch.full_like(value, float("inf")),
            "another shape": lambda value: torch.zeros(*value.shape, 2),
            "one number": lambda value: torch.zeros(1),
            "complex": lambda value: torch.zeros(value.shape, dtype=torch.complex64),
            "bytes": lambda value: torch.zeros(value.shape, dtype=torch.uint8),
            "half": lambda value: value.half(),
            "an eighth": lambda value: value.to(torch.float8_e4m3fn),
            "whole numbers": lambda value: value.int(),
            "truths": lambda value: value > 0,
            "below zero": lambda value: torch.full_like(value, -1),
        }
        names = [name for name, value in tensors.items() if value.is_floating_point()]
        for name in {names[0], names[-1], *(name for name in names if name.endswith("running_var"))}:
            for what, change in changes.items():
                made = tensors | {name: change(tensors[name])}
                yield f"{part}: {name} {what}", _replace_tensors(part, made)
        yield f"{part}: a tensor more", _replace_tensors(part, tensors | {"unknown": torch.zeros(2)})
        yield (
            f"{part}: {names[0]} renamed",
            _replace_tensors(part, {**_without_tensor(tensors, names[0]), "other:name": tensors[names[0]]}),
        )
        yield f"{part}: {names[0]} left out", _replace_tensors(part, _without_tensor(tensors, names[0]))
        yield f"{part}: no tensor", _replace_tensors(part, {})


def _without_tensor(tensors: dict[str, torch.Tensor], name: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if key != name}


def _replace_tensors(part: str, tensors: dict[str, torch.Tensor]) -> Damage:
    return lambda run: _replace_and_seal(run, part, safetensors.torch.save(tensors), keep=True)


def _remove_file(run: Path, name: str) -> None:
    (newest_checkpoint(run) / name).unlink()
    reseal(newest_checkpoint(run))


def _replace_and_seal(run: Path, name: str, content: bytes | None, keep: bool = False) -> None:
    """Replace a file of the newest checkpoint and update its hashes. `keep` keeps the recorded number of tensors."""
    generation = newest_checkpoint(run)
    manifest = generation / "manifest.json"
    before = json.loads(manifest.read_text())
    _put(generation / name, content)
    if name == "manifest.json":
        return
    data = (generation / name).read_bytes()
    before["files"][name] |= {"bytes": len(data), "sha256": hashlib.sha256(data).hexdigest()}
    if not keep:
        before["files"][name].pop("tensors", None)
    manifest.write_text(json.dumps(before, indent=1))


def _put(path: Path, content: bytes | None) -> None:
    """Write the content, or only the first half of the present content if it is None."""
    if content is None:
        content = path.read_bytes()[: path.stat().st_size // 2] if path.exists() else b""
    path.write_bytes(content)


def links_and_pipes(run: Path, outside: Path) -> Iterator[tuple[str, Damage]]:
    """Damages that replace entries of a run with links to the outside or with pipes."""
    names = (
        *(
            "report.html",
            ".report.html.tmp",
            "calibration.json",
            ".calibration.json.tmp",
            "result.json",
            "metrics.jsonl",
        ),
        *("lock", "environment.json", "config.yaml", "facts.json", "plan.json", "exports", "explain", "checkpoints"),
        *("checkpoints/latest", "checkpoints/best", "exports/model.onnx", "exports/parity.json", "explain/x.png"),
        f"checkpoints/{newest_checkpoint(run).name}/state.json",
        f"checkpoints/{newest_checkpoint(run).name}/model.safetensors",
        f"checkpoints/{newest_checkpoint(run).name}",
        "checkpoints/step-00000099.tmp",
    )
    for name in names:
        yield f"{name} a link", lambda run, name=name: _move_outside(run / name, outside)
    for name in ("lock", "result.json", "calibration.json", "metrics.jsonl", "exports/parity.json"):
        yield f"{name} a pipe", lambda run, name=name: _pipe(run / name)


def _move_outside(path: Path, outside: Path) -> None:
    """Move an entry outside the run and leave a link to it."""
    path.parent.mkdir(exist_ok=True)
    target = outside / path.name.strip(".")
    if path.exists():
        path.rename(target)
    elif path.name in ("exports", "explain", "step-00000099.tmp"):
        target.mkdir()
    else:
        target.write_text("{}")
    path.symlink_to(target)


def _pipe(path: Path) -> None:
    path.parent.mkdir(exist_ok=True)
    path.unlink(missing_ok=True)
    os.mkfifo(path)


def runs_of_each_state(root: Path) -> tuple[Path, Path, Path]:
    """A config, a finished run of it, and the same run as if its training had been killed just before it finished."""
    config = root / "tiny.yaml"
    config.write_text(TINY.replace("epochs: 2", "epochs: 3, save_every: 5, ema: {decay: 0.9}"))
    finished = Path(train_run(config_file.read_config(config), root / "runs", CPU, resume=False)["run"])
    # What is damaged is the newest checkpoint: it shall be the one that is evaluated.
    (finished / "checkpoints" / "best").write_text((finished / "checkpoints" / "latest").read_text())
    calibrate.calibrate_run(finished, root / "runs", CPU)
    killed = root / "killed" / "tiny" / "1"
    shutil.copytree(finished, killed)
    (killed / "result.json").unlink()
    return config, finished, killed


def run_on_damaged_copy(source: Path, damage: Damage, words: Sequence[str]) -> tuple[int, str]:
    """Run a command on a damaged copy of the run and return its exit code and stderr."""
    with tempfile.TemporaryDirectory() as name:
        copy = Path(name) / "runs" / "tiny" / "1"
        shutil.copytree(source, copy)
        damage(copy)
        run = [] if words[0] == "train" else [str(copy)]
        before, sys.argv = sys.argv, ["cnnrun", *words, *run, "--runs", str(Path(name) / "runs")]
        error = io.StringIO()
        try:
            with redirect_stdout(io.StringIO()), redirect_stderr(error):
                app.main()
        except SystemExit as left:
            return int(left.code or 0), error.getvalue()
        finally:
            sys.argv = before
    return 0, error.getvalue()
