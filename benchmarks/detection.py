"""Compare detection with torchvision's ssdlite320_mobilenet_v3_large: training speed, share of decoding, scores.

    python benchmarks/detection.py speed                  # images per second in training, rounds interleaved
    python benchmarks/detection.py decode RUN             # share of decoding, with suppression, in inference
    python benchmarks/detection.py assign                 # processor time of the assignment, with a crowded image too
    python benchmarks/detection.py ssdlite --minutes 9    # train ssdlite from scratch on the same images for so long
    python benchmarks/detection.py scores RUN [RUN ...]   # the test scores of runs, with mean and standard deviation

All use configs/bccd.yaml and the data in ../shared/data/bccd.
"""

from __future__ import annotations

import argparse
import statistics
import time
from pathlib import Path

import torch
from torch import Tensor, nn

from cnnrun.base.boxes import pad_to
from cnnrun.contracts.choices import Choices
from cnnrun.experiment import assemble, config_file, open_run
from cnnrun.model.network import flops
from cnnrun.results.evaluate import evaluate_run
from cnnrun.tasks.detection.assignment import batch_objects
from cnnrun.tasks.detection.criterion import DetectionCriterion
from cnnrun.training.learner import Learner
from cnnrun.training.schedules import OneCycle

CONFIG = Path(__file__).parents[1] / "configs" / "bccd.yaml"
CPU = torch.device("cpu")
MOST = 100


def ssdlite(classes: int) -> nn.Module:
    from torchvision.models.detection import ssdlite320_mobilenet_v3_large

    torch.manual_seed(0)
    network: nn.Module = ssdlite320_mobilenet_v3_large(weights=None, weights_backbone=None, num_classes=classes + 1)
    return network.to(memory_format=torch.channels_last)


def as_torchvision(images: Tensor, targets: dict[str, Tensor]) -> tuple[list[Tensor], list[dict[str, Tensor]]]:
    """Convert a batch for torchvision's detectors: class 0 is the background, boxes without area are left out."""
    converted = []
    for boxes, labels in zip(targets["boxes"], targets["objects"], strict=True):
        real = (labels >= 0) & ((boxes[:, 2:] - boxes[:, :2]).amin(1) > 0)
        converted.append({"boxes": boxes[real], "labels": labels[real] + 1})
    return list(images.float() / 255), converted


def train_step(network: nn.Module, optimizer: torch.optim.Optimizer, images: Tensor, targets: dict[str, Tensor]):
    losses = network(*as_torchvision(images, targets))
    loss = sum(losses.values())
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    return float(loss.detach())


def prepare_setup(*overrides: str):
    experiment = config_file.read_config(CONFIG, list(overrides))
    data = assemble.prepare_dataset(experiment)
    return experiment, data, assemble.build_setup(experiment, data, None, CPU)


def speed(rounds: int, steps: int) -> None:
    """Run training steps of both on the same batches in turn; print each round, then medians and their ratio."""
    experiment, data, setup = prepare_setup("train.batch=16")
    learner, batches = Learner(setup), setup.batches(1)
    network = ssdlite(len(data.facts.classes)).train()
    optimizer = torch.optim.AdamW(network.parameters(), 1e-3)
    ours_gflops = sum(flops(assemble.build_experiment_network(experiment, experiment.task.bind(data.facts)))) / 1e9
    theirs = f"theirs {_ssdlite_gflops(network):.2f} at (3, 320, 320)"
    print(f"ours {ours_gflops:.2f} GFLOPs at {data.facts.image_shape}; {theirs}")
    found: dict[str, list[float]] = {"ours": [], "ssdlite": []}
    batch = [batches.at(number) for number in range(steps)]
    for number in range(rounds + 1):
        for who in found:
            began = time.perf_counter()
            for step in range(steps):
                if who == "ours":
                    learner.backward(batch[step], step)
                    learner.update_weights(step, 0.1)
                else:
                    train_step(network, optimizer, batch[step].images, batch[step].targets)
            if number:  # the first round warms up
                found[who].append(steps * 16 / (time.perf_counter() - began))
        if number:
            print("  ".join(f"{who} {values[-1]:.1f}" for who, values in found.items()), "images/s", flush=True)
    medians = {who: statistics.median(values) for who, values in found.items()}
    print(f"medians of {rounds}: {medians}; ratio {medians['ours'] / medians['ssdlite']:.2f}")


def _ssdlite_gflops(network: nn.Module) -> float:
    from torch.utils.flop_counter import FlopCounterMode

    network.eval()
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        network([torch.zeros(3, 320, 320)])
    network.train()
    return counter.get_total_flops() / 1e9


