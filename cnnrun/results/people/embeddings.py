"""Network, device and threshold of the commands about people; embeddings of images and of the faces in photos."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.progress import say
from cnnrun.base.similarity import Embeddings
from cnnrun.contracts.task_parts import Matching
from cnnrun.experiment.open_run import open_network
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.results.inference import InferenceNetwork, compute_results
from cnnrun.results.people.alignment import FaceTemplate
from cnnrun.results.people.cascade_weights import find_finder_file, read_finder_file
from cnnrun.results.people.face_photos import FaceReader, PhotoFace, choose_single_face
from cnnrun.results.people.gallery_file import GalleryMaker


@dataclass(frozen=True)
class SimilarityThreshold:
    """A minimum similarity, and the FAR that it was chosen for on val; None if the user or the weights gave it."""

    value: float
    far: float | None


@dataclass(frozen=True)
class PhotoOptions:
    """Options of photos: `find` says whether faces are looked for, by default if the network takes aligned faces."""

    find: bool | None = None
    finder: Path | None = None


@dataclass(frozen=True)
class IdentityOptions:
    """Network, device, photos and operating point: a threshold as people see it, a FAR, or the default."""

    run: Path | None
    runs: Path
    device: torch.device
    threshold: float | None = None
    far: float | None = None
    photos: PhotoOptions = PhotoOptions()

    def open_embedder(self) -> Embedder:
        """Open the network and, for photos, the face finder. Raises ConfigError if the network gives no embeddings."""
        trained = open_network(self.run, self.runs, self.device)
        if (matching := trained.task.matching) is None:
            raise ConfigError(
                f"this network is for {trained.task.kind} and gives no embeddings; give a run of the task verify"
            )
        return Embedder(trained, matching, self._open_reader(trained, matching))

    def _open_reader(self, trained: TrainedNetwork, matching: Matching) -> FaceReader | None:
        find = self.photos.find
        if find is False or (find is None and not matching.landmarks):
            if self.photos.finder is not None:
                raise ConfigError("--finder: no faces are looked for here; give --find, or leave the option out")
            return None
        template = FaceTemplate.of_task(trained.task)
        finder = read_finder_file(find_finder_file(self.photos.finder, self.run), self.device)
        return FaceReader(finder, template, trained.image)

    def choose_threshold(self, embedder: Embedder) -> SimilarityThreshold:
        """Choose the threshold, with a note if few pairs support it. Raises ConfigError if val set none for the FAR."""
        matching, choices = embedder.matching, embedder.trained.choices
        if self.threshold is not None and self.far is not None:
            raise ConfigError("--threshold and --far: give one of them")
        if self.threshold is not None:
            similarity = matching.similarity.from_display(self.threshold)
            if similarity > matching.similarity.largest:
                raise ConfigError(f"--threshold {self.threshold:g}: no {matching.similarity.name} is a match then")
            return SimilarityThreshold(similarity, None)
        point = matching.find_operating_point(choices, self.far)
        if point is None and self.far is None and matching.published_threshold is not None:
            if matching.landmarks and embedder.reader is None:
                say("the published threshold is for aligned faces; --no-find takes the images as they are")
            return SimilarityThreshold(matching.published_threshold, None)
        if point is None:
            available = ", ".join(f"{point.far:g}" for point in choices.operating_points) or "none"
            raise ConfigError(f"no threshold was chosen on val for this FAR (available: {available}); give --threshold")
        if note := matching.operating_point_note(point):
            say(f"threshold for FAR {point.far:g}: {note}")
        return SimilarityThreshold(point.threshold, point.far)


@dataclass(frozen=True)
class EmbeddedImage:
    """The embedding of an image and, if the image is a photo, its face as plain data for JSON."""

    embedding: Embeddings
    face: dict[str, Any] | None = None


class Embedder:
    """A network that gives embeddings of whole images or, with a face reader, of the faces in photos."""

    def __init__(self, trained: TrainedNetwork, matching: Matching, reader: FaceReader | None) -> None:
        self.trained, self.matching, self.reader = trained, matching, reader

    @property
    def maker(self) -> GalleryMaker:
        """Maker of the embeddings, as a gallery records it."""
        kind = self.matching.similarity.kind
        if self.reader is None:
            return GalleryMaker(self.trained.digest, similarity=kind)
        return GalleryMaker(self.trained.digest, self.reader.finder.digest, self.reader.template.to_json(), kind)

    def embed_images(self, paths: Sequence[Path], batch: int) -> list[EmbeddedImage]:
        """Embed the one person of each file. Raises DataError with a line for each file that has not exactly one."""
        images = [image for _, image in self.embed_each(paths, batch)]
        if problems := [str(image) for image in images if isinstance(image, DataError)]:
            raise DataError(*problems)
        return [image for image in images if isinstance(image, EmbeddedImage)]

    def embed_each(self, paths: Iterable[Path], batch: int) -> Iterator[tuple[Path, EmbeddedImage | DataError]]:
        """Embed the one person of each file, or give the reason in its place."""
        if self.reader:
            source = iter(paths)
            while chunk := list(itertools.islice(source, batch)):
                yield from zip(chunk, self._embed_photos(self.reader, chunk), strict=True)
            return
        for files, results, _ in compute_results(self.trained, paths, batch):
            embeddings = iter(self.matching.embeddings(results).cpu().numpy() if results else ())
            for path, problem in files:
                yield path, EmbeddedImage(next(embeddings)) if problem is None else problem

    def _embed_photos(self, reader: FaceReader, paths: Sequence[Path]) -> Iterator[EmbeddedImage | DataError]:
        """Embed the one face of each photo, or give the reason in its place."""
        chosen: list[PhotoFace | DataError] = []
        for path in paths:
            try:
                chosen.append(choose_single_face(path, reader.read_faces(path)))
            except DataError as error:
                chosen.append(error)
        embeddings = iter(self._embed_faces([face for face in chosen if isinstance(face, PhotoFace)]))
        for face in chosen:
            yield face if isinstance(face, DataError) else EmbeddedImage(next(embeddings), face.to_json())

    def embed_photo(self, path: Path) -> list[tuple[PhotoFace, Embeddings | None]]:
        """Find the faces of a photo, and embed those that can be recognised. Raises DataError if it is unreadable."""
        assert self.reader is not None
        faces = self.reader.read_faces(path)
        embeddings = iter(self._embed_faces([face for face in faces if not face.problem]))
        return [(face, None if face.problem else next(embeddings)) for face in faces]

    def _embed_faces(self, faces: Sequence[PhotoFace]) -> Embeddings:
        """Embeddings of aligned faces: [N, D]."""
        if not faces:
            return np.empty((0, self.matching.dimension), np.float32)
        pixels_NHWC = np.stack([face.pixels_HWC for face in faces])
        if self.trained.facts.image_shape[0] == 1:
            pixels_NHWC = np.stack([_to_grey(pixels) for pixels in pixels_NHWC])
        images_BCHW = torch.from_numpy(pixels_NHWC).to(self.trained.device).permute(0, 3, 1, 2).float()
        embeddings: Embeddings = self.matching.embeddings(self._network.results(images_BCHW)).cpu().numpy()
        return embeddings

    @cached_property
    def _network(self) -> InferenceNetwork:
        return InferenceNetwork(self.trained)


def _to_grey(pixels_HWC: NDArray[np.uint8]) -> NDArray[np.uint8]:
    from PIL import Image as Pil

    grey: NDArray[np.uint8] = np.asarray(Pil.fromarray(pixels_HWC).convert("L"), np.uint8)
    return grey[:, :, None]
