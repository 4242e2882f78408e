"""torchvision's published weights of zoo networks: fetched on request, checked, and converted to weights files."""

from __future__ import annotations

import os
import re
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cnnrun.base.atomic_files import make_folder
from cnnrun.base.downloads import RemoteFile, download
from cnnrun.base.errors import CheckpointError, ConfigError, DownloadError, StorageError, escape
from cnnrun.base.locks import hold_lock
from cnnrun.base.progress import progress_bar, say
from cnnrun.config import zoo
from cnnrun.config.messages import did_you_mean
from cnnrun.data.cache import user_cache_folder
from cnnrun.experiment.import_weights import convert_weights
from cnnrun.model import weights_file
from cnnrun.model.tensor_matching import StateDict

LICENCE = (
    "published by torchvision (BSD 3-Clause), trained on ImageNet, whose terms allow research and teaching without "
    "profit: whether they bind the weights is for you to decide"
)
# Tensors of the published files that belong to heads that only the training used.
_AUXILIARY_HEADS = {"googlenet": ("aux1.*", "aux2.*"), "inception_v3": ("AuxLogits.*",)}
FACE_MODELS = Path("data/face-models")  # where scripts/get_data puts the published face networks
_DIGEST = re.compile(r"-([0-9a-f]{8,})\.pth$")


@dataclass(frozen=True)
class PublishedWeights:
    """An entry of torchvision's registry: its name, its file, the input that it was measured with, its accuracy."""

    network: str
    entry: str
    file: RemoteFile
    crop_pct: float
    is_bicubic: bool
    accuracy: float

    @property
    def file_name(self) -> str:
        """The name of the published file."""
        return self.file.url.rsplit("/", 1)[-1]


def list_published(network: str) -> list[PublishedWeights]:
    """List torchvision's weights of a zoo network, its recommended ones first. Raises ConfigError if it has none."""
    import torchvision

    if network not in zoo.network_names():
        zoo.read_entry(network)  # raises ConfigError with a suggestion
    try:
        entries = torchvision.models.get_model_weights(network)
    except ValueError:
        raise ConfigError(f"{network}: torchvision publishes no weights of this network") from None
    return sorted((_read_entry(network, entry) for entry in entries), key=lambda item: item.entry, reverse=True)


def _read_entry(network: str, entry: Any) -> PublishedWeights:
    preset, digest = entry.transforms(), _DIGEST.search(entry.url)
    assert digest, entry.url
    max_bytes = round((entry.meta["_file_size"] + 0.01) * 2**20)  # the registry rounds to 0.001 MiB
    (metrics,) = entry.meta["_metrics"].values()
    return PublishedWeights(
        network=network,
        entry=entry.name,
        file=RemoteFile(entry.url, digest[1], max_bytes),
        crop_pct=preset.crop_size[0] / preset.resize_size[0],
        is_bicubic=preset.interpolation.value == "bicubic",
        accuracy=metrics["acc@1"] / 100,
    )


def weights_path(network: str) -> Path | None:
    """Path of the fetched weights of a zoo network in the user's cache; None if the user has no cache folder."""
    folder = user_cache_folder()
    return folder / "weights" / f"{network}.safetensors" if folder else None


