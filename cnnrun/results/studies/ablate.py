"""`cnnrun explain ablate`: the network without some layers, or with other sizes: table 3 of Zeiler and Fergus 2014."""

from __future__ import annotations

import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from torch import nn

from cnnrun.base.errors import ConfigError, escape
from cnnrun.base.progress import say
from cnnrun.config import yaml_reader
from cnnrun.contracts.figure import Plot, Series
from cnnrun.contracts.results import Measurement
from cnnrun.data.dataset import Examples
from cnnrun.experiment.assemble import build_checked_network
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.schema import Experiment
from cnnrun.explain.figures.panels import titled_grid
from cnnrun.explain.layer_names import LayerPlace, find_layer
from cnnrun.explain.run_method import OpenRun, write_explanation
from cnnrun.explain.subject import PASS_THROUGH_KINDS, Explanation, plot_to_pillow
from cnnrun.results.compare import compare_metrics
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.report import write as reporting
from cnnrun.results.train_run import train_run
from cnnrun.training.evaluation import measure_split

_COMMA = re.compile(r",(?![^\[{]*[\]}])")  # one that is not inside a list or a mapping


@dataclass(frozen=True)
class Variant:
    """A changed network: layers that are left out, settings that are others. What it is called is what was written."""

    title: str
    removed_layers: tuple[LayerPlace, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """As part of a run's name."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.title).strip("-")[:80]


def run_ablation(
    run: OpenRun,
    remove: Sequence[str],
    change: Sequence[str],
    retrain: bool,
    split: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Numbers on val without layers (`remove`, several joined by commas) or with other settings (`change`).

    Each word is a variant. As trained, a layer can be left out where what comes in has the shape of what goes out;
    with none named each such layer is, one after the other. With `retrain` each variant is trained from scratch.
    """
    known = [place for place in run.subject.places if place.module_name != "head"]
    if retrain:
        if split:
            raise ConfigError("--split: variants that are trained are measured on train and val")
        variants = [_without(_as_written(known), word) for word in remove]
        variants += [Variant(word, overrides=tuple(_COMMA.split(word))) for word in change]
        return _shown(run, *_retrained(run, variants), "", out)
    if change:
        raise ConfigError("--change: other sizes have other weights; add --retrain")
    variants = [_without(known, word) for word in remove]
    variants = variants or [Variant(f"without {place.title}", (place,)) for place in _skipped(run)]
    if not variants:
        raise ConfigError("no layer gives what it takes, so none can be left out as trained; --remove and --retrain")
    for place in [place for variant in variants for place in variant.removed_layers]:
        if place not in _skipped(run):
            able = ", ".join(each.title for each in _skipped(run)) or "none"
            raise ConfigError(
                f"--remove {place.title}: what comes in has another shape than what goes out; add --retrain "
                f"(as trained these can go: {able})"
            )
    name = split or "val"
    return _shown(run, *_measured(run, variants, name), name, out)


def _without(known: Sequence[LayerPlace], word: str) -> Variant:
    removed = tuple(find_layer(known, each.strip(), known, "outputs", "--remove") for each in word.split(","))
    return Variant("without " + ", ".join(place.title for place in removed), removed)


def _as_written(known: Sequence[LayerPlace]) -> list[LayerPlace]:
    """The layers as the YAML has them: what stands in a `repeat` once, for all its turns."""
    return [replace(place, title=place.path) for place in {place.path: place for place in reversed(known)}.values()]


def _skipped(run: OpenRun) -> list[LayerPlace]:
    """The layers without which the network still fits together, but those that do nothing."""
    inside = run.subject.built_network.layers
    return [
        place
        for place in run.subject.places
        if place.module_name in inside
        and inside[place.module_name].in_shapes[:1] == (place.shape,)
        and not inside[place.module_name].spec.has_several_inputs
        and place.kind not in PASS_THROUGH_KINDS
    ]


Rows = list[dict[str, Any]]


def _measured(run: OpenRun, variants: Sequence[Variant], split: str) -> tuple[Rows, str]:
    """A row for each variant as trained, against the whole network on the same images; and a caption."""
    given = run.subject.trained
    name, data = run.load_data(split)
    whole = _numbers(run, data.splits[name])
    rows = [_row("as it is", whole.metrics, _size(given.network))]
    for variant in variants:
        with _left_out(given.network, variant.removed_layers):
            found = _numbers(run, data.splits[name])
        gone = _size(nn.ModuleList(given.network.get_submodule(place.module_name) for place in variant.removed_layers))
        row = _row(variant.title, found.metrics, rows[0]["parameters"] - gone)
        apart = [each["number"] for each in compare_metrics(whole, found) if each["distinguishable"]]
        rows.append(row | {"distinguishable": ", ".join(apart) or "nothing"})
    return rows, f"{len(data.splits[name]):,} pictures of {name}; the weights as they were trained with all layers."


def _numbers(run: OpenRun, examples: Examples) -> Measurement:
    given = run.subject.trained
    batch = run.experiment.train.batch
    return measure_split(given.network, None, given.task, given.facts, examples, batch, given.device)


def _row(title: str, numbers: Mapping[str, float | None], parameters: int) -> dict[str, Any]:
    return {"variant": title, "parameters": parameters, **numbers}


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _left_out(network: nn.Module, places: Sequence[LayerPlace]) -> Iterator[None]:
    """Inside, what comes into those layers comes out of them."""

    def through(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return inputs[0]

    handles = [network.get_submodule(place.module_name).register_forward_hook(through) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _retrained(run: OpenRun, variants: Sequence[Variant]) -> tuple[Rows, str]:
    """The config as it is and each variant, trained as runs of their own; those that are finished are taken.

    Returns a row for each and a caption.
    """
    if not variants:
        raise ConfigError("--retrain: say what to leave out (--remove) or to change (--change)")
    base, root, device = run.experiment, run.root, run.device
    made = [(Variant("as it is"), base)] + [(each, _changed(base, each)) for each in variants]
    facts = run.subject.trained.facts
    sizes = [
        build_checked_network(experiment, facts).parameter_count for _, experiment in made
    ]  # all mistakes before any training
    rows = []
    for (variant, experiment), size in zip(made, sizes, strict=True):
        say(f"{variant.title}:")
        result = train_run(experiment, root, device, resume=True)
        path = Path(result["run"])
        reporting.report_after_training(path, root, device, overwrite="already_finished" not in result)
        found = {split: evaluate_run(path, root, device, split)["numbers"] for split in ("train", "val")}
        both = {f"{split}/{key}": value for split, numbers in found.items() for key, value in numbers.items()}
        rows.append(_row(variant.title, both, size) | {"run": str(path)})
    return rows, "Each variant trained from scratch as the config says, its best checkpoint measured."


def _shown(run: OpenRun, rows: Rows, caption: str, split: str, out: Path | None) -> dict[str, Any]:
    """Write the table, and a figure of the number that the training was judged by (of others, the task's first)."""
    monitor = run.experiment.train.monitor
    number = monitor if not split else monitor.removeprefix("val/")
    if number not in rows[0]:
        number = ("" if split else "val/") + next(iter(run.experiment.task.metrics()))
    places = [float(place) for place in range(len(rows))]
    series = Series(number, [row[number] for row in rows], places, "points")
    plot = Plot("variants", number, "", (series,), ticks=tuple(row["variant"] for row in rows))
    made = Explanation(titled_grid([[("", plot_to_pillow(plot))]]), caption, {"variants": rows}, "variants")
    return write_explanation(run, "ablate-retrained" if not split else "ablate", made, out)


def _changed(base: Experiment, variant: Variant) -> Experiment:
    """The config of a variant, checked as every config is. Raises ConfigError."""
    data = base.model_dump(mode="json", by_alias=True, exclude_none=True)
    data["name"] = f"{base.name}-{variant.name}"
    layers = data["model"]["layers"] if isinstance(data["model"], dict) else data["model"]
    for place in sorted({place.path for place in variant.removed_layers}, key=_keys, reverse=True):
        *above, last = _keys(place)
        node: Any = layers
        for key in above:
            node = node[key]
        del node[last]
    overrides = list(variant.overrides)
    try:
        return parse_config(yaml_reader.dump_yaml(data), variant.title, overrides)
    except ConfigError as error:
        raise ConfigError(*(f"{escape(variant.title)}: {line}" for line in error.lines)) from None


def _keys(path: str) -> list[Any]:
    """A layer's path as keys from the model's list on: model[2].residual.layers[0].conv -> 2, residual, layers, 0."""
    found = re.findall(r"\[(\d+)\]|\.(\w+)", path.removeprefix("model"))
    keys: list[Any] = [int(number) if number else word for number, word in found]
    while keys and not isinstance(keys[-1], int):
        keys.pop()
    return keys
