"""Real handwritten digits that come with cnnrun: 1,797 images of 8 x 8, nothing to download."""

from __future__ import annotations

import torch

from cnnrun.contracts.source import SourceContents, SourceSpec, Split
from cnnrun.data.sources.embedded_digits import read_digits


class Digits(SourceSpec):
    """The UCI handwritten digits (Alpaydin and Kaynak 1998). They come without splits: `data.split` makes them."""

    kind = "digits"
    image_shape = (1, 8, 8)

    def read(self, *, has_disjoint_classes: bool = False) -> SourceContents:
        images, labels = read_digits()
        targets = {"labels": torch.from_numpy(labels)}
        return SourceContents(tuple("0123456789"), {"train": Split(images[..., None], targets, "digits")})
