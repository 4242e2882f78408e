"""`cnnrun verify`: do two images show the same person?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.errors import ConfigError
from cnnrun.data.image_paths import list_images
from cnnrun.results.people.embeddings import IdentityOptions


def verify_pair(options: IdentityOptions, first_path: Path, second_path: Path, batch: int = 2) -> dict[str, Any]:
    """Compare two images, or the faces of two photos, and decide whether they show the same person."""
    embedder = options.open_embedder()
    threshold = options.choose_threshold(embedder)
    images = embedder.embed_images(list(list_images([first_path, second_path])), batch)
    if len(images) != 2:
        raise ConfigError("verify compares two images; give two files")
    measure = embedder.matching.similarity
    first, second = (image.embedding[None] for image in images)
    similarity = float(measure.compare_pairs(first, second)[0])
    faces = {"faces": [image.face for image in images]} if embedder.reader else {}
    return {
        "pictures": [str(first_path), str(second_path)],
        measure.name: measure.to_display(similarity),
        "threshold": measure.to_display(threshold.value),
        "far": threshold.far,
        "same": similarity >= threshold.value,
        **faces,
    }
