"""Real handwritten digits that come with scikit-learn: 1,797 pictures of 8 x 8, nothing to download."""

from __future__ import annotations

import numpy as np
import torch

from cnnrun.contracts.layer import Indexed, SourceSpec, Split


class Digits(SourceSpec):
    """The UCI handwritten digits (Alpaydin and Kaynak 1998). It has no splits of its own: `data.split` makes them."""

    kind = "digits"
    image = (1, 8, 8)

    def read(self, apart: bool = False) -> Indexed:
        from sklearn.datasets import load_digits

        bunch = load_digits()
        pictures = np.rint(bunch.images * (255 / 16)).astype(np.uint8)[..., None]
        targets = {"labels": torch.from_numpy(bunch.target.astype(np.int64))}
        return Indexed(tuple("0123456789"), {"train": Split(pictures, targets, "digits")})
