"""The features of layers as vectors: to keep, to see as a map, and how far a linear probe gets with them (table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import ConfigError
from cnnrun.base.extras import require_package
from cnnrun.contracts.figure import Plot, Series
from cnnrun.data.dataset import Examples
from cnnrun.data.training_batches import batches_in_order
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.layer_names import LayerPlace, capture_outputs
from cnnrun.explain.method_base import Map
from cnnrun.explain.subject import Explanation, Subject, plot_to_pillow, sample_evenly

Vectors = NDArray[np.float32]
_MOST_MAPPED, _MOST_PROBED, _MOST_SERIES = 3000, 5000, 12


def embed(
    subject: Subject,
    splits: dict[str, Examples],
    name: str,
    layers: Sequence[str],
    kind: Map,
    batch: int,
    probe: bool | None,
) -> Explanation:
    """Vectors of the last layer named, a row a picture of the split; maps are meant over their places.

    By default of what the task's head takes. A linear model learns each layer's vectors on train and is measured on
    the split; with `probe` None where that can be. Raises ConfigError.
    """
    require_package("sklearn", "stats", "explain embed")
    chosen, examples = (
        [subject.find_layer(layer) for layer in layers] or default_layers(subject, probe is not False),
        splits[name],
    )
    last = chosen[-1]
    vectors = layer_vectors(subject, examples, [last], batch)[last.module_name]
    caption = f"{last.title}: {len(examples):,} pictures of {name} as {vectors.shape[1]} numbers each, "
    rows: list[dict[str, Any]] = [{"layer": last.title, "features": vectors.shape[1]}]
    said = ""
    if probe is not False:
        try:
            what = probe_metric(subject, splits["train"], examples)
            rows, said = probe_layers(subject, chosen, splits["train"], examples, what, batch)
        except ConfigError as error:
            if probe:
                raise
            said = f" Not probed: {error}."
    spread, how = _spread(vectors, kind)
    caption += f"{f'the first {len(spread):,} of them ' if len(spread) < len(examples) else ''}{how}.{said}"
    targets = examples.batch_targets(torch.arange(len(examples)), torch.device("cpu"))
    arrays: dict[str, NDArray[Any]] = {
        "features": vectors,
        "picture": np.array([examples.sample_name(number) for number in range(len(examples))]),
        "map": spread,
        **{key: values.numpy() for key, values in targets.items()},
    }
    data = {"layer": last.title, "split": name, "pictures": len(examples), "layers": rows}
    made = titled_grid([[("", plot_to_pillow(_plot(subject, examples, spread, last.title)))]])
    return Explanation(made, caption, data, "layers", arrays)


def probe_layers(
    subject: Subject, places: Sequence[LayerPlace], train: Examples, split: Examples, what: str, batch: int
) -> tuple[list[dict[str, Any]], str]:
    """A row a layer, and what was done in a sentence; of many pictures some at equal distances."""
    learned, measured = sample_evenly(train, _MOST_PROBED)[0], sample_evenly(split, _MOST_PROBED)[0]
    ours, theirs = (layer_vectors(subject, part, places, batch) for part in (learned, measured))
    rows = []
    for place in places:
        x, z = ours[place.module_name], theirs[place.module_name]
        value = probe_score(x, z, learned, measured, what)
        rows.append({"layer": place.title, "features": x.shape[1], what: value})
    return rows, (
        f" A linear model of each layer's vectors, learned from {len(learned):,} pictures of train and measured on "
        f"{len(measured):,}: {what}."
    )


def layer_vectors(subject: Subject, examples: Examples, places: Sequence[LayerPlace], batch: int) -> dict[str, Vectors]:
    """For each layer, by its module, a row a picture: maps meant over their places."""
    parts: dict[str, list[Tensor]] = {place.module_name: [] for place in places}
    with torch.no_grad(), capture_outputs(subject.trained.network, list(parts)) as kept:
        for part in batches_in_order(examples, batch, subject.trained.device):
            subject.trained.network(part.images)
            for module, found in parts.items():
                values = kept[module].float()
                found.append((values.mean((2, 3)) if values.dim() == 4 else values.flatten(1)).cpu())
    return {module: torch.cat(found).numpy() for module, found in parts.items()}


def probe_metric(subject: Subject, learned: Examples, measured: Examples) -> str:
    """What a probe can be measured by on these targets. Raises ConfigError where it cannot."""
    targets = subject.trained.task.target_kind
    if targets == "numbers":
        return "R2"
    if targets == "label sets":
        if not _told_apart(sample_evenly(learned, _MOST_PROBED)[0], sample_evenly(measured, _MOST_PROBED)[0]).any():
            raise ConfigError("no label is there in some pictures and not in others")
        return "mAP"
    if targets != "labels":
        raise ConfigError("a probe learns labels or numbers of whole pictures")
    known = set(sample_evenly(learned, _MOST_PROBED)[0].targets["labels"].tolist())
    if len(known) < 2:
        raise ConfigError("a probe needs two classes in train")
    if set(measured.targets["labels"].tolist()) - set(learned.targets["labels"].tolist()):
        raise ConfigError("a probe knows only the classes of train, and this split has others")
    return "accuracy"


def _told_apart(learned: Examples, measured: Examples) -> NDArray[np.bool_]:
    """Which labels are there in some pictures and not in others, in both."""
    ours, theirs = (each.targets["present"].numpy() > 0 for each in (learned, measured))
    return np.asarray(ours.any(0) & ~ours.all(0) & theirs.any(0) & ~theirs.all(0))


def probe_score(learned: Vectors, measured: Vectors, train: Examples, split: Examples, what: str) -> float:
    """The probe's number on the split: L2-regularised linear models, over features scaled to deviation 1."""
    from sklearn.linear_model import LogisticRegression, Ridge
    from sklearn.metrics import average_precision_score
    from sklearn.multiclass import OneVsRestClassifier
    from sklearn.preprocessing import StandardScaler

    scale = StandardScaler().fit(learned)
    x, z = scale.transform(learned), scale.transform(measured)
    if what == "accuracy":
        model = LogisticRegression(max_iter=2000).fit(x, train.targets["labels"].numpy())
        return float(model.score(z, split.targets["labels"].numpy()))
    if what == "R2":
        return float(Ridge().fit(x, train.targets["numbers"].numpy()).score(z, split.targets["numbers"].numpy()))
    present, wanted = train.targets["present"].numpy() > 0, split.targets["present"].numpy() > 0
    both = _told_apart(train, split)
    several = OneVsRestClassifier(LogisticRegression(max_iter=2000)).fit(x, present[:, both])
    return float(average_precision_score(wanted[:, both], several.decision_function(z).reshape(len(z), -1)))


