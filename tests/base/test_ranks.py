from __future__ import annotations

import pytest
import torch
import torch.distributed as dist

from cnnrun.base.errors import NoAnswerError
from cnnrun.base.ranks import RankGroup


@pytest.fixture
def ranks(tmp_path):
    dist.init_process_group("gloo", init_method=f"file://{tmp_path}/store", rank=0, world_size=1)
    yield RankGroup(30.0)
    dist.destroy_process_group()


def failing_with(error: Exception):
    def fail(*_, **__):
        raise error

    return fail


def test_a_lost_rank_is_reported_with_its_reason_and_the_timeout_of_the_exchange(ranks, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", failing_with(RuntimeError("Connection closed by peer [10.0.0.2]:4321\nat")))
    with pytest.raises(NoAnswerError, match=r"another rank ended \(Connection closed by peer \[10.0.0.2\]:4321\): see"):
        ranks.barrier()
    monkeypatch.setattr(dist, "all_reduce", failing_with(RuntimeError("Timed out waiting 30000ms for recv")))
    with pytest.raises(NoAnswerError, match=r"did not answer for 30 s \(train.timeout\)"):
        ranks.barrier()
    with pytest.raises(NoAnswerError, match=r"did not answer for 1 day: see"):
        ranks.barrier(long_timeout=True)
    monkeypatch.setattr(dist, "broadcast", failing_with(RuntimeError("Timed out waiting 86400000ms for recv")))
    with pytest.raises(NoAnswerError, match=r"did not answer for 1 day: see"):
        ranks.broadcast(lambda: 1)


def test_an_error_of_this_rank_is_not_reported_as_one_of_another(ranks, monkeypatch):
    monkeypatch.setattr(dist, "all_reduce", failing_with(torch.OutOfMemoryError("CUDA out of memory")))
    with pytest.raises(torch.OutOfMemoryError):
        ranks.all_reduce_max([1])
    monkeypatch.setattr(torch, "cat", failing_with(RuntimeError("Sizes of tensors must match")))
    with pytest.raises(RuntimeError, match="Sizes of tensors"):
        ranks.all_gather({"x": torch.ones(2)})
