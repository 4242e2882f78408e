"""Compare the data path with torchvision's, interleaved in one run.

    python benchmarks/data.py [--rounds 5] [--only path jpeg wait memory prefetch] [--idx data/fashion-mnist]

path      images/s of gather, flip, shift, brightness, contrast, saturation, normalise: cnnrun in batches from memory,
          compared with a DataLoader with 2 workers and torchvision's v2 transforms image by image, on the same decoded
          images
jpeg      a first epoch over JPEG files (cnnrun decodes, caches and audits them first) and later epochs, compared with
          the same DataLoader, which reads the files each time
wait      the share of time that training waits for data, on a part of Fashion-MNIST
prefetch  images/s of a training with 0, 2 and 8 batches read ahead
memory    resident memory of a training on 10,000 and on 1,000,000 images that do not fit `data.memory_gib`
"""

from __future__ import annotations

import argparse
import io
import json
import os
import statistics
import subprocess
import sys
import tarfile
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torchvision import datasets  # noqa: TID253
from torchvision.transforms import v2  # noqa: TID253

from cnnrun.base.process_settings import keep_freed_memory
from cnnrun.base.progress import progress_bar
from cnnrun.data.augment.settings import Augment
from cnnrun.data.dataset import Examples
from cnnrun.data.image_stores import MemoryStore
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.data.sources.idx import Idx
from cnnrun.data.training_batches import BatchPlan, BatchReading, TrainingBatches
from cnnrun.model.network import Normalize

BATCH = 128
AUGMENT = {"flip": "horizontal", "shift": 0.125, "brightness": 0.2, "contrast": 0.2, "saturation": 0.2}
MEAN, STD = [120.0, 115.0, 110.0], [60.0, 60.0, 60.0]
NETS = Path(__file__).parent / "nets"
IMAGES = {"lenet": 12_800, "vgg-small": 3_840, "resnet18": 768}


