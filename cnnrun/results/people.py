"""What the commands about people do (`verify`, `enroll`, `identify`), as functions that return plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.file_sequences import is_clutter
from cnnrun.base.progress import say
from cnnrun.data.image_files import is_image_name
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.open_run import open_network
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.results import gallery_file
from cnnrun.results.gallery_file import Gallery, SearchMethod
from cnnrun.results.predict import predict_files
from cnnrun.tasks.embedding.task import OperatingPoint, Verify, find_operating_point

_OFTEN = 0.05  # strangers taken for someone, from which on it is said


@dataclass(frozen=True)
class IdentityOptions:
    """Which network, on which device, and from which similarity on two pictures show one person."""

    run: Path | None
    root: Path
    device: torch.device
    threshold: float | None = None
    far: float | None = None

    def open_network(self) -> tuple[TrainedNetwork, Verify]:
        """The network and its task. Raises ConfigError where it gives no embeddings."""
        given = open_network(self.run, self.root, self.device)
        if not isinstance(given.task, Verify):
            raise ConfigError(f"this network is for {given.task.kind}; a network of the task verify gives embeddings")
        return given, given.task

    def choose_operating_point(self, given: TrainedNetwork, task: Verify) -> OperatingPoint:
        """The threshold, aloud where little is known of it. Raises ConfigError where val chose none for this FAR."""
        if self.threshold is not None and self.far is not None:
            raise ConfigError("--threshold and --far: give one of them")
        if self.threshold is not None:
            return OperatingPoint(self.threshold, None, "")
        found = find_operating_point(task, given.facts, self.far)
        if found is None:
            known = ", ".join(f"{far:g}" for far in task.fars) if given.facts.chosen else "none"
            raise ConfigError(f"no threshold was chosen on val for this FAR (there are: {known}); give --threshold")
        if found.note:
            say(f"threshold for FAR {found.far:g}: {found.note}")
        return found


def verify_pair(given: IdentityOptions, one: Path, other: Path, batch: int = 2) -> dict[str, Any]:
    """Whether two pictures show one person."""
    network, task = given.open_network()
    point = given.choose_operating_point(network, task)
    embeddings, _ = _embedded(network, list(list_images([one, other])), batch)
    if len(embeddings) != 2:
        raise ConfigError("two pictures are compared; give two files")
    similarity = float(embeddings[0] @ embeddings[1])
    return {
        "pictures": [str(one), str(other)],
        "similarity": similarity,
        "threshold": point.threshold,
        "far": point.far,
        "same": similarity >= point.threshold,
    }


def _embedded(network: TrainedNetwork, paths: Sequence[Path], batch: int) -> tuple[NDArray[np.float32], list[str]]:
    """Embeddings of pictures [N, D] and their paths. Raises DataError with all that cannot be read."""
    rows = list(predict_files(network, paths, batch))
    if problems := [row["error"] for row in rows if "error" in row]:
        raise DataError(*problems)
    return np.array([row["embedding"] for row in rows], np.float32), [row["path"] for row in rows]


def enroll_people(
    given: IdentityOptions, folder: Path | None, path: Path, add: bool, remove: Sequence[str], batch: int
) -> dict[str, Any]:
    """Make a gallery of a folder by person, add to one or take people out; returns who is in it."""
    _refuse_unclear(folder, path, add, remove)
    if folder is None and not remove:  # a look at it needs no network
        return _told(path, gallery_file.read_gallery(path), [], [])
    network, task = given.open_network()
    held = gallery_file.read_gallery(path) if path.exists() else None
    if held is not None and folder is not None and not add:
        return _there_already(network, folder, path, held, batch)
    if held is not None:
        gallery_file.refuse_other_network(held, path, network.digest, task.dimension)
    if held is not None and remove:
        held = gallery_file.remove_people(held, remove, allow_empty=folder is not None)
    people = _people(network, folder, batch) if folder else {}
    made, again = gallery_file.add_people(held, network.digest, people) if people else (held, 0)
    assert made is not None
    if again:
        say(f"{again:,} picture(s) left out: each is like another of the same person to the network")
    gallery_file.write_gallery(path, made)
    return _told(path, made, sorted(people), list(remove))


def _there_already(network: TrainedNetwork, folder: Path, path: Path, held: Gallery, batch: int) -> dict[str, Any]:
    """What was enrolled, where the gallery is already that of this folder: a command that is repeated changes nothing.

    Raises ConfigError where it is another.
    """
    made, _ = gallery_file.add_people(None, network.digest, _people(network, folder, batch))
    if not made.is_same(held):
        raise ConfigError(f"--gallery {escape(str(path))}: is there already; --add puts these people into it")
    say(f"{path} holds these people already")
    return _told(path, held, [], [])


def _refuse_unclear(folder: Path | None, path: Path, add: bool, remove: Sequence[str]) -> None:
    shown = escape(str(path))
    if path.suffix != ".safetensors":
        raise ConfigError(f"--gallery {shown}: a gallery ends in .safetensors")
    if (folder is None or add) and not path.exists():
        raise ConfigError(f"--gallery {shown}: no such file; give a folder of people, without --add, to make it")
    if add and folder is None:
        raise ConfigError("--add needs a folder of people")
    if remove and folder is not None and not add:
        raise ConfigError("--remove takes people out of a gallery that is there")


def _told(path: Path, gallery: Gallery, added: list[str], removed: list[str]) -> dict[str, Any]:
    return {
        "path": str(path),
        "model": gallery.network_digest,
        "people": gallery.image_counts(),
        "added": added,
        "removed": removed,
    }


def _people(network: TrainedNetwork, folder: Path, batch: int) -> dict[str, NDArray[np.float32]]:
    """Each person's embeddings, of a folder with a folder for each."""
    if not folder.is_dir():
        raise DataError(f"{escape(str(folder))}: no such folder")
    entries = sorted(entry for entry in folder.iterdir() if not is_clutter(entry.name))
    own = {entry.name: list(list_images([entry])) for entry in entries if entry.is_dir()}
    if not own:
        raise DataError(f"{escape(str(folder))}: needs a folder for each person")
    loose = [entry.name for entry in entries if entry.is_file() and is_image_name(entry.name)]
    if loose:
        say(f"{escape(str(folder))}: {len(loose)} picture(s) of nobody left out, such as {escape(loose[0])!r}")
    embeddings, _ = _embedded(network, [path for paths in own.values() for path in paths], batch)
    edges = np.cumsum([len(paths) for paths in own.values()])[:-1]
    return dict(zip(own, np.split(embeddings, edges), strict=True))


