"""An explanation from start to end: open a run, choose its images, explain it by a method, write what that made."""

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

_BY = "cnnrun explain"  # what drawings say of themselves
_COLUMNS = 8  # checkpoints that are shown, those of the beginning closer together
_ALL = 2**62  # more images than any split has


@dataclass(frozen=True)
class Selection:
    """Which images are explained: files, samples of a split by number, or else the split's first ones."""

    split: str | None = None
    count: int = 8
    numbers: Sequence[int] = ()
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class OpenRun:
    """A run with its network; its data is opened once it is needed."""

    experiment: Experiment
    subject: Subject
    runs: Path
    device: torch.device

    @property
    def batch(self) -> int:
        """Images that are run together over a whole split."""
        return self.experiment.train.batch

    def load_data(self, split: str | None, with_train: bool = False) -> tuple[str, Dataset]:
        """The split by name, by default test or else val, and the data decoded: of other splits train if asked for."""
        return prepare_eval_data(self.experiment, self.subject.trained, split, _ALL if with_train else 0)

    def load_examples(self, split: str | None) -> Examples:
        """A whole split."""
        name, data = self.load_data(split)
        return data.splits[name]

    def load_images(self, selection: Selection) -> ImagesToExplain:
        """The selected images. Raises ConfigError, DataError."""
        if not selection.files:
            return self._images_of_split(selection)
        if selection.numbers or selection.split:
            raise ConfigError("--file and --split or --image: give one of them")
        paths = list(list_images(selection.files))
        if len(paths) > selection.count:
            say(f"the first {selection.count} of {len(paths):,} files; --images shows more")
        return _images_of_files(self.subject, paths[: selection.count])

    def _images_of_split(self, selection: Selection) -> ImagesToExplain:
        name, data = self.load_data(selection.split)
        given, examples = self.subject.trained, data.splits[name]
        numbers = list(selection.numbers) or list(range(min(selection.count, len(examples))))
        if wrong := [number for number in numbers if not 0 <= number < len(examples)]:
            raise ConfigError(f"--image {wrong[0]}: split {name} has {len(examples)} pictures, from 0")
        index = torch.tensor(numbers)
        targets = examples.batch_targets(index, given.device)
        words = given.task.describe_targets(targets, given.facts)
        pixels = examples.load_images(index).to(given.device).float()
        return ImagesToExplain(pixels, [examples.sample_name(number) for number in numbers], words, targets)

    def history(self) -> Iterator[tuple[int, Subject]]:
        """The step and the network of some checkpoints that the run kept. Raises ConfigError, CheckpointError."""
        run = self.subject.trained.run
        saved = list_checkpoints(run / CHECKPOINTS)
        if len(saved) < 2:
            raise ConfigError(f"{run}: one checkpoint is kept; train with train.keep=100 to see more")
        chosen = [saved[int(place) - 1] for place in np.unique(np.geomspace(1, len(saved), _COLUMNS).round())]
        opened = (open_run(path, self.runs, self.device).subject for path in chosen)
        return ((subject.trained.step, subject) for subject in opened)


def open_run(target: Path | None, root: Path, device: torch.device) -> OpenRun:
    """Open a run, checkpoint or config's newest run; of None the newest run below `root`. Raises CheckpointError."""
    experiment, given = open_trained(target, root, device)
    return OpenRun(experiment, Subject(given, experiment.model.layers), root, device)


def _images_of_files(subject: Subject, paths: Sequence[Path]) -> ImagesToExplain:
    given = subject.trained
    channels, height, width = given.facts.image
    pixels = [load_with_view(path, (height, width), channels, given.image)[0] for path in paths]
    pixels_NCHW = torch.from_numpy(np.stack(pixels)).to(given.device).permute(0, 3, 1, 2).float()
    return ImagesToExplain(pixels_NCHW, [path.name for path in paths], [""] * len(paths))


def explain_run(
    method: ExplainMethod, target: Path | None, root: Path, device: torch.device, out: Path | None = None
) -> dict[str, Any]:
    """Explain a run by a method and write what it made, by default in the run's folder; returns its numbers.

    Raises CheckpointError, ConfigError, DataError, StorageError.
    """
    run = open_run(target, root, device)
    if out and method.suffixes:
        if out.suffix not in method.suffixes:
            raise ConfigError(f"--out {out}: give a file that ends in {' or '.join(method.suffixes)}")
        if out.exists():
            raise ConfigError(f"{escape(str(out))}: is there already; choose another")
    explanation = method.explain(run)
    if not method.suffixes:
        return write_explanation(run, method.kind, explanation, out)
    name = f"{method.kind}-{_plain(explanation.data['layer'])}{method.suffixes[0]}"
    return _write_with_arrays(run, method.kind, explanation, out or run.subject.trained.run / EXPLAIN / name)


def _write_with_arrays(run: OpenRun, name: str, explanation: Explanation, path: Path) -> dict[str, Any]:
    """Write the arrays to `path` and the picture beside them."""
    packed = _packed(explanation.arrays, path.suffix)
    about = write_explanation(run, name, explanation, path.with_suffix(".png"))
    write_file(path, packed)
    return {"features": str(path), **about}


def write_explanation(run: OpenRun, name: str, explanation: Explanation, out: Path | None = None) -> dict[str, Any]:
    """Write an explanation as PNG and for TensorBoard; returns its numbers. Raises StorageError, ConfigError."""
    given = run.subject.trained
    layer = f"-{_plain(explanation.data['layer'])}" if "layer" in explanation.data else ""
    path = out or given.run / EXPLAIN / f"{name}{layer}.png"
    pixels = add_caption(explanation.image, explanation.caption)
    if path.parent == given.run / EXPLAIN:
        _folder_in(given.run).remove_abandoned()
    write_png(path, pixels, _BY)
    _to_board(given.run, f"explain/{name}{layer}", pixels, given.step)
    about = {"run": str(given.run), "step": given.step, "path": str(path)}
    return about | {"caption": explanation.caption, "table": explanation.table} | explanation.data


def _folder_in(run: Path) -> Folder:
    """The run's folder for explanations. Raises StorageError, CheckpointError."""
    with storage_errors(run / EXPLAIN, 0):
        return Folder(run).open_child(EXPLAIN, create=True)


def _to_board(run: Path, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Show it in TensorBoard, beside the run; where that fails it is said."""
    try:
        with closing(EventFile(_folder_in(run))) as board:
            board.add_image(name, pixels, step)
    except InterruptionError:
        raise
    except Exception as error:
        say(f"{run / EXPLAIN}: nothing for TensorBoard: {escape(str(error))}")


def _plain(path: str) -> str:
    """A layer's path as part of a file's name."""
    return re.sub(r"[^\w]+", "-", path).strip("-")


def _packed(arrays: dict[str, NDArray[Any]], suffix: str) -> bytes:
    """Arrays as the bytes of a file; in Parquet a row a picture."""
    made = io.BytesIO()
    if suffix == ".npz":
        np.savez(made, **arrays)  # type: ignore[arg-type]
        return made.getvalue()
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'cnnrun[parquet]'") from None
    rows = len(arrays["features"])
    columns = {name: values.tolist() + [None] * (rows - len(values)) for name, values in arrays.items()}
    columns["picture"] = [escape(name) for name in columns["picture"]]  # Parquet has no place for what is no text
    pq.write_table(pa.table(columns), made)
    return made.getvalue()
