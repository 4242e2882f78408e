from __future__ import annotations

import pytest

from cnnrun.data import decode
from cnnrun.data.decode import ThreadedMap


@pytest.mark.parametrize("count", [0, 1, 4096, 10_001])
def test_many_tasks_are_waited_for_in_slices_and_keep_their_order(monkeypatch, count):
    """`wait` locks every task that it is given, each time: all at once would take a time quadratic in their number."""
    wait, waited_counts = decode.wait, []

    def counting_wait(tasks, *arguments):
        waited_counts.append(len(tasks))
        return wait(tasks, *arguments)

    monkeypatch.setattr(decode, "wait", counting_wait)
    threads = ThreadedMap(2, 60.0)
    assert threads(lambda number: number * 2, range(count)) == [number * 2 for number in range(count)]
    threads.close()
    assert max(waited_counts, default=0) <= 4096
