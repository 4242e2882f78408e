"""Configs that train in seconds: the digits, a network with links by name, and one config for each task."""

from __future__ import annotations

from pathlib import Path

from cnnrun.experiment import config_file, schema

TINY = """
task: classify
data: {source: digits, split: {val: 0.2, test: 0.2}}
model:
  - conv: {out_channels: 4, norm: batch, activation: relu}
  - max_pool
  - flatten
  - dropout: 0.1
  - linear: {out_features: 16, activation: relu}
train: {epochs: 2, batch: 64, monitor: val/accuracy}
"""
LINKED = """
task: classify
name: linked
data: {source: digits, split: {val: 0.2, test: 0.1}}
model:
  - conv: {out_channels: 8, activation: relu, name: stem}
  - max_pool
  - parallel:
      branches:
        - [{conv: {out_channels: 4, kernel_size: 1, activation: relu}}]
        - [{conv: {out_channels: 4, norm: batch, activation: relu}}, {conv: {out_channels: 4, activation: relu}}]
      merge: concat
  - residual: [{conv: {out_channels: 8, norm: batch, activation: relu}}, {conv: {out_channels: 8, norm: batch}}]
  - repeat: {times: 2, layers: [{conv: {out_channels: 8, activation: relu}}]}
  - upsample: {scale_factor: 2, name: up}
  - concat: [up, stem]
  - conv: {out_channels: 12, activation: relu, name: last}
  - global_avg_pool
  - dropout: 0.1
train: {epochs: 4, batch: 64, keep: 9, monitor: val/accuracy}
"""
CONFIG = """task: {task}
data:
  source: {source}
  image: {{size: {size}, channels: 1}}
  split: {split}
  cache_dir: '{cache}'
{model}train: {{epochs: 3, batch: 8, save_every: 4, {train}}}
"""
LAYERS = """model:
  - conv: {out_channels: 4, norm: batch, activation: relu}
  - flatten
"""
LINEAR = "  - linear: {out_features: 8, activation: relu}\n"
DETECTOR = """model:
  - conv: {out_channels: 4, stride: 2, norm: batch, activation: relu}
  - conv: {name: p3, out_channels: 4, stride: 2, norm: batch, activation: relu}
  - conv: {out_channels: 4}
"""
SEGMENTER = """model:
  - conv: {out_channels: 8, norm: batch, activation: relu}
  - conv: {out_channels: 8, stride: 2, norm: batch, activation: relu}
"""
# Half of them train in bfloat16, which must be repeated, resumed and exported as exactly.
KINDS = {
    "ema": ["train.ema={decay: 0.9}", "train.optimizer={adamw: 0.01}", "train.precision=float32"],
    "dropout": ["data.augment={shift: 0.2, noise: 8}", "train.precision=bfloat16"],
    "detect": [
        "data.augment={flip: both, rotate: 9, mosaic: 0.5}",
        "train.ema={decay: 0.9}",
        "train.precision=bfloat16",
    ],
    "segment": [
        "data.augment={flip: both, rotate: 9, mosaic: 0.5}",
        "train.ema={decay: 0.9}",
        "train.precision=float32",
    ],
    "verify": ["data.augment={shift: 0.1, flip: horizontal}", "train.ema={decay: 0.9}", "train.precision=bfloat16"],
    "regress": ["data.augment={shift: 0.1}", "train.optimizer={adamw: 0.01}", "train.precision=float32"],
    "multilabel": ["data.augment={mixup: 0.4}", "train.ema={decay: 0.9}", "train.precision=bfloat16"],
    "mixup": [
        "data.augment={mixup: 0.4, rotate: 9}",
        "train.sampler=balanced",
        "train.clip=1.0",
        "train.precision=float32",
    ],
}


def tiny_experiment(*overrides: str) -> schema.Experiment:
    """Parse TINY with these overrides."""
    return config_file.parse_config(TINY, "tiny.yaml", ["name=tiny", *overrides])


def task_config(kind: str, pictures: Path, cache: Path) -> str:
    """Config text of a task on the files of `write_pictures`. Any kind that is no task gives a classifier."""
    classifier: dict[str, object] = {
        "task": "classify",
        "source": f"{{folder: '{pictures}'}}",
        "split": "{val: 0.2}",
        "size": 8,
        "model": LAYERS,
        "train": "monitor: val/accuracy, early_stop: {patience: 3}",
    }
    settings = classifier | _task_settings(pictures.parent).get(kind, {"model": LAYERS + LINEAR})
    return CONFIG.format(**settings, cache=cache)


def _task_settings(folder: Path) -> dict[str, dict[str, object]]:
    """Settings of each task that replace those of the classifier."""
    numbers = folder / "numbers.csv"
    return {
        "detect": {
            "task": "{detect: {levels: [p3], channels: 4, depth: 1, most: 8}}",
            "source": f"{{voc: '{folder / 'scenes'}'}}",
            "size": 16,
            "model": DETECTOR,
            "train": "optimizer: {adamw: 0.01}, monitor: val/loss",
        },
        "segment": {
            "task": "segment",
            "source": f"{{masks: {{images: '{folder / 'masks' / 'images'}', masks: '{folder / 'masks' / 'masks'}', "
            "classes: [floor, box]}}",
            "size": 16,
            "model": SEGMENTER,
            "train": "optimizer: {adamw: 0.01}, monitor: val/mean_iou",
        },
        "verify": {
            "task": "{verify: {dimension: 6, loss: {arcface: {warmup: 0.9}}}}",
            "source": f"{{folder: '{folder / 'people'}'}}",
            "split": "{by: label, val: 0.3}",
            "train": "sampler: {identities: 2}, monitor: val/eer",
        },
        "regress": {
            "task": "{regress: {angles: {turn: 360}, loss: gaussian}}",
            "source": f"{{table: {{path: '{numbers}', numbers: [level, turn]}}}}",
            "train": "monitor: val/mae",
        },
        "multilabel": {
            "task": "multilabel",
            "source": f"{{table: {{path: '{numbers}', labels: marks}}}}",
            "train": "monitor: val/mAP",
        },
    }


def case_config(folder: Path, root: Path, case: tuple[int, int, str]) -> schema.Experiment:
    """Experiment of a case with its own cache in `root`, so that the images are decoded again."""
    workers, accumulate, kind = case
    text = task_config(kind, folder, root / "cache")
    if kind == "dropout":
        text = text.replace("  - flatten\n", "  - dropout: 0.3\n  - flatten\n")
    cached = "disk" if accumulate == 1 else "none"
    more = ["name=c", f"data.workers={workers}", f"train.accumulate={accumulate}", f"data.cache={cached}"]
    return config_file.parse_config(text, "c.yaml", [*KINDS[kind], *more])
