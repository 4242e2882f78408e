"""`cnnrun enroll`: create and change a gallery of known people."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np

from cnnrun.base.atomic_files import storage_errors
from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, DataError, escape
from cnnrun.base.file_sequences import is_hidden_or_system_name
from cnnrun.base.locks import hold_lock
from cnnrun.base.progress import say
from cnnrun.base.similarity import Embeddings
from cnnrun.data.image_names import is_image_name
from cnnrun.data.image_paths import list_images
from cnnrun.results.people import gallery_file
from cnnrun.results.people.embeddings import Embedder, IdentityOptions
from cnnrun.results.people.gallery_file import Gallery


def enroll_people(
    options: IdentityOptions, folder: Path | None, gallery_path: Path, add: bool, remove: Sequence[str], batch: int
) -> dict[str, Any]:
    """Create a gallery from a folder of people, add people to it or remove them; returns its people.

    Without a folder and names to remove, the gallery is only read. Another process that changes the gallery at the same
    moment waits. Raises ConfigError for arguments that do not fit.
    """
    _check_arguments(folder, gallery_path, add, remove)
    if folder is None and not remove:
        return _summarize_gallery(gallery_path, gallery_file.read_gallery(gallery_path), [], [])
    if folder is None:
        return _remove_people(options, gallery_path, remove)
    embedder = options.open_embedder()
    if gallery_path.exists():  # before hours of embedding
        existing = gallery_file.read_gallery(gallery_path)
        gallery_file.refuse_other_maker(existing, gallery_path, embedder.maker, embedder.matching.dimension)
    people = _embed_people(embedder, folder, batch)
    with _hold_gallery(gallery_path):
        return _change_gallery(gallery_path, embedder, people, add, remove)


def _remove_people(options: IdentityOptions, path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Remove people from a gallery. No network is needed; if one is given, it must be the gallery's."""
    embedder = options.open_embedder() if options.run else None
    with _hold_gallery(path):
        gallery = gallery_file.read_gallery(path)
        if embedder:
            gallery_file.refuse_other_maker(gallery, path, embedder.maker, embedder.matching.dimension)
        remaining = gallery_file.remove_people(gallery, names)
        assert remaining is not None  # an empty gallery is not allowed here
        gallery_file.write_gallery(path, remaining)
    return _summarize_gallery(path, remaining, [], list(names))


def _change_gallery(
    path: Path, embedder: Embedder, people: dict[str, Embeddings], add: bool, remove: Sequence[str]
) -> dict[str, Any]:
    """Remove people from the gallery as it is now, add these, and write it."""
    existing: Gallery | None = None
    if path.exists():
        existing = gallery_file.read_gallery(path)
        gallery_file.refuse_other_maker(existing, path, embedder.maker, embedder.matching.dimension)
    if existing is not None and not add:
        return _confirm_same_people(path, existing, embedder, people)
    if existing is not None and remove:
        existing = gallery_file.remove_people(existing, remove, allow_empty=True)
    gallery, duplicates = gallery_file.add_people(existing, embedder.maker, people)
    if duplicates:
        say(f"images left out: {duplicates:,}; each has the same embedding as another image of the same person")
    gallery_file.write_gallery(path, gallery)
    return _summarize_gallery(path, gallery, sorted(people), list(remove))


@contextmanager
def _hold_gallery(path: Path) -> Iterator[None]:
    """Hold a gallery's lock, a hidden file beside it, while it is read, changed and written."""
    name = escape(str(path))
    lock = path.with_name(f".{path.name}.lock")
    with storage_errors(lock, 0), hold_lock(lock, lambda: say(f"{name}: waiting for another process to change it")):
        try:
            yield
        finally:
            with suppress(OSError):  # Windows removes no open file
                lock.unlink()  # while it is held: whoever waits for it notices, and makes a new one


def _confirm_same_people(
    gallery_path: Path, existing: Gallery, embedder: Embedder, people: dict[str, Embeddings]
) -> dict[str, Any]:
    """Summarize an existing gallery of these same people: repeating the command changes nothing.

    Raises ConfigError if the gallery holds anything else.
    """
    enrolled, _ = gallery_file.add_people(None, embedder.maker, people)
    if not enrolled.is_same(existing):
        raise ConfigError(f"--gallery {escape(str(gallery_path))}: already exists; use --add to add these people")
    say(f"{gallery_path} already holds these people")
    return _summarize_gallery(gallery_path, existing, [], [])


def _check_arguments(folder: Path | None, gallery_path: Path, add: bool, remove: Sequence[str]) -> None:
    escaped_path = escape(str(gallery_path))
    if gallery_path.suffix != ".safetensors":
        raise ConfigError(f"--gallery {escaped_path}: give a file that ends in .safetensors")
    if (folder is None or add) and not gallery_path.exists():
        raise ConfigError(f"--gallery {escaped_path}: no such file; give a folder of people without --add to create it")
    if add and folder is None:
        raise ConfigError("--add needs a folder of people")
    if remove and folder is not None and not add:
        raise ConfigError("--remove needs an existing gallery; with a folder of people, give --add too")


def _summarize_gallery(gallery_path: Path, gallery: Gallery, added: list[str], removed: list[str]) -> dict[str, Any]:
    return {
        "path": str(gallery_path),
        "model": gallery.maker.network,
        **({"finder": gallery.maker.finder} if gallery.maker.finder else {}),
        "people": gallery.image_counts(),
        "added": added,
        "removed": removed,
    }


def _embed_people(embedder: Embedder, folder: Path, batch: int) -> dict[str, Embeddings]:
    """Embed the images of each person, from a folder that holds a folder for each. Raises DataError."""
    if not folder.is_dir():
        raise DataError(f"{escape(str(folder))}: no such folder")
    entries = sorted(entry for entry in folder.iterdir() if not is_hidden_or_system_name(entry.name))
    paths_by_person = {entry.name: list(list_images([entry])) for entry in entries if entry.is_dir()}
    if not paths_by_person:
        raise DataError(f"{escape(str(folder))}: needs a folder for each person")
    loose_names = [entry.name for entry in entries if entry.is_file() and is_image_name(entry.name)]
    if loose_names:
        example = f"such as {escape(loose_names[0])!r}"
        count = format_count(len(loose_names), "image")
        say(f"{escape(str(folder))}: {count} left out, in no person's folder, {example}")
    images = embedder.embed_images([path for paths in paths_by_person.values() for path in paths], batch)
    embeddings = np.array([image.embedding for image in images], np.float32)
    boundaries = np.cumsum([len(paths) for paths in paths_by_person.values()])[:-1]
    return dict(zip(paths_by_person, np.split(embeddings, boundaries), strict=True))
