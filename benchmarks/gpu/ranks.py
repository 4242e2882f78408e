"""Compare two processes with one, on the CPU and on one GPU; and try a group of one process over NCCL.

    python benchmarks/gpu/ranks.py --device cuda

Two ranks sum their gradients in another order than one process does, so losses and weights may differ by rounding, and
every step increases the difference. Few steps at a small learning rate are compared. Each result includes the limit.
"""

from __future__ import annotations

import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from common import RICH, Options, attempt, emit, parse_options

from cnnrun.base.device import choose_device
from cnnrun.base.ranks import RankGroup
from cnnrun.experiment import config_file
from cnnrun.results.studies.train_run import train_run
from cnnrun.training import checkpoints
from cnnrun.training.run_records import METRICS

ALLOWED = 1e-4
# Dropout differs by rank, and so does batch norm without synchronisation. Neither is compared here.
TOGETHER = ["train.sync_batch_norm=true", "train.epochs=2", "train.batch=180", "train.optimizer={sgd: {lr: 0.005}}"]


def main() -> None:
    """Compare on the CPU and on the GPU, then try NCCL alone."""
    options = parse_options(__doc__)
    with tempfile.TemporaryDirectory(prefix="cnnrun-ranks-") as name:
        folder = Path(name)
        config = folder / "alike.yaml"
        config.write_text(RICH.replace("  - dropout: 0.2\n", ""))
        for device in ["cpu", *(["cuda:0"] if options.device.type == "cuda" else [])]:
            with attempt("two_ranks", seconds=options.seconds_left, device=device):
                emit("two_ranks", device=device, **compare_two_ranks(config, device, folder / device[:4], options))
        with attempt("group", seconds=options.seconds_left):
            check_group_of_one(config, options, folder)


def compare_two_ranks(config: Path, device: str, folder: Path, options: Options) -> dict[str, Any]:
    """Train with torchrun and in this process; returns how far apart the results are."""
    more = ["--device", device, "--runs", str(folder / "two"), "--no-report", "--json"]
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "cnnrun"]
    command = [sys.executable, *torchrun, "train", str(config), *TOGETHER, *more]
    done = subprocess.run(command, capture_output=True, text=True, timeout=max(1.0, options.seconds_left))
    print(done.stderr[-4000:])
    if done.returncode:
        line = next((line for line in reversed(done.stderr.splitlines()) if "rror" in line), "")
        return {"ok": False, "reason": f"torchrun left with {done.returncode}", "lines": [line]}
    experiment = config_file.read_config(config, TOGETHER)
    one = Path(train_run(experiment, folder / "one", choose_device(device), resume=False)["run"])
    two = folder / "two" / one.parent.name / one.name
    losses, weights = largest_gap(last_losses(one), last_losses(two)), largest_gap(weights_of(one), weights_of(two))
    figures = {"losses_differ": losses, "weights_differ": weights, "allowed": ALLOWED}
    return {"ok": max(losses, weights) <= ALLOWED, "reason": f"losses {losses:g}, weights {weights:g}", **figures}


def last_losses(run: Path) -> dict[str, torch.Tensor]:
    """Return the losses after the last epoch. Other metrics count images and change in jumps."""
    numbers = json.loads((run / METRICS).read_text().splitlines()[-1])
    return {name: torch.tensor(value) for name, value in numbers.items() if name.endswith("loss")}


def weights_of(run: Path) -> dict[str, torch.Tensor]:
    """Return the last checkpoint's weights."""
    saved = checkpoints.load_newest(run / "checkpoints", "latest", print)
    assert saved is not None
    return saved.parts["model"]


def largest_gap(first: dict[str, torch.Tensor], second: dict[str, torch.Tensor]) -> float:
    """Return the largest difference of tensors of the same names."""
    assert first.keys() == second.keys()
    return max(float((value.double() - second[name].double()).abs().max()) for name, value in first.items())


def check_group_of_one(config: Path, options: Options, folder: Path) -> None:
    """Emit whether a group of one process, over NCCL on a GPU, returns the tensors that it gets."""
    is_cuda = options.device.type == "cuda"
    backend = "cpu:gloo,cuda:nccl" if is_cuda else "gloo"
    dist.init_process_group(backend, store=dist.FileStore(str(folder / "store"), 1), rank=0, world_size=1)  # type: ignore[attr-defined]
    group = RankGroup(60.0)
    for name, is_right in check_exchanges(group, options.device).items():
        emit("group", backend=backend, what_is_exchanged=name, ok=is_right, reason="returned other values")
    dist.destroy_process_group()


def check_exchanges(group: RankGroup, device: torch.device) -> dict[str, bool]:
    """Return for each kind of exchange whether it returned the tensors that it got."""
    tensors = {"floats": torch.randn(1000, 7, device=device), "whole": torch.arange(9, device=device)}
    summed = [value.clone() for value in tensors.values()]
    group.all_reduce_sum(summed)
    gathered = group.all_gather(tensors)
    first = group.broadcast_tensors({name: value.cpu() for name, value in tensors.items()})
    group.barrier()
    return {
        "add_up": all(torch.equal(*pair) for pair in zip(summed, tensors.values(), strict=True)),
        "agree": group.all_reduce_max([3, 0, 2**40]) == [3, 0, 2**40],
        "gather": len(gathered) == 1
        and all(torch.equal(gathered[0][name], value.cpu()) for name, value in tensors.items()),
        "from_first": group.broadcast(lambda: {"made": [1, "two"]}) == {"made": [1, "two"]},
        "tensors_from_first": all(torch.equal(first[name], value.cpu()) for name, value in tensors.items()),
    }


if __name__ == "__main__":
    main()
