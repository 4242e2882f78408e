"""Faces are found and embedded on the GPU as on the CPU."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch

from cnnrun.results.people.embeddings import IdentityOptions
from tests.support.face_data import EMBEDDER, PHOTOS, needs_photos

pytestmark = pytest.mark.cuda


@needs_photos
def test_faces_and_embeddings_equal_those_of_the_cpu(gpu):
    photo = PHOTOS / "astronaut.png"
    found = {}
    for name, device in (("cpu", torch.device("cpu")), ("gpu", gpu)):
        embedder = IdentityOptions(EMBEDDER, Path("runs"), device).open_embedder()
        ((face, embedding),) = embedder.embed_photo(photo)
        found[name] = (*face.box, *np.ravel(face.landmarks)), embedding
    np.testing.assert_allclose(found["gpu"][0], found["cpu"][0], atol=0.5)
    np.testing.assert_allclose(found["gpu"][1], found["cpu"][1], atol=0.02)
