"""Untrusted state dicts: valid files are read bit for bit; hostile files run no code and are refused in one line."""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from torch import nn

from cnnrun.base.errors import CheckpointError
from cnnrun.model.untrusted_pickle import read_state_dict


def save_state(tmp_path: Path, state: object, **settings: object) -> Path:
    path = tmp_path / "weights.pth"
    torch.save(state, path, **settings)
    return path


@pytest.fixture
def state():
    torch.manual_seed(0)
    return nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4)).to(memory_format=torch.channels_last).state_dict()


@pytest.mark.parametrize("settings", [{}, {"_use_new_zipfile_serialization": False}], ids=["zip", "before 2020"])
@pytest.mark.parametrize("nested", [None, "state_dict"])
@pytest.mark.usefixtures("forked_pickle_reader")
def test_a_valid_file_is_read_bit_for_bit_and_in_order(tmp_path, state, settings, nested):
    path = save_state(tmp_path, {nested: state, "epoch": 3} if nested else state, **settings)
    given = read_state_dict(path)
    assert list(given) == list(state)
    assert all(torch.equal(given[name], value) for name, value in state.items())


class Evil:
    """Writes a canary file when it is unpickled."""

    def __init__(self, canary: Path, how: str) -> None:
        self.canary, self.how = canary, how

    def __reduce__(self):
        text = f"open({str(self.canary)!r}, 'w').close()"
        return {
            "system": (os.system, (f"touch {self.canary}",)),
            "exec": (exec, (text,)),
            "eval": (eval, (text,)),
            "open": (open, (str(self.canary), "w")),
            "popen": (os.popen, (f"touch {self.canary}",)),
        }[self.how]


HOW = ["system", "exec", "eval", "open", "popen"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("how", "where"),
    [(how, "value") for how in HOW] + [("system", where) for where in ("alone", "nested", "after a sound tensor")],
)
@pytest.mark.parametrize("zipped", [True, False])
def test_code_in_a_pickle_is_not_run(tmp_path, how, where, zipped, monkeypatch):
    monkeypatch.setenv("TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD", "1")  # must not disable the protection
    evil = Evil(tmp_path / "canary", how)
    state = {
        "alone": evil,
        "value": {"weight": evil},
        "nested": {"state_dict": {"weight": torch.ones(2)}, "extra": evil},
        "after a sound tensor": OrderedDict(weight=torch.ones(2), bias=evil),
    }[where]
    path = save_state(tmp_path, state, _use_new_zipfile_serialization=zipped)
    with pytest.raises(CheckpointError) as refused:
        read_state_dict(path)
    assert not (tmp_path / "canary").exists()
    assert len(refused.value.lines) == 1
    assert "not a state dict" in refused.value.lines[0]


def rewrite_archive(path: Path, change) -> Path:
    """Write a copy of the archive with each member passed through `change(archive, name, data)`."""
    made = path.with_name("changed.pth")
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(made, "w") as new:
        for name in old.namelist():
            change(new, name, old.read(name))
    return made


def compress_members(archive, name, data):
    archive.writestr(name, data, zipfile.ZIP_DEFLATED)


@pytest.mark.filterwarnings("ignore:Duplicate name")
def duplicate_the_pickle(archive, name, data):
    archive.writestr(name, data)
    if name.endswith("data.pkl"):
        archive.writestr(name, data)


def add_many_members(archive, name, data):
    archive.writestr(name, data)
    if name.endswith("data.pkl"):
        for number in range(20_001):
            archive.writestr(f"x/{number}", b"")


@pytest.mark.filterwarnings("ignore:Duplicate name")
@pytest.mark.parametrize("change", [compress_members, duplicate_the_pickle, add_many_members])
def test_an_archive_that_torch_never_writes_is_refused_unread(tmp_path, state, change, monkeypatch):
    path = rewrite_archive(save_state(tmp_path, state), change)
    monkeypatch.setattr("cnnrun.model.untrusted_pickle.subprocess.run", lambda *a, **k: pytest.fail("was read"))
    with pytest.raises(CheckpointError, match="which torch.save never writes"):
        read_state_dict(path)


def test_a_small_file_that_would_become_large_is_refused(tmp_path):
    path = save_state(tmp_path, {"weight": torch.zeros(1).expand(1 << 30)})
    assert path.stat().st_size < 10_000
    with pytest.raises(CheckpointError, match="would become"):
        read_state_dict(path)


def test_a_claimed_size_beyond_the_file_is_refused(tmp_path):
    """The old format allocates what the pickle claims before it reads the values."""
    path = save_state(tmp_path, {"weight": torch.zeros(1000)}, _use_new_zipfile_serialization=False)
    data = path.read_bytes()
    small, large = (pickle.dumps(size, 2)[2:-1] for size in (1000, 2_000_000_000))
    assert data.count(small) >= 1
    path.write_bytes(data.replace(small, large))
    with pytest.raises(CheckpointError, match="more memory than its size explains"):
        read_state_dict(path)


