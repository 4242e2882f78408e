"""Face models and photos that `scripts/get_data` fetches; tests that need them are skipped where they are missing."""

from __future__ import annotations

import sys
import types
from pathlib import Path

import pytest

DATA = Path(__file__).parents[2] / "data"
MODELS, PHOTOS, ORL = DATA / "face-models", DATA / "face-photos", DATA / "orl-faces"
FINDER, EMBEDDER = MODELS / "face-finder.safetensors", MODELS / "face_resnet29.safetensors"
ORIGINALS = MODELS / "original"

needs_models = pytest.mark.skipif(not FINDER.exists(), reason="needs the face models (scripts/get_data face-models)")
needs_photos = pytest.mark.skipif(
    not (FINDER.exists() and (PHOTOS / "astronaut.png").exists()),
    reason="needs the face models and photos (scripts/get_data face-models, face-photos)",
)


def original_cascade():
    """The MTCNN of facenet-pytorch, at its defaults, all faces by falling score."""
    import torch

    # Its __init__ imports a network that needs `requests`.
    package = types.ModuleType("facenet_pytorch")
    package.__path__ = [str(ORIGINALS / "facenet_pytorch")]
    sys.modules["facenet_pytorch"] = package
    load, torch.load = torch.load, lambda path: load_tensors(path)

    def load_tensors(path):
        return load(path, weights_only=True)

    try:
        from facenet_pytorch.models.mtcnn import MTCNN

        return MTCNN(keep_all=True, select_largest=False)
    finally:
        torch.load = load
        for name in [name for name in sys.modules if name.split(".")[0] == "facenet_pytorch"]:
            del sys.modules[name]
