"""Configs of networks that train in seconds: of digits, with links by name, and one of each task."""

from __future__ import annotations

from pathlib import Path

from cnnrun.experiment import schema

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
CONFIG = """
task: classify
data:
  source: {{folder: '{pictures}'}}
  image: {{size: 8, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
  - linear: {{out_features: 8, activation: relu}}
train: {{epochs: 3, batch: 8, monitor: val/accuracy, save_every: 4, early_stop: {{patience: 3}}}}
"""
DETECT = """
task: {{detect: {{levels: [p3], channels: 4, depth: 1, most: 8}}}}
data:
  source: {{voc: '{scenes}'}}
  image: {{size: 16, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, stride: 2, norm: batch, activation: relu}}
  - conv: {{name: p3, out_channels: 4, stride: 2, norm: batch, activation: relu}}
  - conv: {{out_channels: 4}}
train: {{epochs: 3, batch: 8, optimizer: {{adamw: 0.01}}, monitor: val/loss, save_every: 4}}
"""
VERIFY = """
task: {{verify: {{dimension: 6, loss: {{arcface: {{warmup: 0.9}}}}}}}}
data:
  source: {{folder: '{people}'}}
  image: {{size: 8, channels: 1}}
  split: {{by: label, val: 0.3}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
train: {{epochs: 3, batch: 8, sampler: {{identities: 2}}, monitor: val/eer, save_every: 4}}
"""
REGRESS = """
task: {{regress: {{angles: {{turn: 360}}, loss: gaussian}}}}
data:
  source: {{table: {{path: '{numbers}', numbers: [level, turn]}}}}
  image: {{size: 8, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
train: {{epochs: 3, batch: 8, monitor: val/mae, save_every: 4}}
"""
LABELS = """
task: multilabel
data:
  source: {{table: {{path: '{numbers}', labels: marks}}}}
  image: {{size: 8, channels: 1}}
  split: {{val: 0.2}}
  cache_dir: '{cache}'
model:
  - conv: {{out_channels: 4, norm: batch, activation: relu}}
  - flatten
train: {{epochs: 3, batch: 8, monitor: val/mAP, save_every: 4}}
"""
KINDS = {
    "ema": ["train.ema={decay: 0.9}", "train.optimizer={adamw: 0.01}"],
    "dropout": ["data.augment={shift: 0.2, noise: 8}"],
    "detect": ["data.augment={flip: both, rotate: 9, mosaic: 0.5}", "train.ema={decay: 0.9}"],
    "verify": ["data.augment={shift: 0.1, flip: horizontal}", "train.ema={decay: 0.9}"],
    "regress": ["data.augment={shift: 0.1}", "train.optimizer={adamw: 0.01}"],
    "multilabel": ["data.augment={mixup: 0.4}", "train.ema={decay: 0.9}"],
    "mixup": ["data.augment={mixup: 0.4, rotate: 9}", "train.sampler=balanced", "train.clip=1.0"],
}


def case_config(folder: Path, root: Path, case: tuple[int, int, str]) -> schema.Experiment:
    """A case's experiment, with a cache of its own in `root`, so that its pictures are decoded there."""
    workers, accumulate, kind = case
    text = {"detect": DETECT, "verify": VERIFY, "regress": REGRESS, "multilabel": LABELS}.get(kind, CONFIG)
    places = {name: folder.parent / name for name in ("scenes", "people")} | {"numbers": folder.parent / "numbers.csv"}
    text = text.format(pictures=folder, cache=root / "cache", **places)
    if kind == "dropout":
        text = text.replace("  - flatten\n", "  - dropout: 0.3\n  - flatten\n")
    cached = "disk" if accumulate == 1 else "none"
    more = ["name=c", f"data.workers={workers}", f"train.accumulate={accumulate}", f"data.cache={cached}"]
    return schema.parse(text, "c.yaml", [*KINDS[kind], *more])