@pytest.mark.parametrize(
    ("state", "why"),
    [
        ({"weight": torch.tensor([1.0, float("nan")])}, "is not finite"),
        ({"weight": 3}, "not a plain tensor"),
        ({3: torch.ones(2)}, "not a plain tensor"),
        ({"weight": torch.eye(3).to_sparse()}, "not a plain tensor"),
        ([torch.ones(2)], "not a state dict"),
        ({}, "not a state dict"),
    ],
)
@pytest.mark.usefixtures("forked_pickle_reader")
def test_a_file_that_is_not_a_state_dict_is_refused_with_the_reason(tmp_path, state, why):
    with pytest.raises(CheckpointError, match=why):
        read_state_dict(save_state(tmp_path, state))


def test_a_pickled_module_is_refused(tmp_path):
    with pytest.raises(CheckpointError, match="not a state dict"):
        read_state_dict(save_state(tmp_path, nn.Linear(2, 2)))


@pytest.mark.slow
@pytest.mark.parametrize("cut", [0, 1, 100, 1000, -40])
@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.usefixtures("forked_pickle_reader")
def test_a_truncated_file_is_refused_in_one_line(tmp_path, state, cut, zipped):
    path = save_state(tmp_path, state, _use_new_zipfile_serialization=zipped)
    path.write_bytes(path.read_bytes()[:cut])
    with pytest.raises(CheckpointError) as refused:
        read_state_dict(path)
    assert len(refused.value.lines) == 1


@pytest.mark.parametrize(
    "content", [b"hello", b"PK\x03\x04 no archive", pickle.dumps({"a": 1}), b"\x80\x02" + b"(" * 5000]
)
@pytest.mark.usefixtures("forked_pickle_reader")
def test_other_files_are_refused_in_one_line(tmp_path, content):
    path = tmp_path / "x.pth"
    path.write_bytes(content)
    with pytest.raises(CheckpointError) as refused:
        read_state_dict(path)
    assert len(refused.value.lines) == 1


def test_folders_missing_files_and_pipes_are_refused(tmp_path):
    os.mkfifo(tmp_path / "pipe.pth")
    for path in (tmp_path, tmp_path / "none.pth", tmp_path / "pipe.pth"):
        with pytest.raises(CheckpointError):
            read_state_dict(path)


FORBIDDEN = """
open('canary', 'w')
socket.create_connection(('127.0.0.1', 9))
subprocess.run(['true'])
os.system('true')
os.remove('x')
os.rename('x', 'y')
os.mkdir('y')
os.truncate('x', 0)
os.symlink('x', 'y')
os.chmod('x', 0)
os.kill(os.getpid(), 0)
ctypes.CDLL(None)
"""


def test_the_reader_may_neither_write_nor_connect_nor_start_processes(tmp_path):
    """The audit hook itself, without torch's checks; reading and writing its own output file stay allowed."""
    import subprocess
    import sys

    code = f"""
import ctypes, os, socket, subprocess, sys
from cnnrun.model.untrusted_pickle import _RefusedError, _build_audit_hook
sys.addaudithook(_build_audit_hook('out'))
for attempt in {FORBIDDEN.split(chr(10))[1:-1]!r}:
    try:
        exec(attempt)
        print('allowed:', attempt)
    except _RefusedError:
        print('refused')
    except Exception as error:
        print('not tried:', attempt, error)
open('out', 'w').close()
open('out').close()
print('done')
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=True)
    assert done.stdout.split("\n") == ["refused"] * 12 + ["done", ""]
    assert [file.name for file in tmp_path.iterdir()] == ["out"]


def test_integer_and_float64_tensors_keep_their_dtype(tmp_path, state):
    """No tensor is converted to float32."""
    buffer = io.BytesIO()
    torch.save({"a": torch.arange(3), "b": torch.ones(2, dtype=torch.float64)}, buffer)
    path = tmp_path / "types.pth"
    path.write_bytes(buffer.getvalue())
    assert [value.dtype for value in read_state_dict(path).values()] == [torch.int64, torch.float64]


def test_no_module_from_the_working_directory_is_imported(tmp_path, state, monkeypatch):
    (tmp_path / "torch.py").write_text("open('canary', 'w').close()")
    path = save_state(tmp_path, state)
    monkeypatch.chdir(tmp_path)
    assert list(read_state_dict(path)) == list(state)
    assert not (tmp_path / "canary").exists()


def test_tied_tensors_count_once_towards_the_size_limit(tmp_path):
    weight = torch.ones(200, 200)
    assert set(read_state_dict(save_state(tmp_path, {"a": weight, "b": weight}))) == {"a", "b"}


def test_pytorchs_advice_to_load_unsafely_is_not_passed_on(tmp_path):
    import argparse

    with pytest.raises(CheckpointError) as refused:
        read_state_dict(save_state(tmp_path, {"state_dict": {"a": torch.ones(2)}, "args": argparse.Namespace(lr=1)}))
    assert "argparse.Namespace, which is not a tensor" in refused.value.lines[0]
    assert "\x1b" not in refused.value.lines[0]
