"""The pretended GPU refuses what a real GPU refuses, so that a rehearsal finds device errors."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from tests.support.pretended_gpu import is_on_gpu, pretended_gpu


@pytest.fixture
def gpu():
    with pretended_gpu() as device:
        yield device


def test_results_of_gpu_tensors_are_on_the_gpu(gpu):
    network = nn.Sequential(nn.Conv2d(3, 4, 3), nn.BatchNorm2d(4), nn.ReLU(), nn.Flatten(), nn.Linear(64, 2)).to(gpu)
    inputs = torch.rand(2, 3, 6, 6, device=gpu, requires_grad=True)
    out = network(inputs)
    out.square().mean().backward()
    assert out.device == torch.device("cuda", 0)
    for tensor in (inputs.grad, *network.parameters(), *(each.grad for each in network.parameters())):
        assert tensor.device.type == "cuda"
    assert out[:, 0].view(1, 2).float().sum(0).device.type == "cuda"
    assert torch.zeros_like(out).device.type == "cuda"
    assert out.cpu().device.type == out.to("cpu").device.type == torch.rand(2).device.type == "cpu"
    assert not is_on_gpu(out.cpu())


@pytest.mark.parametrize(
    "mix",
    [
        lambda here, there: here + there,
        lambda here, there: torch.cat([there, here]),
        lambda here, there: there @ here.T,
        lambda here, there: torch.where(there > 0, here, here),
        lambda here, there: here[there.long()],
        lambda here, there: nn.functional.linear(there, here),
    ],
)
def test_mixing_gpu_and_host_tensors_is_refused(gpu, mix):
    here, there = torch.ones(3, 3), torch.ones(3, 3, device=gpu)
    with pytest.raises(RuntimeError, match="on the same device"):
        mix(here, there)


def test_host_scalars_and_indices_are_accepted(gpu):
    there = torch.arange(6.0, device=gpu)
    assert (there * torch.tensor(2.0)).device.type == "cuda"
    assert there[torch.tensor([1, 2])].tolist() == [1, 2]
    there[torch.tensor([0])] = 5.0
    assert there.tolist() == [5, 1, 2, 3, 4, 5]
    there.copy_(torch.zeros(6))
    assert there.sum().item() == 0


def test_numpy_refuses_gpu_tensors(gpu):
    there = torch.ones(3, device=gpu)
    with pytest.raises(TypeError, match="numpy"):
        there.numpy()
    with pytest.raises(TypeError, match="numpy"):
        np.asarray(there)


@pytest.mark.parametrize(
    "wait",
    [
        lambda there: there.sum().item(),
        lambda there: float(there.max()),
        lambda there: there.tolist(),
        lambda there: there.cpu(),
        lambda there: there[there > 0],
        lambda there: there.nonzero(),
        lambda there: bool((there > 0).all()),
        lambda there: torch.ones(3).to("cuda"),
        lambda there: torch.tensor([1.0], device="cuda"),
        lambda there: torch.linalg.inv(torch.eye(2, device="cuda")),
    ],
)
def test_synchronizing_operations_are_found(gpu, wait):
    there = torch.arange(3.0, device=gpu)
    wait(there)
    torch.cuda.set_sync_debug_mode("error")
    with pytest.raises(RuntimeError, match="synchronizing"):
        wait(there)


def test_asynchronous_operations_are_allowed(gpu):
    there = torch.arange(3.0, device=gpu)
    torch.cuda.set_sync_debug_mode("error")
    torch.ones(3).pin_memory().to(gpu, non_blocking=True).add_(there).sum()
    nn.functional.one_hot(there.long(), 4)
    there.index_select(0, torch.zeros(1, dtype=torch.int64, device=gpu))


def test_leaving_the_pretended_gpu_restores_torch():
    before = torch.cuda.device_count, torch.autocast, torch.Tensor.pin_memory
    with pretended_gpu() as device:
        kept = torch.ones(2, device=device)
    assert (torch.cuda.device_count, torch.autocast, torch.Tensor.pin_memory) == before
    assert kept.device.type == "cpu"
    kept.numpy()
