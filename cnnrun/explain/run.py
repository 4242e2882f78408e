"""A run opened for explanations: its network, and the images to explain."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError
from cnnrun.base.progress import say
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.image_files import load_with_view, to_network_batch
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.subject import ExplainedNetwork, ImagesToExplain
from cnnrun.training.checkpoints import list_checkpoints
from cnnrun.training.run_records import CHECKPOINTS

_MAX_CHECKPOINTS = 8  # checkpoints that `evolve` shows, more closely spaced early in training
_ALL_IMAGES = 2**62  # more images than any split has


@dataclass(frozen=True)
class Selection:
    """Images to explain: files, samples of a split by index, or else the split's first ones."""

    split: str | None = None
    count: int = 8
    indices: Sequence[int] = ()
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class OpenRun:
    """A run with its network; data is loaded on demand."""

    experiment: Experiment
    subject: ExplainedNetwork
    runs: Path
    device: torch.device

    @property
    def batch(self) -> int:
        """Batch size for passes over a whole split."""
        return self.experiment.train.batch

    def load_data(self, split: str | None, with_train: bool = False) -> tuple[str, Dataset]:
        """Load a split, by default test or else val, and train too if `with_train`; returns its name and the data."""
        return prepare_eval_data(self.experiment, self.subject.trained, split, _ALL_IMAGES if with_train else 0)

    def load_examples(self, split: str | None) -> Examples:
        """Load a whole split."""
        name, data = self.load_data(split)
        return data.splits[name]

    def load_images(self, selection: Selection) -> ImagesToExplain:
        """Load the selected images. Raises ConfigError, DataError."""
        if not selection.files:
            return self._load_split_images(selection)
        if selection.indices or selection.split:
            raise ConfigError("--file and --split or --image: give one of them")
        paths = list(list_images(selection.files))
        if len(paths) > selection.count:
            say(f"using the first {selection.count} of {len(paths):,} files; give a larger --images to use more")
        return _load_file_images(self.subject, paths[: selection.count])

    def _load_split_images(self, selection: Selection) -> ImagesToExplain:
        split_name, data = self.load_data(selection.split)
        trained, examples = self.subject.trained, data.splits[split_name]
        indices = list(selection.indices) or list(range(min(selection.count, len(examples))))
        if invalid := [index for index in indices if not 0 <= index < len(examples)]:
            images = format_count(len(examples), "image")
            raise ConfigError(f"--image {invalid[0]}: split {split_name} has {images}, numbered from 0")
        index_B = torch.tensor(indices)
        targets = examples.batch_targets(index_B, trained.device)
        target_texts = trained.task.showing.describe_targets(targets)
        pixels = examples.load_images(index_B).to(trained.device).float()
        return ImagesToExplain(pixels, [examples.sample_name(index) for index in indices], target_texts, targets)

    def history(self) -> Iterator[tuple[int, ExplainedNetwork]]:
        """Open some of the run's checkpoints, each with its step. Raises ConfigError, CheckpointError."""
        run = self.subject.trained.run
        checkpoints = list_checkpoints(run / CHECKPOINTS)
        if len(checkpoints) < 2:
            raise ConfigError(f"{run}: has only one checkpoint; train with train.keep=100 to keep more")
        positions = np.unique(np.geomspace(1, len(checkpoints), _MAX_CHECKPOINTS).round())
        selected = [checkpoints[int(position) - 1] for position in positions]
        subjects = (open_run(path, self.runs, self.device).subject for path in selected)
        return ((subject.trained.step, subject) for subject in subjects)


def open_run(run: Path | None, runs: Path, device: torch.device) -> OpenRun:
    """Open a run, a checkpoint or the newest run of a config; by default the newest run. Raises CheckpointError."""
    experiment, trained = open_trained(run, runs, device)
    return OpenRun(experiment, ExplainedNetwork(trained, experiment.model.layers), runs, device)


def _load_file_images(subject: ExplainedNetwork, paths: Sequence[Path]) -> ImagesToExplain:
    trained = subject.trained
    channels, height, width = trained.facts.image_shape
    pixels = [load_with_view(path, (height, width), channels, trained.image)[0] for path in paths]
    pixels_NCHW = to_network_batch(pixels, trained.image, trained.device)
    return ImagesToExplain(pixels_NCHW, [path.name for path in paths], [""] * len(paths))
