"""What the `explain` commands do: a run opened, its pictures chosen, what is seen of it written beside the run."""

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
from cnnrun.base.errors import ConfigError, Interrupted, printable
from cnnrun.base.progress import say
from cnnrun.data.dataset import Dataset, Examples
from cnnrun.data.image_files import viewed
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.assemble import eval_data, trained
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.contact_sheet import write_png
from cnnrun.explain.figures.tiles import captioned
from cnnrun.explain.layer_names import Rule
from cnnrun.explain.methods.deconv import deconv as deconv_of
from cnnrun.explain.methods.detections import assign as assign_of
from cnnrun.explain.methods.detections import found as found_of
from cnnrun.explain.methods.embed import Map
from cnnrun.explain.methods.embed import embed as embed_of
from cnnrun.explain.methods.evolve import evolve as evolve_of
from cnnrun.explain.methods.features import features as features_of
from cnnrun.explain.methods.filters import filters as filters_of
from cnnrun.explain.methods.gradients import gradcam as gradcam_of
from cnnrun.explain.methods.gradients import saliency as saliency_of
from cnnrun.explain.methods.invariance import invariance as invariance_of
from cnnrun.explain.methods.occlude import occlude as occlude_of
from cnnrun.explain.methods.top_patches import top as top_of
from cnnrun.explain.subject import Explanation, Shown, Subject
from cnnrun.training.checkpoints import generations
from cnnrun.training.event_file import EventFile
from cnnrun.training.run_records import CHECKPOINTS, EXPLAIN

_BY = "cnnrun explain"  # what drawings say of themselves
_COLUMNS = 8  # checkpoints that are shown, those of the beginning closer together


@dataclass(frozen=True)
class Asked:
    """What every explanation is asked: of which network, on which pictures, written where."""

    target: Path | None
    root: Path
    device: torch.device
    out: Path | None = None
    split: str | None = None
    count: int = 8
    numbers: Sequence[int] = ()
    files: Sequence[Path] = ()


@dataclass(frozen=True)
class Opened:
    """A run with its network, and how its data is opened once it is needed."""

    asked: Asked
    experiment: Experiment
    subject: Subject

    def data(self, split: str | None = None, at_least: int = 0) -> tuple[str, Dataset]:
        """The split asked for, and the data decoded; with less than `at_least` pictures, train as well."""
        return eval_data(self.experiment, self.subject.given, split or self.asked.split, at_least)

    def examples(self) -> Examples:
        """The whole split."""
        name, data = self.data()
        return data.splits[name]

    def shown(self) -> Shown:
        """The pictures asked for: files, numbers of a split's, or its first ones. Raises ConfigError, DataError."""
        given = self.subject.given
        if self.asked.files:
            if self.asked.numbers or self.asked.split:
                raise ConfigError("--file and --split or --picture: give one of them")
            paths = list(list_images(self.asked.files))
            if len(paths) > self.asked.count:
                say(f"the first {self.asked.count} of {len(paths):,} files; --pictures shows more")
            return _of_files(self.subject, paths[: self.asked.count])
        name, data = self.data()
        examples = data.splits[name]
        chosen = list(self.asked.numbers) or list(range(min(self.asked.count, len(examples))))
        if wrong := [each for each in chosen if not 0 <= each < len(examples)]:
            raise ConfigError(f"--picture {wrong[0]}: split {name} has {len(examples)} pictures, from 0")
        index = torch.tensor(chosen)
        targets = examples.targets_of(index, given.device)
        words = given.task.words(targets, given.facts)
        pixels = examples.take(index).to(given.device).float()
        return Shown(pixels, [examples.name(each) for each in chosen], words, targets)


def opened(asked: Asked) -> Opened:
    """The network asked for. Raises CheckpointError."""
    experiment, given = trained(asked.target, asked.root, asked.device)
    return Opened(asked, experiment, Subject(given, experiment.model.layers))


def _of_files(subject: Subject, paths: Sequence[Path]) -> Shown:
    given = subject.given
    channels, height, width = given.facts.image
    pixels = [viewed(path, (height, width), channels, given.image)[0] for path in paths]
    made = torch.from_numpy(np.stack(pixels)).to(given.device).permute(0, 3, 1, 2).float()
    return Shown(made, [path.name for path in paths], [""] * len(paths))


def filters(asked: Asked, layer: str | None) -> dict[str, Any]:
    """The kernels of a conv. Raises ConfigError, DataError."""
    run = opened(asked)
    return kept(run, "filters", filters_of(run.subject, layer))


def features(asked: Asked, layer: str | None) -> dict[str, Any]:
    """A layer's maps of the pictures asked for. Raises ConfigError, DataError."""
    run = opened(asked)
    run.subject.maps(layer)
    return kept(run, "features", features_of(run.subject, run.shown(), layer))


def top(asked: Asked, layer: str | None, channels: Sequence[int], most: int) -> dict[str, Any]:
    """The strongest patches of a split; of the first `most` channels where none is named. Raises ConfigError."""
    run = opened(asked)
    run.subject.channels(run.subject.maps(layer), channels)
    made = top_of(run.subject, run.examples(), layer, channels, most, run.experiment.train.batch)
    return kept(run, "top", made)


def deconv(asked: Asked, layer: str | None, channels: Sequence[int]) -> dict[str, Any]:
    """What the strongest cells stand for in the pictures asked for. Raises ConfigError, DataError."""
    run = opened(asked)
    run.subject.channels(run.subject.maps(layer), channels)
    return kept(run, "deconv", deconv_of(run.subject, run.shown(), layer, channels))


