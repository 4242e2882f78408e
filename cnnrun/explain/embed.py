"""The features of layers as vectors: to keep, to see as a map, and how far a linear probe gets with them (table 7)."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.batches import in_order
from cnnrun.dataset import Examples
from cnnrun.errors import ConfigError
from cnnrun.explain import AS_THEY_COME, Explanation, Subject, drawn
from cnnrun.panels import side_by_side
from cnnrun.plots import Plot, Series
from cnnrun.seeing import Place, captured, located

Map = Literal["pca", "tsne"]
Vectors = NDArray[np.float32]
_MOST_MAPPED, _MOST_LEARNED, _MOST_SERIES = 3000, 5000, 12


def embed(
    subject: Subject,
    splits: dict[str, Examples],
    name: str,
    layers: Sequence[str],
    kind: Map,
    batch: int,
    probe: bool,
) -> Explanation:
    """Vectors of the last layer named, a row a picture of the split; maps are meant over their places.

    By default of what the task's head takes. A linear model learns each layer's vectors on train and is measured on
    the split. Raises ConfigError.
    """
    chosen = [located(subject.places, layer, subject.places, "features") for layer in layers] or _default(
        subject, probe
    )
    vectors = vectors_of(subject, splits[name], chosen, batch)
    last, examples = chosen[-1], splits[name]
    rows: list[dict[str, Any]] = [
        {"layer": place.title, "features": vectors[place.module].shape[1]} for place in chosen
    ]
    said = ""
    if probe:
        learned = _part(splits["train"], _MOST_LEARNED)
        trained = vectors_of(subject, learned, chosen, batch)
        what = probed(subject, learned, examples)
        for row, place in zip(rows, chosen, strict=True):
            row[what] = probe_of(trained[place.module], vectors[place.module], learned, examples, what)
        said = f" A linear model of each layer's vectors, learned from {len(learned):,} pictures of train: {what}."
    spread = _spread(vectors[last.module], kind)
    plot = _plot(subject, examples, spread, f"{last.title}, {'principal axes' if kind == 'pca' else 't-SNE'}")
    first = f"the first {len(spread):,} of them " if len(spread) < len(examples) else ""
    caption = f"{last.title}: {len(examples):,} pictures of {name} as {vectors[last.module].shape[1]} numbers each, "
    caption += f"{first}on a map of two.{said}"
    arrays: dict[str, NDArray[Any]] = {
        "features": vectors[last.module],
        "picture": np.array([examples.name(number) for number in range(len(examples))]),
        "map": spread,
        **{key: values.numpy() for key, values in examples.targets.items()},
    }
    data = {"layer": last.title, "split": name, "pictures": len(examples), "layers": rows}
    return Explanation(side_by_side([[("", drawn(plot))]]), caption, data, "layers", arrays)


def vectors_of(subject: Subject, examples: Examples, places: Sequence[Place], batch: int) -> dict[str, Vectors]:
    """For each layer, by its module, a row a picture: maps meant over their places."""
    parts: dict[str, list[Tensor]] = {place.module: [] for place in places}
    with torch.no_grad(), captured(subject.given.network, list(parts)) as kept:
        for part in in_order(examples, batch, subject.given.device):
            subject.given.network(part.pictures)
            for module, found in parts.items():
                values = kept[module].float()
                found.append((values.mean((2, 3)) if values.dim() == 4 else values.flatten(1)).cpu())
    return {module: torch.cat(found).numpy() for module, found in parts.items()}


def probed(subject: Subject, learned: Examples, measured: Examples) -> str:
    """What a probe can be measured by on these targets. Raises ConfigError where it cannot."""
    targets = subject.given.task.targets
    if targets == "numbers":
        return "R2"
    if targets == "label sets":
        return "mAP"
    if targets != "labels":
        raise ConfigError("a probe learns labels or numbers of whole pictures; use --no-probe")
    unknown = set(measured.targets["labels"].tolist()) - set(learned.targets["labels"].tolist())
    if unknown:
        raise ConfigError("a probe knows only the classes of train, and this split has others; use --no-probe")
    return "accuracy"


def probe_of(learned: Vectors, measured: Vectors, train: Examples, split: Examples, what: str) -> float:
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
    both = (present.any(0) & ~present.all(0)) & (wanted.any(0) & ~wanted.all(0))  # others have nothing to tell
    several = OneVsRestClassifier(LogisticRegression(max_iter=2000)).fit(x, present[:, both])
    return float(average_precision_score(wanted[:, both], several.decision_function(z).reshape(len(z), -1)))


def _default(subject: Subject, every: bool) -> list[Place]:
    """Every top-level layer with something of its own to say, where they are compared; what the head takes last."""
    above = [place for place in subject.places if place.module != "head" and place.module.count(".") == 1]
    known = [place for place in above if place.kind not in AS_THEY_COME]
    last = known[-1] if known else subject.places[-1]
    telling = [
        place for place in known if place.kind in ("conv", "linear", "residual", "parallel", "sequential", "repeat")
    ]
    return [*(place for place in telling if place != last), last] if every else [last]


def _part(examples: Examples, most: int) -> Examples:
    """At most so many samples, at equal distances."""
    if len(examples) <= most:
        return examples
    kept = torch.zeros(len(examples), dtype=torch.bool)
    kept[torch.linspace(0, len(examples) - 1, most).round().long()] = True
    return examples.only(kept)


def _spread(vectors: Vectors, kind: Map) -> NDArray[np.float64]:
    """[N, 2], of the first ones; the same whenever it is asked for."""
    from sklearn.decomposition import PCA
    from sklearn.manifold import TSNE

    first = vectors[:_MOST_MAPPED].astype(np.float64)
    if len(first) < 3 or first.shape[1] < 2:
        raise ConfigError(f"a map needs three pictures and two features; here are {len(first)} and {first.shape[1]}")
    if kind == "pca":
        found: NDArray[np.float64] = PCA(2, svd_solver="full").fit_transform(first)
        return found
    some = TSNE(2, init="pca", random_state=0, perplexity=min(30.0, (len(first) - 1) / 3)).fit_transform(first)
    return np.asarray(some, dtype=np.float64)


def _plot(subject: Subject, examples: Examples, spread: NDArray[np.float64], title: str) -> Plot:
    labels, classes = examples.targets.get("labels"), subject.given.facts.classes
    if labels is None or len(classes) > _MOST_SERIES:
        return Plot(title, "", "", (Series("pictures", spread[:, 0].tolist(), spread[:, 1].tolist(), "points"),))
    own = labels[: len(spread)].numpy()
    series = [
        Series(name, spread[own == number, 0].tolist(), spread[own == number, 1].tolist(), "points")
        for number, name in enumerate(classes)
        if (own == number).any()
    ]
    return Plot(title, "", "", tuple(series))
