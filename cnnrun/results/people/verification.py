"""`cnnrun verify`: do two images show the same person?"""

from __future__ import annotations

from pathlib import Path
from typing import Any

from cnnrun.base.errors import ConfigError
from cnnrun.data.image_paths import list_images
from cnnrun.results.people.embeddings import IdentityOptions, embed_images


def verify_pair(options: IdentityOptions, first_path: Path, second_path: Path, batch: int = 2) -> dict[str, Any]:
    """Compare two images and decide whether they show the same person."""
    trained, matching = options.open_embedding_network()
    threshold = options.choose_threshold(trained, matching)
    embeddings, _ = embed_images(trained, list(list_images([first_path, second_path])), batch)
    if len(embeddings) != 2:
        raise ConfigError("verify compares two images; give two files")
    similarity = float(embeddings[0] @ embeddings[1])
    return {
        "pictures": [str(first_path), str(second_path)],
        "similarity": similarity,
        "threshold": threshold.value,
        "far": threshold.far,
        "same": similarity >= threshold.value,
    }
