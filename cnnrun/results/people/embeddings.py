"""The network, device and threshold that the commands about people use, and the embeddings of image files."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.errors import ConfigError, DataError
from cnnrun.base.progress import say
from cnnrun.contracts.task_parts import Matching
from cnnrun.experiment.open_run import open_network
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.results.inference import compute_results


@dataclass(frozen=True)
class SimilarityThreshold:
    """A minimum similarity, and the FAR that it was chosen for on val; None if the user gave it."""

    value: float
    far: float | None


@dataclass(frozen=True)
class IdentityOptions:
    """Network, device and operating point: a similarity threshold or a false accept rate, or the default."""

    run: Path | None
    runs: Path
    device: torch.device
    threshold: float | None = None
    far: float | None = None

    def open_embedding_network(self) -> tuple[TrainedNetwork, Matching]:
        """Open the network; returns it with its matching. Raises ConfigError if it gives no embeddings."""
        trained = open_network(self.run, self.runs, self.device)
        if trained.task.matching is None:
            raise ConfigError(
                f"this network is for {trained.task.kind} and gives no embeddings; give a run of the task verify"
            )
        return trained, trained.task.matching

    def choose_threshold(self, trained: TrainedNetwork, matching: Matching) -> SimilarityThreshold:
        """Choose the threshold, with a note if few pairs support it. Raises ConfigError if val set none for the FAR."""
        if self.threshold is not None and self.far is not None:
            raise ConfigError("--threshold and --far: give one of them")
        if self.threshold is not None:
            return SimilarityThreshold(self.threshold, None)
        point = matching.find_operating_point(trained.choices, self.far)
        if point is None:
            available = ", ".join(f"{point.far:g}" for point in trained.choices.operating_points) or "none"
            raise ConfigError(f"no threshold was chosen on val for this FAR (available: {available}); give --threshold")
        if note := matching.operating_point_note(point):
            say(f"threshold for FAR {point.far:g}: {note}")
        return SimilarityThreshold(point.threshold, point.far)


def embed_images(trained: TrainedNetwork, paths: Sequence[Path], batch: int) -> tuple[NDArray[np.float32], list[str]]:
    """Embed images: [N, D], and their paths. Raises DataError with a line for each file that cannot be read."""
    files = list(compute_embeddings(trained, paths, batch))
    if problems := [str(embedding) for _, embedding in files if isinstance(embedding, DataError)]:
        raise DataError(*problems)
    return np.array([embedding for _, embedding in files], np.float32), [str(path) for path, _ in files]


def compute_embeddings(
    trained: TrainedNetwork, paths: Iterable[Path], batch: int
) -> Iterator[tuple[Path, NDArray[np.float32] | DataError]]:
    """Compute the embedding of each image; returns the error in its place for a file that cannot be read."""
    matching = trained.task.matching
    assert matching is not None
    for chunk, results, _ in compute_results(trained, paths, batch):
        embeddings = iter(matching.embeddings(results).cpu().numpy() if results else ())
        for path, error in chunk:
            yield path, next(embeddings) if error is None else error
