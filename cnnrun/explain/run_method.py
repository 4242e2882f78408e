"""Explanations of a run: open it, load the images, apply a method, write the result."""

from __future__ import annotations

import io
import re
from collections.abc import Iterator, Sequence
from contextlib import closing
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.atomic_files import Folder, storage_errors, write_file
from cnnrun.base.errors import ConfigError, InterruptionError, escape
from cnnrun.base.progress import say
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.image_files import load_with_view
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.open_run import open_trained, prepare_eval_data
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.contact_sheet import write_png
from cnnrun.explain.figures.tiles import add_caption
from cnnrun.explain.method_base import ExplainMethod
from cnnrun.explain.subject import Explanation, ImagesToExplain, Subject
from cnnrun.training.checkpoints import list_checkpoints
from cnnrun.training.event_file import EventFile
from cnnrun.training.run_records import CHECKPOINTS, EXPLAIN

_GENERATOR = "cnnrun explain"  # written into the PNG files, which marks them as ours
_MAX_CHECKPOINTS = 8  # shown of a run, more closely spaced early in training
_ALL_IMAGES = 2**62  # more images than any split has


@dataclass(frozen=True)
class Selection:
    """Images to explain: files, samples of a split by number, or else the split's first ones."""

    split: str | None = None
    count: int = 8
    numbers: Sequence[int] = ()
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class OpenRun:
    """A run with its network; data is loaded on demand."""

    experiment: Experiment
    subject: Subject
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
        if selection.numbers or selection.split:
            raise ConfigError("--file and --split or --image: give one of them")
        paths = list(list_images(selection.files))
        if len(paths) > selection.count:
            say(f"using the first {selection.count} of {len(paths):,} files; --images takes more")
        return _load_file_images(self.subject, paths[: selection.count])

    def _load_split_images(self, selection: Selection) -> ImagesToExplain:
        split_name, data = self.load_data(selection.split)
        trained, examples = self.subject.trained, data.splits[split_name]
        indices = list(selection.numbers) or list(range(min(selection.count, len(examples))))
        if invalid := [index for index in indices if not 0 <= index < len(examples)]:
            raise ConfigError(f"--image {invalid[0]}: split {split_name} has {len(examples)} images, numbered from 0")
        index_B = torch.tensor(indices)
        targets = examples.batch_targets(index_B, trained.device)
        target_texts = trained.task.describe_targets(targets, trained.facts)
        pixels = examples.load_images(index_B).to(trained.device).float()
        return ImagesToExplain(pixels, [examples.sample_name(index) for index in indices], target_texts, targets)

    def history(self) -> Iterator[tuple[int, Subject]]:
        """Open some of the run's checkpoints, each with its step. Raises ConfigError, CheckpointError."""
        run = self.subject.trained.run
        checkpoints = list_checkpoints(run / CHECKPOINTS)
        if len(checkpoints) < 2:
            raise ConfigError(f"{run}: has only one checkpoint; train with train.keep=100 to keep more")
        numbers = np.unique(np.geomspace(1, len(checkpoints), _MAX_CHECKPOINTS).round())
        selected = [checkpoints[int(number) - 1] for number in numbers]
        subjects = (open_run(path, self.runs, self.device).subject for path in selected)
        return ((subject.trained.step, subject) for subject in subjects)


def open_run(run: Path | None, runs: Path, device: torch.device) -> OpenRun:
    """Open a run, a checkpoint or the newest run of a config; by default the newest run. Raises CheckpointError."""
    experiment, trained = open_trained(run, runs, device)
    return OpenRun(experiment, Subject(trained, experiment.model.layers), runs, device)


def _load_file_images(subject: Subject, paths: Sequence[Path]) -> ImagesToExplain:
    trained = subject.trained
    channels, height, width = trained.facts.image
    pixels = [load_with_view(path, (height, width), channels, trained.image)[0] for path in paths]
    pixels_NCHW = torch.from_numpy(np.stack(pixels)).to(trained.device).permute(0, 3, 1, 2).float()
    return ImagesToExplain(pixels_NCHW, [path.name for path in paths], [""] * len(paths))


def explain_run(
    method: ExplainMethod, run_path: Path | None, runs: Path, device: torch.device, out: Path | None = None
) -> dict[str, Any]:
    """Explain a run by a method and write the result, by default into the run's folder; returns its data.

    Raises CheckpointError, ConfigError, DataError, StorageError.
    """
    run = open_run(run_path, runs, device)
    if out and method.suffixes:
        if out.suffix not in method.suffixes:
            raise ConfigError(f"--out {out}: give a file that ends in {' or '.join(method.suffixes)}")
        if out.exists():
            raise ConfigError(f"--out {escape(str(out))}: already exists; choose another")
    explanation = method.explain(run)
    if not method.suffixes:
        return write_explanation(run, method.kind, explanation, out)
    name = f"{method.kind}-{_file_name_part(explanation.data['layer'])}{method.suffixes[0]}"
    return _write_arrays(run, method.kind, explanation, out or run.subject.trained.run / EXPLAIN / name)


def _write_arrays(run: OpenRun, name: str, explanation: Explanation, path: Path) -> dict[str, Any]:
    """Write the arrays to `path` and the image beside them."""
    content = _encode_arrays(explanation.arrays, path.suffix)
    data = write_explanation(run, name, explanation, path.with_suffix(".png"))
    write_file(path, content)
    return {"features": str(path), **data}


def write_explanation(run: OpenRun, name: str, explanation: Explanation, out: Path | None = None) -> dict[str, Any]:
    """Write an explanation as PNG and for TensorBoard; returns its data. Raises StorageError, ConfigError."""
    trained = run.subject.trained
    layer = f"-{_file_name_part(explanation.data['layer'])}" if "layer" in explanation.data else ""
    path = out or trained.run / EXPLAIN / f"{name}{layer}.png"
    pixels = add_caption(explanation.image, explanation.caption)
    if path.parent == trained.run / EXPLAIN:
        _open_explain_folder(trained.run).remove_abandoned()
    write_png(path, pixels, _GENERATOR)
    _write_event(trained.run, f"explain/{name}{layer}", pixels, trained.step)
    data = {"run": str(trained.run), "step": trained.step, "path": str(path)}
    return data | {"caption": explanation.caption, "table": explanation.table} | explanation.data


def _open_explain_folder(run: Path) -> Folder:
    """Open the run's folder for explanations, creating it if needed. Raises StorageError, CheckpointError."""
    with storage_errors(run / EXPLAIN, 0):
        return Folder(run).open_child(EXPLAIN, create=True)


def _write_event(run: Path, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Write an image for TensorBoard into the run; a failure is only printed."""
    try:
        with closing(EventFile(_open_explain_folder(run))) as board:
            board.add_image(name, pixels, step)
    except InterruptionError:
        raise
    except Exception as error:
        say(f"{run / EXPLAIN}: nothing written for TensorBoard: {escape(str(error))}")


def _file_name_part(path: str) -> str:
    """Convert a layer's path to a part of a file name."""
    return re.sub(r"[^\w]+", "-", path).strip("-")


def _encode_arrays(arrays: dict[str, NDArray[Any]], suffix: str) -> bytes:
    """Encode arrays as .npz or as Parquet with a row for each image. Raises ConfigError without pyarrow."""
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'cnnrun[parquet]'") from None
    rows = len(arrays["features"])
    columns = {name: values.tolist() + [None] * (rows - len(values)) for name, values in arrays.items()}
    columns["picture"] = [escape(name) for name in columns["picture"]]  # Parquet takes only valid UTF-8
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
