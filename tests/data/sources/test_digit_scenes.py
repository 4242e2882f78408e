from __future__ import annotations

import numpy as np
import torch

from cnnrun.data.sources.digit_scenes import DigitScenes


def test_scenes_are_reproducible_and_follow_the_settings():
    source = DigitScenes(train=60, held_out=20, most=5)
    first, again = source.read(), source.read()
    assert first.classes == tuple("0123456789")
    for name, split in first.splits.items():
        assert np.array_equal(split.images, again.splits[name].images)
        assert all(torch.equal(value, again.splits[name].targets[key]) for key, value in split.targets.items())
    train = first.splits["train"]
    counts = (train.objects.pad()["objects"] >= 0).sum(1)
    assert counts.min() == 0  # some scenes are empty
    assert counts.max() <= 5
    other = DigitScenes(train=60, held_out=20, most=5, seed=1).read()
    assert not np.array_equal(other.splits["train"].images, train.images)


def test_boxes_enclose_the_digits_tightly():
    split = DigitScenes(train=80, held_out=1).read().splits["train"]
    for number in range(80):
        picture, outside = split.images[number, :, :, 0], np.ones((96, 96), bool)
        for box, label in zip(
            split.objects.pad()["boxes"][number].long().tolist(),
            split.objects.pad()["objects"][number],
            strict=True,
        ):
            if label >= 0:
                x1, y1, x2, y2 = box
                part = picture[y1:y2, x1:x2]
                assert min(part[0].max(), part[-1].max(), part[:, 0].max(), part[:, -1].max()) >= 64  # tight
                outside[max(0, y1 - 1) : y2 + 1, max(0, x1 - 1) : x2 + 1] = False
        assert picture[outside].max() < 64


def test_no_two_scenes_are_the_same_image():
    found = DigitScenes(train=200, held_out=50).read()
    pictures = np.concatenate([split.images for split in found.splits.values()])
    assert len({picture.tobytes() for picture in pictures}) == len(pictures)
