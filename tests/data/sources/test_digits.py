from __future__ import annotations

import numpy as np

from cnnrun.data.sources.digits import Digits


def test_digits_equal_scikit_learns():
    from sklearn.datasets import load_digits

    split = Digits().read().splits["train"]
    assert split.images.shape == (1797, 8, 8, 1)
    assert np.array_equal(np.rint(split.images[..., 0] * (16 / 255)), load_digits().images)
