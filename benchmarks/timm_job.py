"""Train in timm's way: its dataset, loader, optimizer and schedule, with the loop of its train.py, in float32.

    python benchmarks/timm_job.py BASELINES NET EPOCHS FOLDER [WORKERS]

BASELINES holds nets.py. timm's random resized crop stands in for the shift by 2 pixels, which its loader lacks.
"""

from __future__ import annotations

import sys
import time
from importlib import import_module

import torch
from timm.data import ImageDataset, create_loader
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import AverageMeter, accuracy
from torch import nn

LOADER = {"input_size": (1, 28, 28), "mean": (0.286,), "std": (0.353,), "device": torch.device("cpu")}


def make_loader(folder: str, batch: int, workers: int, is_training: bool) -> torch.utils.data.DataLoader:
    """Make timm's loader of an image folder, with its prefetcher only where train.py has it: not on a CPU."""
    crop = {"scale": (0.8, 1.0), "hflip": 0.5, "color_jitter": None} if is_training else {"crop_pct": 1.0}
    return create_loader(
        ImageDataset(folder, input_img_mode="L"),
        batch_size=batch,
        is_training=is_training,
        use_prefetcher=False,
        num_workers=workers,
        persistent_workers=workers > 0,
        **LOADER,
        **crop,
    )


def train_epoch(network: nn.Module, loader: torch.utils.data.DataLoader, optimizer: torch.optim.Optimizer) -> float:
    """Train for an epoch; returns images per second."""
    network.train()
    criterion, losses, start = nn.CrossEntropyLoss(), AverageMeter(), time.perf_counter()
    for images, labels in loader:
        loss = criterion(network(images), labels)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.update(loss.item(), len(labels))
    return losses.count / (time.perf_counter() - start)


def validate(network: nn.Module, loader: torch.utils.data.DataLoader) -> float:
    """Return the accuracy in per cent."""
    network.eval()
    top1 = AverageMeter()
    with torch.inference_mode():
        for images, labels in loader:
            top1.update(accuracy(network(images), labels)[0].item(), len(labels))
    return top1.avg


def main() -> None:
    baselines, net, epochs, folder = sys.argv[1:5]
    workers = int(sys.argv[5]) if len(sys.argv) > 5 else 2
    sys.path.insert(0, baselines)
    build_network = import_module("nets").NETS[net]

    torch.manual_seed(0)
    network = build_network()
    train = make_loader(f"{folder}/train", 128, workers, True)
    val = make_loader(f"{folder}/val", 256, workers, False)
    optimizer = create_optimizer_v2(network, opt="sgd", lr=0.05, momentum=0.9, weight_decay=0.0)
    schedule, _ = create_scheduler_v2(optimizer, "cosine", num_epochs=int(epochs))
    for epoch in range(int(epochs)):
        speed = train_epoch(network, train, optimizer)
        schedule.step(epoch + 1)
        print(f"timm epoch {epoch} train {speed:.0f} img/s acc {validate(network, val):.2f}", flush=True)


if __name__ == "__main__":
    main()
