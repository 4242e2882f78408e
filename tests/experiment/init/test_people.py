"""`init` for verification: val and test have people of their own, enough to measure, and a batch fits the others."""

from __future__ import annotations

import pytest

from cnnrun.base.errors import DataError
from cnnrun.experiment import config_file
from cnnrun.experiment.init.config_writer import write_config
from cnnrun.experiment.init.reading import Request
from tests.support.images import save_picture


@pytest.mark.parametrize("people", [4, 5, 6, 7, 8, 13, 14, 40])
def test_val_and_test_have_people_enough_to_verify(people, tmp_path):
    for person in range(people):
        for number in range(3):
            save_picture(tmp_path / "people" / f"p{person}" / f"{number}.png", seed=10 * person + number)
    write_config(str(tmp_path / "people"), Request("verify"), tmp_path / "c.yaml", 0.1)  # checks val and test
    assert (config_file.read_config(tmp_path / "c.yaml").data.split.test > 0) == (people >= 6)


@pytest.mark.parametrize(("train", "val", "test"), [(8, 0, 4), (20, 20, 20), (6, 3, 3), (2, 2, 0)])
def test_people_of_the_source_s_own_splits_are_counted_by_split(train, val, test, tmp_path):
    for split, count in (("train", train), ("val", val), ("test", test)):
        for person in range(count):
            for number in range(4):
                seed = 1000 * len(split) + 10 * person + number
                save_picture(tmp_path / "people" / split / f"{split}{person}" / f"{number}.png", seed=seed)
    write_config(str(tmp_path / "people"), Request("verify"), tmp_path / "c.yaml", 0.1)  # checks val and test
    experiment = config_file.read_config(tmp_path / "c.yaml")
    assert experiment.train.sampler.images_per_class == 4
    text = (tmp_path / "c.yaml").read_text()
    assert ("val:" in text) == (not val)
    assert "test:" not in text


def test_images_of_a_class_in_a_batch_are_the_median_s(tmp_path):
    for person in range(20):
        for number in range(100 if person == 0 else 2):
            save_picture(tmp_path / "people" / f"p{person}" / f"{number}.png", seed=1000 * person + number)
    write_config(str(tmp_path / "people"), Request("verify"), tmp_path / "c.yaml", 0.1)
    assert config_file.read_config(tmp_path / "c.yaml").train.sampler.images_per_class == 2


def test_too_few_people_are_refused_and_nothing_is_written(tmp_path):
    for person in range(3):
        for number in range(3):
            save_picture(tmp_path / "people" / f"p{person}" / f"{number}.png", seed=10 * person + number)
    with pytest.raises(DataError, match="verification needs 4 people or things to begin with.*; there are 3"):
        write_config(str(tmp_path / "people"), Request("verify"), tmp_path / "c.yaml", 0.1)
    assert not (tmp_path / "c.yaml").exists()