def _of_strangers(far: float, fars: Sequence[float], pictures: int) -> str:
    """What a false accept rate of one comparison comes to against so many pictures; nothing where that is little."""
    chance = 1 - (1 - far) ** pictures
    if chance <= _OFTEN:
        return ""
    smaller = max((each for each in fars if each < far), default=None)
    advice = f"; --far {smaller:g} takes fewer" if smaller else ""
    return (
        f"a stranger meets {pictures:,} pictures with a false accept rate of {far:g} each (on val): up to {chance:.0%} "
        f"of strangers are taken for someone{advice}"
    )


def identify_people(
    given: IdentityOptions, paths: Sequence[Path], path: Path, most: int, search: SearchMethod, batch: int
) -> Iterator[dict[str, Any]]:
    """A row a picture: the person, None where it is none of the gallery's, and the most similar ones."""
    network, task = given.open_network()
    point = given.choose_operating_point(network, task)
    gallery = gallery_file.read_gallery(path)
    gallery_file.refuse_other_network(gallery, path, network.digest, task.dimension)
    if point.far is not None and (line := _of_strangers(point.far, task.fars, len(gallery.person_N))):
        say(line)
    for row in predict_files(network, list_images(paths), batch):
        if "error" in row:
            yield row
            continue
        (best,) = gallery.most_similar(np.array([row.pop("embedding")], np.float32), most, search)
        person, similarity = best[0]
        yield {
            **row,
            "person": person if similarity >= point.threshold else None,
            "similarity": similarity,
            "threshold": point.threshold,
            "matches": [{"person": name, "similarity": value} for name, value in best],
        }