def default_layers(subject: Subject, every: bool) -> list[LayerPlace]:
    """Every top-level layer with something of its own to say, where they are compared; what the head takes last."""
    known = [place for place in subject.informative_layers() if place.module_name.count(".") <= 1]
    last = known[-1]
    telling = [
        place for place in known if place.kind in ("conv", "linear", "residual", "parallel", "sequential", "repeat")
    ]
    return [*(place for place in telling if place != last), last] if every else [last]


def _spread(vectors: Vectors, kind: Map) -> tuple[NDArray[np.float64], str]:
    """[N, 2], of the first ones, and what that is; the same whenever it is asked for."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    first = vectors[:_MOST_MAPPED].astype(np.float64)
    if len(first) < 4 or first.shape[1] < 2:
        return np.pad(first, ((0, 0), (0, 2)))[:, :2], "by their first two numbers (too few for a map)"
    if kind == "pca":
        return PCA(2, svd_solver="full").fit_transform(first), "on their two principal axes"
    some = TSNE(2, init="pca", random_state=0, perplexity=min(30.0, (len(first) - 1) / 3)).fit_transform(first)
    return np.asarray(some, dtype=np.float64), "on a plane by t-SNE"


def _plot(subject: Subject, examples: Examples, spread: NDArray[np.float64], title: str) -> Plot:
    labels, classes = examples.targets.get("labels"), subject.trained.facts.classes
    if labels is None or len(classes) > _MOST_SERIES:
        return Plot(title, "", "", (Series("pictures", spread[:, 0].tolist(), spread[:, 1].tolist(), "points"),))
    own = labels[: len(spread)].numpy()
    series = [
        Series(name, spread[own == number, 0].tolist(), spread[own == number, 1].tolist(), "points")
        for number, name in enumerate(classes)
        if (own == number).any()
    ]
    return Plot(title, "", "", tuple(series))
