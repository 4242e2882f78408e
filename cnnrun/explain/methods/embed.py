"""`explain embed`: features of layers as vectors, with a map and the accuracy of linear probes (table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError
from cnnrun.base.extras import require_package
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.target_kind import TargetKind
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.layer_names import NamedLayer, capture_outputs
from cnnrun.explain.method_base import Map
from cnnrun.explain.subject import ExplainedNetwork, Explanation, plot_to_pillow, sample_evenly

Vectors = NDArray[np.float32]
_MAX_MAPPED = 3000  # points of the map
_MAX_PROBED = 5000  # images of a split on which a probe is fitted or measured
_MAX_SERIES = 12  # with more classes, all points of the map have one colour


@dataclass(frozen=True)
class EmbedOptions:
    """The layers of which the last one is mapped, by default the head's input, the projection of the map, and whether \
to fit a probe; None fits one if the targets allow it."""

    layers: Sequence[str]
    projection: Map
    probe: bool | None


def embed(
    subject: ExplainedNetwork,
    splits: dict[str, Examples],
    split_name: str,
    options: EmbedOptions,
    batch: int,
) -> Explanation:
    """Compute vectors of a layer, a row for each image of the split; feature maps are averaged over space.

    A linear model is fitted on each layer's vectors of train and measured on the split. Raises ConfigError.
    """
    layers, projection, probe = options.layers, options.projection, options.probe
    require_package("sklearn", "stats", "explain embed")
    places, examples = (
        [subject.find_layer(layer) for layer in layers] or default_layers(subject, probe is not False),
        splits[split_name],
    )
    last_place = places[-1]
    vectors = layer_vectors(subject, examples, [last_place], batch)[last_place.module_name]
    images = f"{format_count(len(examples), 'image')} of {split_name}"
    caption = f"{last_place.title}: {images} as vectors of {vectors.shape[1]} values, "
    rows: list[dict[str, Any]] = [{"layer": last_place.title, "features": vectors.shape[1]}]
    probe_note = ""
    if probe is not False:
        try:
            metric = probe_metric(subject, splits["train"], examples)
            rows, probe_note = probe_layers(subject, places, splits["train"], examples, metric, batch)
        except ConfigError as error:
            if probe:
                raise
            probe_note = f" No probe: {error}."
    points_N2, description = _project_to_plane(vectors, projection)
    shown = f"the first {len(points_N2):,} of them " if len(points_N2) < len(examples) else ""
    caption += f"{shown}{description}.{probe_note}"
    arrays = _embedding_arrays(examples, vectors, points_N2)
    data = {"layer": last_place.title, "split": split_name, "pictures": len(examples), "layers": rows}
    image = titled_grid([[("", plot_to_pillow(_map_plot(subject, examples, points_N2, last_place.title)))]])
    return Explanation(image, caption, data, "layers", arrays)


def _embedding_arrays(examples: Examples, vectors: Vectors, points_N2: NDArray[np.float64]) -> dict[str, NDArray[Any]]:
    """Arrays of the embedding's file: vectors, sample names, points of the map and targets."""
    targets = examples.batch_targets(torch.arange(len(examples)), torch.device("cpu"))
    return {
        "features": vectors,
        "picture": np.array([examples.sample_name(index) for index in range(len(examples))]),
        "map": points_N2,
        **{key: values.numpy() for key, values in targets.items()},
    }


def probe_layers(
    subject: ExplainedNetwork, places: Sequence[NamedLayer], train: Examples, split: Examples, metric: str, batch: int
) -> tuple[list[dict[str, Any]], str]:
    """Fit and measure a probe for each layer, on evenly spaced images of large splits.

    Returns a row for each layer and a note for the caption.
    """
    train_sample, split_sample = sample_evenly(train, _MAX_PROBED)[0], sample_evenly(split, _MAX_PROBED)[0]
    train_vectors = layer_vectors(subject, train_sample, places, batch)
    split_vectors = layer_vectors(subject, split_sample, places, batch)
    rows = []
    for place in places:
        x_train, x_split = train_vectors[place.module_name], split_vectors[place.module_name]
        score = probe_score(x_train, x_split, train_sample, split_sample, metric)
        rows.append({"layer": place.title, "features": x_train.shape[1], metric: score})
    return rows, (
        f" A linear model of each layer's vectors, fitted on {len(train_sample):,} images of train and measured on "
        f"{len(split_sample):,}: {metric}."
    )


def layer_vectors(
    subject: ExplainedNetwork, examples: Examples, places: Sequence[NamedLayer], batch_size: int
) -> dict[str, Vectors]:
    """Compute vectors by module, a row for each image; feature maps are averaged over space."""
    vectors_by_module: dict[str, list[Tensor]] = {place.module_name: [] for place in places}
    with torch.no_grad(), capture_outputs(subject.trained.network, list(vectors_by_module)) as outputs:
        for batch in batches_in_order(examples, batch_size, subject.trained.device):
            subject.trained.network(batch.images)
            for module, vectors in vectors_by_module.items():
                output = outputs[module].float()
                vectors.append((output.mean((2, 3)) if output.dim() == 4 else output.flatten(1)).cpu())
    return {module: torch.cat(vectors).numpy() for module, vectors in vectors_by_module.items()}


