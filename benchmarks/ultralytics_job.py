"""Train in Ultralytics' way: the trainer, data and augmentation of its classify task, with one of our networks.

    python benchmarks/ultralytics_job.py BASELINES NET EPOCHS FOLDER [WORKERS]

BASELINES holds nets.py. Ultralytics trains on 32 x 32 colours at least: the network gets one channel and 28 x 28 of it.
Of its augmentation the random resized crop and the flip remain. Nothing is downloaded or written outside temporary
folders.
"""

from __future__ import annotations

import os
import sys
import tempfile
import time
from importlib import import_module

from torch import Tensor, nn

os.environ |= {"YOLO_OFFLINE": "true", "YOLO_CONFIG_DIR": tempfile.mkdtemp()}  # read when it is imported

from ultralytics.models.yolo.classify import ClassificationTrainer
from ultralytics.nn.tasks import ClassificationModel


class Model(ClassificationModel):
    """Ultralytics' classification model, with another network in place of its own."""

    def __init__(self, network: nn.Module, class_count: int) -> None:
        super().__init__("yolo11n-cls.yaml", nc=class_count, verbose=False)
        self.model = nn.Sequential(network)

    def predict(self, x: Tensor, *_: object, **__: object) -> Tensor:
        """Return the logits [B, K]."""
        return self.model(x[:, :1, 2:30, 2:30])


def main() -> None:
    baselines, net, epochs, folder = sys.argv[1:5]
    sys.path.insert(0, baselines)
    build_network = import_module("nets").NETS[net]

    class Trainer(ClassificationTrainer):
        def get_model(self, *_: object, **__: object) -> nn.Module:
            return Model(build_network(), self.data["nc"])

    start, count = 0.0, 0

    def begin(_: object) -> None:
        nonlocal start, count
        start, count = time.perf_counter(), 0

    def add_batch(trainer: Trainer) -> None:
        nonlocal count
        count += trainer.batch_size

    def finish(_: object) -> None:
        print(f"\nultralytics train {count / (time.perf_counter() - start):.0f} img/s", flush=True)

    with tempfile.TemporaryDirectory() as project:
        settings = {"data": folder, "epochs": int(epochs), "batch": 128, "imgsz": 32, "device": "cpu"}
        settings |= {"workers": int(sys.argv[5]) if len(sys.argv) > 5 else 2, "optimizer": "SGD", "lr0": 0.05}
        settings |= {"auto_augment": None, "erasing": 0.0, "hsv_h": 0.0, "hsv_s": 0.0, "hsv_v": 0.0}
        settings |= {"model": "yolo11n-cls.yaml", "project": project, "plots": False, "save": False, "val": False}
        trainer = Trainer(overrides=settings)
        trainer.add_callback("on_train_epoch_start", begin)
        trainer.add_callback("on_train_batch_end", add_batch)
        trainer.add_callback("on_train_epoch_end", finish)
        trainer.train()


if __name__ == "__main__":
    main()