def torchvision_transforms(side: int, *first: v2.Transform) -> v2.Compose:
    return v2.Compose(
        [
            *first,
            v2.RandomHorizontalFlip(),
            v2.RandomCrop(side, padding=side // 8),
            v2.ColorJitter(brightness=0.2, contrast=0.2, saturation=0.2),
            v2.ToDtype(torch.float32, scale=True),
            v2.Normalize([m / 255 for m in MEAN], [s / 255 for s in STD]),
        ]
    )


class Decoded(torch.utils.data.Dataset):
    """Images in memory, transformed one by one."""

    def __init__(self, images: torch.Tensor, transform: v2.Compose) -> None:
        self.images, self.transform = images, transform

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> tuple[torch.Tensor, int]:
        return self.transform(self.images[index]), 0


def loader_epoch(dataset: torch.utils.data.Dataset, epochs: int = 1) -> list[float]:
    """Return the seconds of each epoch. The workers persist, as in a training; the first epoch includes their start."""
    loader = torch.utils.data.DataLoader(
        dataset, BATCH, shuffle=True, num_workers=2, persistent_workers=True, drop_last=True
    )
    seconds = []
    for _ in range(epochs):
        began = time.perf_counter()
        for images, _ in loader:
            images.sum()
        seconds.append(time.perf_counter() - began)
    return seconds


def our_epochs(examples: Examples, epochs: range) -> list[float]:
    normalize = Normalize(tuple(MEAN), tuple(STD))
    augment = Augment.model_validate(AUGMENT)
    steps = len(examples) // BATCH
    batches = TrainingBatches(examples, augment, BatchPlan(BATCH, steps, 0), BatchReading(torch.device("cpu")))
    seconds = []
    for epoch in epochs:
        began = time.perf_counter()
        for step in range(epoch * steps, (epoch + 1) * steps):
            normalize(batches.at(step).images).sum()
        seconds.append(time.perf_counter() - began)
    return seconds


def examples_in_memory(images: torch.Tensor) -> Examples:
    rows = torch.arange(len(images))
    return Examples(MemoryStore(images.numpy()), rows, {}, None, rows)


def show(title: str, table: dict[str, list[float]], digits: int = 0) -> None:
    print(f"\n{title}")
    for name, values in table.items():
        middle = statistics.median(values)
        print(f"  {name:<44} {middle:>12,.{digits}f}  ({min(values):,.{digits}f} .. {max(values):,.{digits}f})")


def path(args: argparse.Namespace) -> None:
    for side, count in ((32, 12_800), (64, 6_400), (128, 1_920)):
        pixels = torch.randint(0, 256, (count, 3, side, side), dtype=torch.uint8)
        dataset = Decoded(pixels, torchvision_transforms(side))
        speed: dict[str, list[float]] = {"cnnrun": [], "DataLoader, 2 workers": [], "ratio": []}
        for round_ in range(args.rounds):
            ours = count / our_epochs(examples_in_memory(pixels), range(round_, round_ + 1))[0]
            other = count / loader_epoch(dataset, 2)[1]  # without the workers' start
            for name, value in (("cnnrun", ours), ("DataLoader, 2 workers", other), ("ratio", ours / other)):
                speed[name].append(value)
        show(f"path 3x{side}x{side}, images/s", speed, 1)


def write_photos(folder: Path, count: int, size: tuple[int, int]) -> None:
    """Write smooth images with some grain, as JPEG of quality 90, in two classes."""
    rng = np.random.default_rng(0)
    for number in range(count):
        place = folder / "ab"[number % 2]
        place.mkdir(parents=True, exist_ok=True)
        rough = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize(
            size, Image.Resampling.BICUBIC
        )
        grain = rng.integers(-12, 13, (size[1], size[0], 1))
        Image.fromarray((np.asarray(rough) + grain).clip(0, 255).astype(np.uint8)).save(
            place / f"{number}.jpg", quality=90
        )


def jpeg(args: argparse.Namespace) -> None:
    side = 64
    for size, count in (((80, 80), 6_400), ((400, 300), 2_560)):
        with tempfile.TemporaryDirectory() as work:
            write_photos(Path(work) / "pictures", count, size)
            reading = [v2.Resize((side, side)), v2.ToImage()] if size != (side, side) else [v2.ToImage()]
            files = datasets.ImageFolder(f"{work}/pictures", torchvision_transforms(side, *reading))
            table: dict[str, list[float]] = {}
            for round_ in range(args.rounds):
                other = loader_epoch(files, 2)
                began = time.perf_counter()
                data = Data.model_validate(
                    {
                        "source": {"folder": f"{work}/pictures"},
                        "image": {"size": side, "channels": 3},
                        "split": {"val": 0.0},
                        "cache_dir": f"{work}/cache{round_}",
                    }
                )
                examples = build_dataset(data, index_source(data), progress_bar).splits["train"]
                first = time.perf_counter() - began
                ours = our_epochs(examples, range(3))
                for name, value in (
                    ("cnnrun, first epoch, s", first + ours[0]),
                    ("DataLoader, first epoch, s", other[0]),
                    ("ratio (DataLoader / cnnrun)", other[0] / (first + ours[0])),
                    ("cnnrun, later epoch, s", statistics.mean(ours[1:])),
                    ("DataLoader, later epoch, s", other[1]),
                    ("ratio, later epochs", other[1] / statistics.mean(ours[1:])),
                ):
                    table.setdefault(name, []).append(value)
            show(f"{count:,} JPEG files of {size[0]}x{size[1]}, at 3x{side}x{side}", table, 2)


def train_part(net: str, args: argparse.Namespace, work: str, *more: str) -> dict:
    """Train on a part of Fashion-MNIST for which an epoch takes some seconds; returns the result."""
    part = Path(work) / f"{net}.npz"
    if not part.exists():
        split, count = Idx(root=str(args.idx)).read().splits["train"], IMAGES[net]
        cuts = {"train": slice(0, count), "val": slice(count, count + 256)}
        arrays = {f"x_{name}": split.images[cut] for name, cut in cuts.items()}
        np.savez(part, **arrays, **{f"y_{name}": split.targets["labels"].numpy()[cut] for name, cut in cuts.items()})
    command = [sys.executable, "-m", "cnnrun", "train", str(NETS / f"{net}.yaml"), f"data.source={{arrays: {part}}}"]
    command += ["--json", "--runs", f"{work}/runs", *more]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    return json.loads(done.stdout)


def wait(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as work:
        shares: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for net in IMAGES:
                result = train_part(net, args, work)
                shares.setdefault(f"{net}, % of time waiting", []).append(100 * result["data_wait_share"])
        show("waiting for data, Fashion-MNIST", shares, 2)


def prefetch(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory() as work:
        speed: dict[str, list[float]] = {}
        for _ in range(args.rounds):
            for ahead in (0, 2, 8):
                result = train_part("lenet", args, work, f"data.prefetch={ahead}")
                speed.setdefault(f"prefetch {ahead}: images/s", []).append(result["images_per_second"])
                speed.setdefault(f"prefetch {ahead}: % waiting", []).append(100 * result["data_wait_share"])
        show("lenet on Fashion-MNIST in memory", speed, 1)


def write_shards(folder: Path, count: int) -> str:
    """Write synthetic images, 3x32x32 JPEG, in tars of 50,000: coloured ramps, one direction per class."""
    rng = np.random.default_rng(0)
    ramp = np.linspace(-1, 1, 32)
    for first in range(0, count, 50_000):
        with tarfile.open(folder / f"train-{first // 50_000:02}.tar", "w") as archive:
            for number in range(first, min(count, first + 50_000)):
                angle, colour = number % 4 * np.pi / 4 + rng.normal(0, 0.1), rng.uniform(20, 120, 3)
                plane = np.cos(angle) * ramp[:, None] + np.sin(angle) * ramp[None, :]
                pixels = 128 + plane[..., None] * colour + rng.normal(0, 8, (32, 32, 1))
                buffer = io.BytesIO()
                Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(buffer, "JPEG", quality=80)
                for extension, data in (("cls", str(number % 4).encode()), ("jpg", buffer.getvalue())):
                    member = tarfile.TarInfo(f"{number:08}.{extension}")
                    member.size = len(data)
                    archive.addfile(member, io.BytesIO(data))
    return f"{folder}/train-{{00..{(count - 1) // 50_000:02}}}.tar"


MEMORY_LOG = """
import json, sys
from pathlib import Path
import torch
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.learner import Learner
from cnnrun.training import loop
from cnnrun.base.process_settings import keep_freed_memory
from cnnrun.experiment.config_file import read_config
keep_freed_memory()
update, seen = Learner.update_weights, []
def watched(self, step, factor):
    update(self, step, factor)
    if step % 100 == 99:
        seen.append(int(Path("/proc/self/statm").read_text().split()[1]) * 4096 / 2**20)
    if step == 1499:
        high = [line for line in Path("/proc/self/status").read_text().splitlines() if "VmHWM" in line][0]
        print(json.dumps({"resident": seen, "peak": int(high.split()[1]) / 1024}))
        sys.stdout.flush()
        import os
        os._exit(0)
Learner.update_weights = watched
train_run(read_config(Path(sys.argv[1])), Path(sys.argv[2]), torch.device("cpu"), resume=False)
"""


def memory(args: argparse.Namespace) -> None:
    with tempfile.TemporaryDirectory(dir=args.work) as work:
        for count in (10_000, 1_000_000):
            folder = Path(work) / str(count)
            folder.mkdir()
            urls = write_shards(folder, count)
            config = folder / "c.yaml"
            config.write_text(
                f"task: classify\ndata:\n  source: {{shards: '{urls}'}}\n  image: {{size: 32, channels: 3}}\n"
                f"  augment: {{flip: horizontal, shift: 0.1}}\n  split: {{val: 0.02}}\n  memory_gib: 0.06\n"
                f"  cache: disk\n  cache_dir: {work}/cache\n"
                "model:\n  - conv: {out_channels: 8, stride: 2}\n  - flatten\n"
                "train: {epochs: 1000, batch: 128}\n"
            )
            for attempt in ("decoding and training", "training alone"):
                began = time.perf_counter()
                done = subprocess.run(
                    [sys.executable, "-c", MEMORY_LOG, str(config), f"{work}/runs"], capture_output=True, text=True
                )
                if done.returncode:
                    raise RuntimeError(done.stderr[-2000:])
                result = json.loads(done.stdout.splitlines()[-1])
                resident = result["resident"]
                print(
                    f"  {count:>9,} images, {attempt}: resident {statistics.median(resident):,.0f} MiB, the median "
                    f"of {len(resident)} readings ({min(resident):,.0f} .. {max(resident):,.0f}), "
                    f"peak {result['peak']:,.0f} MiB, {time.perf_counter() - began:.0f} s",
                    flush=True,
                )


PARTS: dict[str, Callable[[argparse.Namespace], None]] = {
    "path": path, "jpeg": jpeg, "wait": wait, "prefetch": prefetch, "memory": memory
}  # fmt: skip


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--only", nargs="*", choices=list(PARTS), default=list(PARTS))
    parser.add_argument("--idx", type=Path, default=Path("data/fashion-mnist"))
    parser.add_argument("--work", help="a folder with room for a million images (8 GiB)")
    args = parser.parse_args()
    keep_freed_memory()
    print(f"torch {torch.__version__}, {os.cpu_count()} cores, {args.rounds} rounds, interleaved")
    for name in args.only:
        PARTS[name](args)


if __name__ == "__main__":
    main()
