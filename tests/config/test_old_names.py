"""Keys and words under their old names are read for one version, with a warning at their position."""

from __future__ import annotations

import pytest

from cnnrun.base.errors import ConfigError
from cnnrun.config.spec import Spec
from cnnrun.experiment import config_file, open_run

START = """task: classify
model: [flatten]
train: {sampler: SAMPLER, batch: 8}
data: {image: {size: 8, channels: 1}, SETTINGS}
"""
# Settings of `data` and the sampler: as they were written, as they are written now, and the position of the old name.
OLD = {
    "table.picture": ("source: {table: {path: t.csv, picture: p}}", "source: {table: {path: t.csv, image: p}}", "4:69"),
    "coco.pictures": ("source: {coco: {train: a, pictures: b}}", "source: {coco: {train: a, images: b}}", "4:65"),
    "split.by": (
        "source: digits, split: {by: picture, val: 0.2}",
        "source: digits, split: {by: image, val: 0.2}",
        "4:67",
    ),
    "identities.pictures": ("identities: {pictures: 4}", "identities: {images: 4}", "3:32"),
}


def write_config(name: str, settings: str) -> str:
    """A config with these settings; COCO's are for a detector."""
    if name == "identities.pictures":
        return START.replace("SAMPLER", "{" + settings + "}").replace("SETTINGS", "source: digits")
    text = START.replace("SAMPLER", "uniform").replace("SETTINGS", settings)
    if name == "coco.pictures":
        return text.replace("task: classify", "task: detect").replace("[flatten]", "[conv: 4]")
    return text


def every_spec(base: type[Spec] = Spec) -> set[type[Spec]]:
    """All sections and kinds."""
    return {base}.union(*(every_spec(spec) for spec in base.__subclasses__()))


def test_every_old_name_is_tried():
    old = [name for spec in every_spec() for name in (*spec.old_keys, *spec.old_values)]
    assert len(old) == len(OLD)


@pytest.mark.parametrize("name", OLD)
def test_an_old_name_means_what_the_new_one_means(name, capsys):
    before, now, position = OLD[name]
    new = config_file.parse_config(write_config(name, now), "c.yaml")
    assert capsys.readouterr().err == ""
    assert config_file.parse_config(write_config(name, before), "c.yaml") == new
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"c.yaml:{position}: `")
    assert "works for one more version" in line
    assert "picture" not in new.to_yaml()


def test_an_old_name_beside_the_new_one_is_refused():
    text = write_config("table.picture", "source: {table: {path: t.csv, image: p, picture: q}}")
    with pytest.raises(ConfigError, match=r"c.yaml:4:79: data.source.table.picture: unknown key"):
        config_file.parse_config(text, "c.yaml")


def test_an_override_may_use_an_old_name(capsys):
    text = write_config("table.picture", "source: {table: {path: t.csv}}")
    made = config_file.parse_config(text, "c.yaml", ["data.source.table.picture=p"])
    assert made.data.source.image_column == "p"
    assert "argument 'data.source.table.picture=p': `picture` is now called `image`" in capsys.readouterr().err


def test_the_config_of_an_earlier_run_is_read_without_a_word(tmp_path, capsys):
    (tmp_path / "config.yaml").write_text(write_config("table.picture", OLD["table.picture"][0]))
    assert open_run.read_run_config(tmp_path).data.source.image_column == "p"
    assert capsys.readouterr().err == ""
