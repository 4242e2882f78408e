"""Network, device and threshold of the commands about people; embeddings of images and of the faces in photos."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

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
from cnnrun.results.people.face_finder_file import find_finder_file, read_finder_file
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
            return None
        template = FaceTemplate.of_network(trained)
        finder = read_finder_file(find_finder_file(self.photos.finder, self.run), self.device)
        return FaceReader(finder, template, trained.image)

    def choose_threshold(self, embedder: Embedder) -> SimilarityThreshold:
        """Choose the threshold, with a note if few pairs support it. Raises ConfigError if val set none for the FAR."""
        matching, choices = embedder.matching, embedder.trained.choices
        if self.threshold is not None and self.far is not None:
            raise ConfigError("--threshold and --far: give one of them")
        if self.threshold is not None:
            similarity = matching.similarity.shown(self.threshold)
            if similarity > matching.similarity.largest:
                raise ConfigError(f"--threshold {self.threshold:g}: no {matching.similarity.name} is a match then")
            return SimilarityThreshold(similarity, None)
        point = matching.find_operating_point(choices, self.far)
        if point is None and self.far is None and matching.published_threshold is not None:
            return SimilarityThreshold(matching.published_threshold, None)
        if point is None:
            available = ", ".join(f"{point.far:g}" for point in choices.operating_points) or "none"
            raise ConfigError(f"no threshold was chosen on val for this FAR (available: {available}); give --threshold")
        if note := matching.operating_point_note(point):
            say(f"threshold for FAR {point.far:g}: {note}")
        return SimilarityThreshold(point.threshold, point.far)


@dataclass(frozen=True)
class EmbeddedImage:
    """The embedding of an image, and the face that it is of if the image is a photo."""

    embedding: Embeddings
    face: PhotoFace | None = None


class Embedder:
    """A network that gives embeddings of whole images or, with a face reader, of the faces in photos."""

    def __init__(self, trained: TrainedNetwork, matching: Matching, reader: FaceReader | None) -> None:
        self.trained, self.matching, self.reader = trained, matching, reader

    @property
    def maker(self) -> GalleryMaker:
        """What computes the embeddings, as a gallery records it."""
        finder = self.reader.finder.digest if self.reader else ""
        return GalleryMaker(self.trained.digest, finder, self.matching.similarity.kind)

    def embed_images(self, paths: Sequence[Path], batch: int) -> list[EmbeddedImage]:
        """Embed the one person of each file. Raises DataError with a line for each file that has not exactly one."""
        images = [image for _, image in self.each_image(paths, batch)]
        if problems := [str(image) for image in images if isinstance(image, DataError)]:
            raise DataError(*problems)
        return [image for image in images if isinstance(image, EmbeddedImage)]

    def each_image(self, paths: Iterable[Path], batch: int) -> Iterator[tuple[Path, EmbeddedImage | DataError]]:
        """Embed the one person of each file, or give the reason in its place."""
        if self.reader:
            for path in paths:
                try:
                    face = choose_single_face(path, self.reader.read_faces(path))
                    yield path, EmbeddedImage(self._embed_faces([face])[0], face)
                except DataError as error:
                    yield path, error
            return
        for chunk, results, _ in compute_results(self.trained, paths, batch):
            embeddings = iter(self.matching.embeddings(results).cpu().numpy() if results else ())
            for path, problem in chunk:
                yield path, EmbeddedImage(next(embeddings)) if problem is None else problem

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
