"""The notice of a training that runs far below its own first steps: once, with the reason."""

from __future__ import annotations

import os
import time

import pytest
import torch

from cnnrun.base import machine_load
from cnnrun.base.progress import Clock
from cnnrun.training import pace


@pytest.fixture
def steps(monkeypatch):
    """`steps(count, seconds, waiting)`: steps of a training with its own clock, `waiting` of the seconds for data."""
    now = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: now[0])
    clock = Clock(lambda: now[0])
    watched = pace.Pace(clock)

    def run(count: int, seconds: float, waiting: float = 0.0) -> None:
        for _ in range(count):
            with watched.time_step():
                with clock.record_wait():
                    now[0] += waiting
                now[0] += seconds - waiting

    return run


def notices(capfd) -> list[str]:
    return [line for line in capfd.readouterr().err.splitlines() if "times as long" in line]


@pytest.fixture
def quiet(monkeypatch):
    monkeypatch.setattr(pace, "load_average", lambda: 0.5)
    monkeypatch.setattr(pace, "major_page_faults", lambda: 0)


def test_a_steady_training_is_silent_whatever_its_first_steps(steps, quiet, capfd):
    steps(3, 5.0)  # the first steps of a process are slow
    steps(500, 0.010)
    steps(100, 0.029)
    assert not notices(capfd)


def test_single_slow_steps_are_no_slowdown(steps, quiet, capfd):
    for _ in range(30):
        steps(15, 0.010)
        steps(5, 1.0)
    assert not notices(capfd)


def test_the_notice_comes_once(steps, quiet, capfd):
    steps(100, 0.010)
    steps(100, 0.042)
    (line,) = notices(capfd)
    assert line.startswith("steps take 4.2 times as long as the first ones: ")
    steps(100, 0.500)
    assert not notices(capfd)


@pytest.mark.parametrize(("threads", "has_advice"), [(1, False), (2, True)])
def test_other_programs_are_named(steps, quiet, capfd, monkeypatch, threads, has_advice):
    monkeypatch.setattr(pace, "load_average", lambda: 4.25)
    monkeypatch.setattr(os, "cpu_count", lambda: 2)
    monkeypatch.setattr(torch, "get_num_threads", lambda: threads)
    steps(30, 0.010)
    steps(30, 0.100)
    (line,) = notices(capfd)
    assert "other programs use the processors (load 4.2 on 2)" in line
    assert ("OMP_NUM_THREADS=1" in line) == has_advice


def test_waiting_for_images_is_named(steps, quiet, capfd):
    steps(30, 0.010, waiting=0.001)
    steps(30, 0.100, waiting=0.091)
    (line,) = notices(capfd)
    assert "they wait for images" in line


def test_memory_read_back_from_the_disk_is_named(steps, quiet, capfd, monkeypatch):
    steps(30, 0.010)
    faults = iter(range(10_000, 10**9, 10_000))
    monkeypatch.setattr(pace, "major_page_faults", lambda: next(faults))
    steps(40, 0.100)
    (line,) = notices(capfd)
    assert "memory is full" in line


def test_the_load_is_unknown_on_some_systems(steps, quiet, capfd, monkeypatch):
    monkeypatch.delattr(os, "getloadavg")
    assert machine_load.load_average() is None
    monkeypatch.setattr(pace, "load_average", machine_load.load_average)
    steps(30, 0.010)
    steps(30, 0.100)
    assert len(notices(capfd)) == 1
