"""Batches copied to a GPU equal what was read, even when the copies are delayed."""

from __future__ import annotations

from contextlib import closing

import pytest
import torch

from cnnrun.data import training_batches
from cnnrun.experiment import assemble, config_file
from tests.support.configs import TINY

pytestmark = pytest.mark.cuda
CPU = torch.device("cpu")
_LONG = 50_000_000  # clock cycles to keep the GPU busy: a few hundredths of a second


def batches(device: torch.device, *overrides: str) -> list[tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """The images and targets of an epoch's batches, each requested while the GPU is still busy."""
    made = config_file.parse_config(TINY, "tiny.yaml", ["name=tiny", *overrides])
    setup = assemble.build_setup(made, assemble.prepare_dataset(made), None, device)
    found = []
    with closing(setup.batches(1)) as of_job:
        for step in range(of_job.steps_per_epoch):
            if device.type == "cuda":
                torch.cuda._sleep(_LONG)
            found.append(of_job.at(step))
    return [(each.images.cpu(), {name: value.cpu() for name, value in each.targets.items()}) for each in found]


@pytest.fixture(autouse=True)
def _batch_by_batch(monkeypatch):
    """Copy each batch separately, while the next one is read."""
    monkeypatch.setattr(training_batches, "AHEAD_BYTES", 1)


@pytest.mark.parametrize("prefetch", [0, 4])
@pytest.mark.parametrize("augment", ["{}", "{flip: horizontal, shift: 0.2}", "{mixup: 0.4}"])
def test_no_batch_is_overwritten_while_it_is_copied(gpu, prefetch, augment):
    overrides = [f"data.prefetch={prefetch}", f"data.augment={augment}", "train.batch=16"]
    expected, found = batches(CPU, *overrides), batches(gpu, *overrides)
    assert len(expected) == len(found)
    for (pictures, targets), (copied, others) in zip(expected, found, strict=True):
        assert torch.allclose(pictures.float(), copied.float(), atol=1e-4 if "mixup" in augment else 0)
        assert targets.keys() == others.keys()
        assert all(torch.allclose(targets[name].float(), others[name].float()) for name in targets)


def test_images_read_for_a_gpu_are_in_pinned_memory(real_gpu):
    made = config_file.parse_config(TINY, "tiny.yaml", ["name=tiny", "data.prefetch=2"])
    setup = assemble.build_setup(made, assemble.prepare_dataset(made), None, real_gpu)
    with closing(setup.batches(1)) as of_job:
        assert of_job._read(torch.arange(8)).is_pinned()