def fetch_weights(network: str, entry: str | None, file: Path | None, out: Path | None) -> dict[str, Any]:
    """Fetch a network's weights, or take them from `file`, and write them as a weights file; returns what it holds.

    `entry` is torchvision's name of the weights, by default the recommended ones; `out`, a new file, is by default in
    the user's cache. Weights that are there already are not fetched again. Raises ConfigError, CheckpointError,
    DownloadError or StorageError.
    """
    published = list_published(network)
    chosen = _choose_entry(published, entry)
    target = out or weights_path(network)
    if target is None:
        raise StorageError("there is no cache folder, because HOME is not set; give --out FILE.safetensors")
    if target.suffix != ".safetensors":
        raise ConfigError(f"--out {target}: give a file that ends in .safetensors")
    if out is not None and os.path.lexists(out):
        raise ConfigError(f"--out {escape(str(out))}: already exists; choose another")
    if file is not None:
        return _convert(_recognize(file, published if entry is None else [chosen]), file, target)
    make_folder(target.parent)
    # A folder of its own, so that no file of the user's is taken for the download, or removed with it.
    folder = target.parent / f".{chosen.file_name}.download"
    make_folder(folder)
    with hold_lock(target.parent / f".{target.name}.lock", lambda: say(f"{target}: another process is fetching it")):
        if out is None and (fetched := _read_fetched(chosen, target)):
            say(f"{target}: these weights are here already")
            return fetched
        say(f"fetching {chosen.file.url}")
        try:
            download(chosen.file, folder / chosen.file_name, progress_bar)
        except DownloadError as error:
            elsewhere = f"fetch that address on another machine and give the file: --from {chosen.file_name}"
            raise DownloadError(*error.lines, elsewhere) from None
        written = _convert(chosen, folder / chosen.file_name, target)
        shutil.rmtree(folder, ignore_errors=True)
    return written


def _read_fetched(chosen: PublishedWeights, target: Path) -> dict[str, Any] | None:
    """Describe the weights in the cache; None if their file is missing, damaged, or made of other weights."""
    try:
        weights = weights_file.read_weights_file(target)
    except CheckpointError:
        return None
    return _describe(chosen, target, weights.tensors) if weights.origin == _origin(chosen) else None


def _origin(chosen: PublishedWeights) -> dict[str, str]:
    """Metadata of a weights file: its source, entry and licence."""
    return {"source": chosen.file.url, "entry": chosen.entry, "licence": LICENCE}


def _choose_entry(published: list[PublishedWeights], entry: str | None) -> PublishedWeights:
    names = [item.entry for item in published]
    if entry is not None and entry not in names:
        known = did_you_mean(entry, names)
        raise ConfigError(f"--entry {escape(entry)}: {published[0].network} has {', '.join(names)}{known}")
    return published[0] if entry is None else published[names.index(entry)]


def _recognize(file: Path, published: list[PublishedWeights]) -> PublishedWeights:
    """The registry's entry that `file` is, by its SHA-256. Raises CheckpointError if it is none of them."""
    digest = weights_file.file_digest(file)
    for item in published:
        if digest.startswith(item.file.digest_prefix):
            return item
    names, network = " or ".join(item.file_name for item in published), published[0].network
    raise CheckpointError(
        f"--from {escape(str(file))}: not {names} (its SHA-256 begins with {digest[:16]}); "
        f"to convert other weights: cnnrun import FILE --like {network}"
    )


def _convert(chosen: PublishedWeights, path: Path, target: Path) -> dict[str, Any]:
    """Convert the published file, through the guarded reader, and write it as a weights file."""
    drop = _AUXILIARY_HEADS.get(chosen.network, ())
    converted = convert_weights(path, chosen.network, "order", "imagenet", drop, chosen.crop_pct)
    origin = _origin(chosen)
    weights_file.write_weights_file(target, converted.tensors, converted.description, converted.facts, origin)
    return _describe(chosen, target, converted.tensors)


def _describe(chosen: PublishedWeights, target: Path, tensors: StateDict) -> dict[str, Any]:
    return {
        "path": str(target),
        "network": chosen.network,
        "entry": chosen.entry,
        "parameters": sum(value.numel() for name, value in tensors.items() if not _is_statistic(name)),
        "accuracy": chosen.accuracy,
        "bicubic": chosen.is_bicubic,
        "licence": LICENCE,
    }


def _is_statistic(name: str) -> bool:
    """Return whether a tensor is measured rather than learned: of a batch norm, or of the images."""
    return name.startswith("normalize.") or name.endswith(("running_mean", "running_var", "num_batches_tracked"))
