"""Test whether DistributedDataParallel resumes to the bit. It does not, so cnnrun sums gradients itself.

    for mode in whole first second; do torchrun --nproc-per-node 3 benchmarks/ddp_resume.py $mode; done

Prints a digest of the weights after four steps (`whole`), after two (`first`, which saves them), and after two more in
new processes (`second`). Measured (torch 2.14.1, gloo): with 2 ranks `second` equals `whole`, with 3 and 4 it does not,
while `whole` equals itself.
"""

from __future__ import annotations

import hashlib
import sys
from itertools import chain
from pathlib import Path
from tempfile import gettempdir

import torch
import torch.distributed as dist
from torch import nn
from torch.nn.parallel import DistributedDataParallel

SAVED = Path(gettempdir()) / "ddp_resume.pt"


def main(mode: str) -> None:
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    rank = dist.get_rank()
    torch.manual_seed(0)
    hidden = chain.from_iterable((nn.Linear(300, 300), nn.ReLU()) for _ in range(6))
    network = nn.Sequential(*hidden, nn.Linear(300, 10))
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05)
    if mode == "second":
        network.load_state_dict(torch.load(SAVED, weights_only=True))
    parallel = DistributedDataParallel(network)
    for step in range(2 if mode == "second" else 0, 2 if mode == "first" else 4):
        draws = torch.Generator().manual_seed(100 * step + rank)
        inputs = torch.randn(32, 300, generator=draws)
        labels = torch.randint(0, 10, (32,), generator=draws)
        optimizer.zero_grad()
        nn.functional.cross_entropy(parallel(inputs), labels).backward()
        optimizer.step()
    if rank == 0:
        if mode == "first":
            torch.save(network.state_dict(), SAVED)
        tensors = b"".join(value.numpy().tobytes() for value in network.state_dict().values())
        print(mode, hashlib.sha256(tensors).hexdigest()[:12])
    dist.destroy_process_group()


if __name__ == "__main__":
    main(sys.argv[1])
