"""Several processes on GPUs: two ranks that share a GPU communicate by gloo; NCCL works in a group of one rank."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
from contextlib import suppress
from pathlib import Path

import pytest
import torch

from tests.support.configs import TINY
from tests.support.forked_processes import free_port
from tests.support.interrupted_trainings import digest
from tests.support.pretended_gpu import REHEARSAL

pytestmark = pytest.mark.cuda
NORMED = "model=[{conv: {out_channels: 4, norm: batch, activation: relu}}, {conv: 4}, batch_norm, flatten]"
STEPS = ["train.epochs=2", "train.batch=60", "data.augment={shift: 0.2, rotate: 8}", NORMED]


@pytest.fixture
def device() -> str:
    """The GPU that the ranks share. A pretended GPU cannot be shared: the test then runs on the CPU."""
    if torch.cuda.is_available():
        return "cuda:0"
    if os.environ.get(REHEARSAL) == "1":
        return "cpu"
    pytest.skip(f"needs a CUDA device; {REHEARSAL}=1 rehearses it on the processor")


def test_nccl_collectives_work_on_gpu_tensors_in_a_group_of_one(real_gpu):
    import torch.distributed as dist

    from cnnrun.base.ranks import RankGroup

    address = f"tcp://127.0.0.1:{free_port()}"
    dist.init_process_group("cpu:gloo,cuda:nccl", init_method=address, rank=0, world_size=1)
    try:
        group = RankGroup(60.0)
        values = [torch.arange(4.0, device=real_gpu), torch.ones(3, device=real_gpu, dtype=torch.float64)]
        group.all_reduce_sum(values)
        assert [value.tolist() for value in values] == [[0, 1, 2, 3], [1, 1, 1]]
        assert group.all_reduce_max([3, 1]) == [3, 1]
        assert group.all_gather({"a": values[0]})[0]["a"].tolist() == [0, 1, 2, 3]
        assert group.broadcast(lambda: {"made": 1}) == {"made": 1}
        group.barrier()
    finally:
        dist.destroy_process_group()


def metrics_of(root: Path, ranks: int, device: str, *overrides: str) -> list[dict[str, float]]:
    """The metrics of a training by `ranks` processes."""
    root.mkdir()
    (root / "tiny.yaml").write_text(TINY)
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)] if ranks > 1 else []
    words = ["tiny.yaml", *STEPS, *overrides, "--device", device, "--no-report"]
    process = subprocess.Popen(
        [sys.executable, *start, "-m", "cnnrun", "train", *words],
        cwd=root,
        env={**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(filter(None, sys.path))},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )
    try:
        _, err = process.communicate(timeout=45)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
    assert process.returncode == 0, err
    return [json.loads(line) for line in (root / "runs" / "tiny" / "1" / "metrics.jsonl").read_text().splitlines()]


def test_ranks_that_share_a_gpu_are_reproducible_and_match_one_process(device, tmp_path):
    one = metrics_of(tmp_path / "one", 1, device)
    two = [metrics_of(tmp_path / name, 2, device, "train.sync_batch_norm=true") for name in "ab"]
    for row, other in zip(one, two[0], strict=True):
        assert row == pytest.approx(other, rel=2e-2, abs=2e-2)
    assert digest(tmp_path / "a" / "runs" / "tiny" / "1") == digest(tmp_path / "b" / "runs" / "tiny" / "1")
