"""`cnnrun faces`: the faces of photos, aligned, in a file each, with a table of what was found."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from cnnrun.base.atomic_files import make_folder, write_text
from cnnrun.base.errors import ConfigError, DataError, escape, escape_cell
from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.prediction import CaptionedBox, Overlay, Prediction
from cnnrun.data.image_names import FACES_TABLE
from cnnrun.data.image_paths import list_images
from cnnrun.data.image_settings import ImageSettings
from cnnrun.experiment.config_file import read_config
from cnnrun.experiment.open_run import open_network
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.contact_sheet import write_png
from cnnrun.results.people.alignment import FaceTemplate
from cnnrun.results.people.cascade_weights import find_finder_file, read_finder_file
from cnnrun.results.people.face_finder import LANDMARKS
from cnnrun.results.people.face_photos import FaceReader, PhotoFace, PhotoSettings
from cnnrun.results.predict import PredictedFile, choose_png_path, overlay_drawer

_GENERATOR = "cnnrun faces"  # written into the PNG files, which marks them as ours


@dataclass(frozen=True)
class FacesInPhoto(Prediction):
    """The faces of a photo, and the file that each was written to; None for one that cannot be recognised."""

    faces: Sequence[PhotoFace]
    files: Sequence[Path | None]

    def to_json(self) -> dict[str, Any]:
        pairs = zip(self.files, self.faces, strict=True)
        return {"faces": [{"file": file and str(file)} | face.to_json() for file, face in pairs]}

    def to_text(self) -> str:
        if not self.faces:
            return "no face found"
        return "  ".join(file.name if file else f"left out: {face.problem}" for file, face in self._pairs())

    def csv_columns(self) -> list[str]:
        points = [f"{name}_{axis}" for name in LANDMARKS for axis in "xy"]
        return ["file", "x1", "y1", "x2", "y2", "score", *points, "problem"]

    def csv_rows(self) -> list[list[Any]]:
        rows = []
        for file, face in self._pairs():
            sides = [round(side, 1) for side in (*face.box, *(side for point in face.landmarks for side in point))]
            rows.append([str(file or ""), *sides[:4], face.score, *sides[4:], face.problem])
        return rows or [[]]

    def overlay(self) -> Overlay:
        return Overlay([CaptionedBox(face.box, face.problem.split(" (")[0], 0) for face in self.faces])

    def _pairs(self) -> Iterator[tuple[Path | None, PhotoFace]]:
        return zip(self.files, self.faces, strict=True)


@dataclass(frozen=True)
class CropOptions:
    """Options of `cnnrun faces`: the network or config to align for, or a size; the finder; changes of the photos."""

    run: Path | None
    runs: Path
    device: torch.device
    size: int | None
    finder: Path | None
    photos: PhotoSettings

    def open_reader(self) -> FaceReader:
        """Open the face finder with the template of the network, or with dlib's in the given size, by default its own.

        Raises ConfigError if both are given.
        """
        if self.run is not None and self.size is not None:
            raise ConfigError("--size and --run: give one of them; a network has its own size")
        finder = read_finder_file(find_finder_file(self.finder, self.run), self.device)
        if self.run is None:
            return FaceReader(finder, FaceTemplate.default(self.size or 150), ImageSettings(), self.photos)
        if self.run.suffix in (".yaml", ".yml"):
            experiment = read_config(self.run)
            return FaceReader(finder, _template_of_config(self.run, experiment), experiment.data.image, self.photos)
        trained = open_network(self.run, self.runs, self.device)
        return FaceReader(finder, FaceTemplate.of_task(trained.task), trained.image, self.photos)


def _template_of_config(path: Path, experiment: Experiment) -> FaceTemplate:
    """Template of a config's task, for a network that has not been trained yet. Raises ConfigError."""
    if (shape := experiment.data.image_shape()) is None:
        raise ConfigError(f"{escape(str(path))}: data.image must give the size and channels of the faces")
    zeros = (0.0,) * shape[0]
    return FaceTemplate.of_task(experiment.task.bind(DataFacts(("nobody",), shape, zeros, zeros)))


def cut_faces(
    reader: FaceReader, paths: Sequence[Path], out: Path, draw_folder: Path | None
) -> Iterator[PredictedFile]:
    """Write the aligned faces of photos into the new folder `out`, in the photos' own subfolders, and a table of them.

    Faces that cannot be recognised are only in the table. Raises ConfigError if `out` is not empty. Yields each photo
    with its faces.
    """
    photos = [(path, root) for root in paths for path in list_images([root])]
    if draw_folder is not None and draw_folder.resolve() == out.resolve():
        raise ConfigError(f"--draw and --out {escape(str(out))}: would replace each other's files; give two folders")
    _make_empty_folder(out)
    draw, names, rows = overlay_drawer(draw_folder, reader.image, 3), set[Path](), list[list[Any]]()
    try:
        for path, root in photos:
            try:
                faces = reader.read_faces(path)
            except DataError as error:
                yield PredictedFile(path, None, str(error))
                continue
            subfolder = path.parent.relative_to(root) if root.is_dir() else Path()
            files = [None if face.problem else choose_png_path(out / subfolder, path.stem, names) for face in faces]
            for file, face in zip(files, faces, strict=True):
                if file is not None:
                    make_folder(file.parent)
                    write_png(file, face.pixels_HWC, _GENERATOR)
            predicted = PredictedFile(path, FacesInPhoto(faces, files))
            draw(predicted)
            in_folder = FacesInPhoto(faces, [file and file.relative_to(out) for file in files])
            rows += [[str(path), *row] for row in in_folder.csv_rows()]
            yield predicted
    finally:  # also when the command is stopped: a table of what was written
        write_text(out / FACES_TABLE, _format_table(rows))


def _format_table(rows: Sequence[Sequence[Any]]) -> str:
    columns, table = ["photo", *FacesInPhoto((), ()).csv_columns()], io.StringIO(newline="")
    writer = csv.writer(table)
    writer.writerow(columns)
    for row in rows:
        cells = (*row, *[""] * (len(columns) - len(row)))
        writer.writerow([escape_cell(cell) if isinstance(cell, str) else cell for cell in cells])
    return table.getvalue()


def _make_empty_folder(out: Path) -> None:
    """Make the folder. Raises ConfigError if it is a file or has anything in it."""
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        reason = "is not empty" if out.is_dir() else "is a file"
        raise ConfigError(f"--out {escape(str(out))}: {reason}; give a new folder")
    make_folder(out)