def occlude(
    asked: Asked, layer: str | None, target: str | None, size: int | None, stride: int | None
) -> dict[str, Any]:
    """What is said as a square moves; `size` and `stride` in pixels. Raises ConfigError, DataError."""
    run = opened(asked)
    run.subject.maps(layer)
    return kept(run, "occlude", occlude_of(run.subject, run.shown(), layer, target, size, stride))


def gradcam(asked: Asked, layer: str | None, target: str | None) -> dict[str, Any]:
    """Where a layer speaks for `target`, or for what the network says. Raises ConfigError, DataError."""
    run = opened(asked)
    run.subject.maps(layer)
    return kept(run, "gradcam", gradcam_of(run.subject, run.shown(), layer, target))


def saliency(asked: Asked, target: str | None, rule: Rule) -> dict[str, Any]:
    """The slopes of what is said, by each pixel; `rule` says what ReLUs hand back. Raises ConfigError, DataError."""
    run = opened(asked)
    return kept(run, "saliency", saliency_of(run.subject, run.shown(), target, rule))


def invariance(asked: Asked, layers: Sequence[str], target: str | None) -> dict[str, Any]:
    """Features and scores under shift, scale and rotation; layers need not give maps. Raises ConfigError, DataError."""
    run = opened(asked)
    for layer in layers:
        run.subject.any(layer)
    return kept(run, "invariance", invariance_of(run.subject, run.shown(), layers, target))


def evolve(asked: Asked, layer: str | None, channels: Sequence[int], most: int) -> dict[str, Any]:
    """Over the checkpoints that the run kept. Raises CheckpointError."""
    run = opened(asked)
    run.subject.channels(run.subject.maps(layer), channels)
    saved = generations(run.subject.given.run / CHECKPOINTS)
    if len(saved) < 2:
        raise ConfigError(f"{run.subject.given.run}: one checkpoint is kept; train with train.keep=100 to see more")
    steps = [saved[int(place) - 1] for place in np.unique(np.geomspace(1, len(saved), _COLUMNS).round())]

    def each() -> Iterator[tuple[int, Subject]]:
        for path in steps:
            experiment, given = trained(path, asked.root, asked.device)
            yield given.step, Subject(given, experiment.model.layers)

    made = evolve_of(each(), run.examples(), layer, channels, most, run.experiment.train.batch)
    return kept(run, "evolve", made)


def embed(asked: Asked, layers: Sequence[str], kind: Map, probe: bool | None) -> dict[str, Any]:
    """The vectors go into a file beside the picture: .npz, or .parquet where `out` ends so.

    With `probe` None layers are probed where that can be.
    """
    run = opened(asked)
    for layer in layers:
        run.subject.any(layer)
    if asked.out and asked.out.suffix not in (".npz", ".parquet"):
        raise ConfigError(f"--out {asked.out}: give a file that ends in .npz or .parquet")
    name, data = run.data(at_least=0 if probe is False else 2**62)
    made = embed_of(run.subject, data.splits, name, layers, kind, run.experiment.train.batch, probe)
    folder = run.subject.given.run / EXPLAIN
    path = asked.out or folder / f"embed-{_plain(made.data['layer'])}.npz"
    if asked.out and path.exists():
        raise ConfigError(f"{printable(str(path))}: is there already; choose another")
    packed = _packed(made.arrays, path.suffix)
    about = kept(run, "embed", made, path.with_suffix(".png"))
    write_file(path, packed)
    return {"features": str(path), **about}


def found(asked: Asked) -> dict[str, Any]:
    """Results that lie somewhere in a picture, drawn on it. Raises ConfigError, DataError."""
    run = opened(asked)
    return kept(run, "found", found_of(run.subject, run.shown()))


def assign(asked: Asked) -> dict[str, Any]:
    """Which cells learn which objects of the first picture asked for. Raises ConfigError, DataError."""
    run = opened(asked)
    return kept(run, "assign", assign_of(run.subject, run.shown()))


def kept(run: Opened, name: str, made: Explanation, out: Path | None = None) -> dict[str, Any]:
    """Write what was made, as PNG and for TensorBoard; returns its numbers. Raises StorageError, ConfigError."""
    given = run.subject.given
    layer = f"-{_plain(made.data['layer'])}" if "layer" in made.data else ""
    path = out or run.asked.out or given.run / EXPLAIN / f"{name}{layer}.png"
    pixels = captioned(made.picture, made.caption)
    if path.parent == given.run / EXPLAIN:
        _folder_in(given.run).remove_abandoned()
    write_png(path, pixels, _BY)
    _to_board(given.run, f"explain/{name}{layer}", pixels, given.step)
    about = {"run": str(given.run), "step": given.step, "path": str(path), "caption": made.caption, "table": made.table}
    return about | made.data


def _folder_in(run: Path) -> Folder:
    """The run's folder for explanations. Raises StorageError, CheckpointError."""
    with storage_errors(run / EXPLAIN, 0):
        return Folder(run).child(EXPLAIN, create=True)


def _to_board(run: Path, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Show it in TensorBoard, beside the run; where that fails it is said."""
    try:
        with closing(EventFile(_folder_in(run))) as board:
            board.add_image(name, pixels, step)
    except Interrupted:
        raise
    except Exception as error:
        say(f"{run / EXPLAIN}: nothing for TensorBoard: {printable(str(error))}")


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
    columns["picture"] = [printable(name) for name in columns["picture"]]  # Parquet has no place for what is no text
    pq.write_table(pa.table(columns), made)
    return made.getvalue()