def probe_metric(subject: ExplainedNetwork, train: Examples, split: Examples) -> str:
    """Metric for a probe on these targets. Raises ConfigError if no probe can be fitted and measured."""
    target_kind = subject.trained.task.spec.target_kind
    if target_kind is TargetKind.NUMBERS:
        return "R2"
    if target_kind is TargetKind.LABEL_SETS:
        if not _varying_labels(sample_evenly(train, _MAX_PROBED)[0], sample_evenly(split, _MAX_PROBED)[0]).any():
            raise ConfigError("no label is present in some images and absent in others")
        return "mAP"
    if target_kind is not TargetKind.LABELS:
        raise ConfigError("a probe needs labels or numbers for whole images")
    train_classes = set(sample_evenly(train, _MAX_PROBED)[0].targets["labels"].tolist())
    if len(train_classes) < 2:
        raise ConfigError("a probe needs two classes in train")
    if set(split.targets["labels"].tolist()) - set(train.targets["labels"].tolist()):
        raise ConfigError("a probe knows only the classes of train, and this split has others")
    return "accuracy"


def _varying_labels(train: Examples, split: Examples) -> NDArray[np.bool_]:
    """Mark the labels that are present in some images and absent in others, in both splits."""
    train_present, split_present = (examples.targets["present"].numpy() > 0 for examples in (train, split))
    return np.asarray(train_present.any(0) & ~train_present.all(0) & split_present.any(0) & ~split_present.all(0))


def probe_score(train_vectors: Vectors, split_vectors: Vectors, train: Examples, split: Examples, metric: str) -> float:
    """Fit an L2-regularized linear model on standardized features of train; returns its metric on the split."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import average_precision_score
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler().fit(train_vectors)
    x_train, x_split = scaler.transform(train_vectors), scaler.transform(split_vectors)
    if metric == "accuracy":
        model = LogisticRegression(max_iter=2000).fit(x_train, train.targets["labels"].numpy())
        return float(model.score(x_split, split.targets["labels"].numpy()))
    if metric == "R2":
        ridge = Ridge().fit(x_train, train.targets["numbers"].numpy())
        return float(ridge.score(x_split, split.targets["numbers"].numpy()))
    train_present, split_present = train.targets["present"].numpy() > 0, split.targets["present"].numpy() > 0
    varying = _varying_labels(train, split)
    classifiers = OneVsRestClassifier(LogisticRegression(max_iter=2000)).fit(x_train, train_present[:, varying])
    scores = classifiers.decision_function(x_split).reshape(len(x_split), -1)
    return float(average_precision_score(split_present[:, varying], scores))


def default_layers(subject: ExplainedNetwork, all_layers: bool) -> list[NamedLayer]:
    """Choose the head's input as the last layer; with `all_layers`, the informative top-level layers before it too."""
    places = [place for place in subject.informative_layers() if place.module_name.count(".") <= 1]
    last_place = places[-1]
    informative = [
        place for place in places if place.kind in ("conv", "linear", "residual", "parallel", "sequential", "repeat")
    ]
    return [*(place for place in informative if place != last_place), last_place] if all_layers else [last_place]


def _project_to_plane(vectors: Vectors, projection: Map) -> tuple[NDArray[np.float64], str]:
    """Project the first vectors to points [N, 2], deterministically; returns them with a description."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    first = vectors[:_MAX_MAPPED].astype(np.float64)
    if len(first) < 4 or first.shape[1] < 2:
        return np.pad(first, ((0, 0), (0, 2)))[:, :2], "by their first two values (too few for a map)"
    if projection == "pca":
        return PCA(2, svd_solver="full").fit_transform(first), "on their two principal axes"
    points = TSNE(2, init="pca", random_state=0, perplexity=min(30.0, (len(first) - 1) / 3)).fit_transform(first)
    return np.asarray(points, dtype=np.float64), "on a plane by t-SNE"


def _map_plot(subject: ExplainedNetwork, examples: Examples, points_N2: NDArray[np.float64], title: str) -> Plot:
    labels, classes = examples.targets.get("labels"), subject.trained.facts.classes
    if labels is None or len(classes) > _MAX_SERIES:
        return Plot(title, "", "", (Series("images", points_N2[:, 0].tolist(), points_N2[:, 1].tolist(), "points"),))
    shown_labels = labels[: len(points_N2)].numpy()
    points_by_class = {name: points_N2[shown_labels == class_index] for class_index, name in enumerate(classes)}
    series = [
        Series(name, points[:, 0].tolist(), points[:, 1].tolist(), "points")
        for name, points in points_by_class.items()
        if len(points)
    ]
    return Plot(title, "", "", tuple(series))
