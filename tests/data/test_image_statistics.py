from __future__ import annotations

import numpy as np
import pytest

from cnnrun.data.image_statistics import describe_dark_images, narrow_peak


@pytest.mark.parametrize("peak", [1, 255, 256, 257, 4095, 4096, 16383, 16384, 16447])
def test_the_grey_levels_that_16_bit_images_keep_are_counted_as_they_are_scaled(peak):
    levels = len(np.unique(np.arange(peak + 1) // 257))  # see image_files
    assert f"leaves {levels} of 256 grey levels" in describe_dark_images(peak)
    assert narrow_peak(np.array([0, peak], np.uint16)) == (peak if levels <= 64 else None)
