"""What the commands about people do (`verify`, `enroll`, `identify`), as functions that return plain data."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.errors import ConfigError, DataError, printable
from cnnrun.base.file_list import is_clutter
from cnnrun.base.progress import say
from cnnrun.data.image_files import is_picture_name
from cnnrun.data.image_paths import list_images
from cnnrun.experiment.open_run import usable
from cnnrun.model.trained import Trained
from cnnrun.results import gallery_file
from cnnrun.results.gallery_file import Gallery, Search
from cnnrun.results.predict import predict
from cnnrun.tasks.embedding.task import OperatingPoint, Verify, threshold_of

_OFTEN = 0.05  # strangers taken for someone, from which on it is said


@dataclass(frozen=True)
class Given:
    """Which network, on which device, and from which similarity on two pictures show one person."""

    target: Path | None
    runs: Path
    device: torch.device
    threshold: float | None = None
    far: float | None = None

    def network(self) -> tuple[Trained, Verify]:
        """The network and its task. Raises ConfigError where it gives no embeddings."""
        given = usable(self.target, self.runs, self.device)
        if not isinstance(given.task, Verify):
            raise ConfigError(f"this network is for {given.task.kind}; a network of the task verify gives embeddings")
        return given, given.task

    def point(self, given: Trained, task: Verify) -> OperatingPoint:
        """The threshold, aloud where little is known of it. Raises ConfigError where val chose none for this FAR."""
        if self.threshold is not None and self.far is not None:
            raise ConfigError("--threshold and --far: give one of them")
        if self.threshold is not None:
            return OperatingPoint(self.threshold, None, "")
        found = threshold_of(task, given.facts, self.far)
        if found is None:
            known = ", ".join(f"{far:g}" for far in task.fars) if given.facts.chosen else "none"
            raise ConfigError(f"no threshold was chosen on val for this FAR (there are: {known}); give --threshold")
        if found.note:
            say(f"threshold for FAR {found.far:g}: {found.note}")
        return found


def compared(given: Given, one: Path, other: Path, batch: int = 2) -> dict[str, Any]:
    """Whether two pictures show one person."""
    network, task = given.network()
    point = given.point(network, task)
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


def _embedded(network: Trained, paths: Sequence[Path], batch: int) -> tuple[NDArray[np.float32], list[str]]:
    """Embeddings of pictures [N, D] and their paths. Raises DataError with all that cannot be read."""
    rows = list(predict(network, paths, batch))
    if problems := [row["error"] for row in rows if "error" in row]:
        raise DataError(*problems)
    return np.array([row["embedding"] for row in rows], np.float32), [row["path"] for row in rows]


def enrolled(
    given: Given, folder: Path | None, path: Path, add: bool, remove: Sequence[str], batch: int
) -> dict[str, Any]:
    """Make a gallery of a folder by person, add to one or take people out; returns who is in it."""
    _refuse_unclear(folder, path, add, remove)
    if folder is None and not remove:  # a look at it needs no network
        return _told(path, gallery_file.read(path), [], [])
    network, task = given.network()
    held = gallery_file.read(path) if path.exists() else None
    if held is not None and folder is not None and not add:
        return _there_already(network, folder, path, held, batch)
    if held is not None:
        gallery_file.refuse_other(held, path, network.digest, task.dimension)
    if held is not None and remove:
        held = gallery_file.without(held, remove, more=folder is not None)
    people = _people(network, folder, batch) if folder else {}
    made, again = gallery_file.joined(held, network.digest, people) if people else (held, 0)
    assert made is not None
    if again:
        say(f"{again:,} picture(s) left out: each is like another of the same person to the network")
    gallery_file.write(path, made)
    return _told(path, made, sorted(people), list(remove))


def _there_already(network: Trained, folder: Path, path: Path, held: Gallery, batch: int) -> dict[str, Any]:
    """What was enrolled, where the gallery is already that of this folder: a command that is repeated changes nothing.

    Raises ConfigError where it is another.
    """
    made, _ = gallery_file.joined(None, network.digest, _people(network, folder, batch))
    if not made.is_same(held):
        raise ConfigError(f"--gallery {printable(str(path))}: is there already; --add puts these people into it")
    say(f"{path} holds these people already")
    return _told(path, held, [], [])


def _refuse_unclear(folder: Path | None, path: Path, add: bool, remove: Sequence[str]) -> None:
    shown = printable(str(path))
    if path.suffix != ".safetensors":
        raise ConfigError(f"--gallery {shown}: a gallery ends in .safetensors")
    if (folder is None or add) and not path.exists():
        raise ConfigError(f"--gallery {shown}: no such file; give a folder of people, without --add, to make it")
    if add and folder is None:
        raise ConfigError("--add needs a folder of people")
    if remove and folder is not None and not add:
        raise ConfigError("--remove takes people out of a gallery that is there")


def _told(path: Path, gallery: Gallery, added: list[str], removed: list[str]) -> dict[str, Any]:
    return {"path": str(path), "model": gallery.model, "people": gallery.counts(), "added": added, "removed": removed}


def _people(network: Trained, folder: Path, batch: int) -> dict[str, NDArray[np.float32]]:
    """Each person's embeddings, of a folder with a folder for each."""
    if not folder.is_dir():
        raise DataError(f"{printable(str(folder))}: no such folder")
    entries = sorted(entry for entry in folder.iterdir() if not is_clutter(entry.name))
    own = {entry.name: list(list_images([entry])) for entry in entries if entry.is_dir()}
    if not own:
        raise DataError(f"{printable(str(folder))}: needs a folder for each person")
    loose = [entry.name for entry in entries if entry.is_file() and is_picture_name(entry.name)]
    if loose:
        say(f"{printable(str(folder))}: {len(loose)} picture(s) of nobody left out, such as {printable(loose[0])!r}")
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


def identified(
    given: Given, paths: Sequence[Path], path: Path, most: int, search: Search, batch: int
) -> Iterator[dict[str, Any]]:
    """A row a picture: the person, None where it is none of the gallery's, and the most similar ones."""
    network, task = given.network()
    point = given.point(network, task)
    gallery = gallery_file.read(path)
    gallery_file.refuse_other(gallery, path, network.digest, task.dimension)
    if point.far is not None and (line := _of_strangers(point.far, task.fars, len(gallery.person_N))):
        say(line)
    for row in predict(network, list_images(paths), batch):
        if "error" in row:
            yield row
            continue
        (best,) = gallery.best(np.array([row.pop("embedding")], np.float32), most, search)
        person, similarity = best[0]
        yield {
            **row,
            "person": person if similarity >= point.threshold else None,
            "similarity": similarity,
            "threshold": point.threshold,
            "matches": [{"person": name, "similarity": value} for name, value in best],
        }