def decode(run: Path, rounds: int) -> None:
    """Print the time of the network and of its decoder, with suppression, on real images."""
    _, trained = open_run.open_trained(run, run.parent.parent, CPU)
    data = assemble.prepare_dataset(config_file.read_config(run / "config.yaml"))
    for batch in (1, 8, 64):
        images = (
            data.splits["train"].load_images(torch.arange(batch)).float().contiguous(memory_format=torch.channels_last)
        )
        times: dict[str, list[float]] = {"network": [], "decode": []}
        with torch.inference_mode():
            for _ in range(rounds):
                began = time.perf_counter()
                outputs = trained.network(images)
                middle = time.perf_counter()
                trained.decoder(outputs)
                times["network"].append(middle - began)
                times["decode"].append(time.perf_counter() - middle)
        network, decoding = (1000 * statistics.median(times[name]) for name in ("network", "decode"))
        share = decoding / (network + decoding)
        print(f"batch {batch}: network {network:.1f} ms, decode and NMS {decoding:.2f} ms: {share:.1%} of inference")


def assign(rounds: int) -> None:
    """Print the processor time of assigning cells for a batch, and for one padded to an image of 3,000 objects."""
    torch.set_num_threads(1)
    _, _, setup = prepare_setup()
    learner, batch = Learner(setup), setup.batches(1).at(0)
    criterion = learner.criterion
    assert isinstance(criterion, DetectionCriterion)
    outputs = learner.forward(batch.images.contiguous(memory_format=torch.channels_last)).detach().float()
    for width in (batch.targets["objects"].shape[1], 3000):
        names = ("boxes", "objects", "roles")
        targets = {name: pad_to(batch.targets[name], width, -1 if name == "objects" else 0) for name in names}
        times = []
        for _ in range(rounds):
            began = time.process_time()
            criterion.assign(outputs, batch_objects(targets))
            times.append(1000 * (time.process_time() - began))
        count = int((targets["objects"] >= 0).sum())
        print(f"{count} objects in {len(batch)} images, padded to {width}: {_spread(times)} ms")


def _spread(values: list[float]) -> str:
    return f"{statistics.median(values):.2f} ({min(values):.2f} .. {max(values):.2f})"


def train_ssdlite(minutes: float, lr: float, seed: int) -> None:
    """Train their network and losses with our data, augmentation, schedule and optimizer; score with our meter."""
    experiment, data, setup = prepare_setup(f"seed={seed}", "train.batch=8")
    batches = setup.batches(1)
    network = ssdlite(len(data.facts.classes)).train()
    optimizer = torch.optim.AdamW(network.parameters(), lr, weight_decay=0.05)
    schedule, began, step = OneCycle(warmup=0.1), time.perf_counter(), 0
    while (spent := time.perf_counter() - began) < 60 * minutes:
        for group in optimizer.param_groups:
            group["lr"] = lr * schedule.factor(int(spent), int(60 * minutes) + 1)
        batch = batches.at(step)
        loss = train_step(network, optimizer, batch.images, batch.targets)
        step += 1
        if step % 100 == 0:
            print(f"step {step}  {spent:.0f} s  loss {loss:.3f}", flush=True)
    print(f"{step * 8} images in {spent:.0f} s")
    network.eval()
    for split in ("val", "test"):
        meter, examples = experiment.task.bind(data.facts).measuring.build_meter(Choices()), data.splits[split]
        for index in torch.arange(len(examples)).split(16):
            with torch.inference_mode():
                found = network(list(examples.load_images(index).float() / 255))
            meter.update(_as_ours(found), examples.batch_targets(index, CPU))
        print(split, {name: round(value, 4) for name, value in meter.compute().numbers.items()})


def _as_ours(found: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    rows = []
    for each in found:
        kept = each["scores"].argsort(descending=True)[:MOST]
        parts = {"boxes": each["boxes"][kept], "scores": each["scores"][kept], "labels": each["labels"][kept] - 1}
        fill = {"boxes": 0.0, "scores": 0.0, "labels": -1}
        rows.append({name: pad_to(value[None], MOST, fill[name]) for name, value in parts.items()})
    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}


def scores(runs: list[Path]) -> None:
    """Each run's numbers on test, measured once, and their mean and spread."""
    rows = [evaluate_run(run, run.parent.parent, CPU, "test")["numbers"] for run in runs]
    for run, row in zip(runs, rows, strict=True):
        print(run, {name: round(row[name], 4) for name in ("AP", "AP50", "AP75")})
    for name in ("AP", "AP50", "AP75"):
        values = [row[name] for row in rows]
        spread = statistics.stdev(values) if len(values) > 1 else 0.0
        print(f"{name}: {statistics.mean(values):.4f} +- {spread:.4f} (n = {len(values)})")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["speed", "decode", "assign", "ssdlite", "scores"])
    parser.add_argument("runs", nargs="*", type=Path)
    parser.add_argument("--minutes", type=float, default=9.0)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--rounds", type=int, default=7)
    options = parser.parse_args()
    if options.what == "speed":
        speed(options.rounds, 4)
    elif options.what == "decode":
        decode(options.runs[0], 3 * options.rounds)
    elif options.what == "assign":
        assign(options.rounds)
    elif options.what == "ssdlite":
        train_ssdlite(options.minutes, options.lr, options.seed)
    else:
        scores(options.runs)


if __name__ == "__main__":
    main()
