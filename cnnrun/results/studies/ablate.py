"""`cnnrun explain ablate`: a network without some layers or with other settings (Zeiler and Fergus 2014, table 3)."""

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
from cnnrun.explain.layer_names import NamedLayer, find_layer
from cnnrun.explain.run import OpenRun
from cnnrun.explain.run_method import write_explanation
from cnnrun.explain.subject import PASS_THROUGH_KINDS, Explanation, plot_to_pillow
from cnnrun.results.compare import compare_metrics
from cnnrun.results.evaluate import evaluate_run
from cnnrun.results.report import writer as report_writer
from cnnrun.results.studies.train_run import train_run
from cnnrun.training.evaluation import measure_split

_COMMA = re.compile(r",(?![^\[{]*[\]}])")  # a comma that is not inside a list or a mapping


@dataclass(frozen=True)
class Variant:
    """A change of the network: layers to remove and settings to override; the title names them as the user did."""

    title: str
    removed_layers: tuple[NamedLayer, ...] = ()
    overrides: tuple[str, ...] = ()

    @property
    def name(self) -> str:
        """The title in a form that fits into a run's name."""
        return re.sub(r"[^A-Za-z0-9]+", "-", self.title).strip("-")[:80]


def run_ablation(
    run: OpenRun,
    remove: Sequence[str],
    change: Sequence[str],
    retrain: bool,
    split: str | None = None,
    out: Path | None = None,
) -> dict[str, Any]:
    """Measure the network without layers (`remove`) or with other settings (`change`); each item is one variant.

    An item may join several layers or settings by commas. In a trained network a layer can be removed if its input and
    output have the same shape; without `remove`, each such layer is removed in turn. With `retrain`, each variant is
    trained from scratch. Raises ConfigError.
    """
    places = [place for place in run.subject.places if place.module_name != "head"]
    if retrain:
        if split:
            raise ConfigError("--split: retrained variants are always measured on train and val; leave it out")
        variants = [_parse_removal(_merge_repeated(places), text) for text in remove]
        variants += [Variant(text, overrides=tuple(_COMMA.split(text))) for text in change]
        return _write_result(run, *_train_variants(run, variants), "", out)
    if change:
        raise ConfigError("--change: other settings need other weights; add --retrain")
    variants = [_parse_removal(places, text) for text in remove]
    variants = variants or [Variant(f"without {place.title}", (place,)) for place in _removable_places(run)]
    if not variants:
        raise ConfigError("no layer keeps the shape of its input, so none can be removed; use --remove with --retrain")
    for place in [place for variant in variants for place in variant.removed_layers]:
        if place not in _removable_places(run):
            removable = ", ".join(place.title for place in _removable_places(run)) or "none"
            raise ConfigError(
                f"--remove {place.title}: its input and output have different shapes; add --retrain "
                f"(without it, you can remove: {removable})"
            )
    split_name = split or "val"
    return _write_result(run, *_measure_variants(run, variants, split_name), split_name, out)


def _parse_removal(places: Sequence[NamedLayer], text: str) -> Variant:
    removed_layers = tuple(find_layer(places, name.strip(), places, "outputs", "--remove") for name in text.split(","))
    return Variant("without " + ", ".join(place.title for place in removed_layers), removed_layers)


def _merge_repeated(places: Sequence[NamedLayer]) -> list[NamedLayer]:
    """Merge the copies of a repeated layer: one place for each layer in the YAML."""
    return [replace(place, title=place.path) for place in {place.path: place for place in reversed(places)}.values()]


def _removable_places(run: OpenRun) -> list[NamedLayer]:
    """Layers whose input has the shape of their output, except those that change nothing in evaluation."""
    layers = run.subject.built_network.layers
    return [
        place
        for place in run.subject.places
        if place.module_name in layers
        and layers[place.module_name].in_shapes[:1] == (place.shape,)
        and not layers[place.module_name].spec.has_several_inputs
        and place.kind not in PASS_THROUGH_KINDS
    ]


Rows = list[dict[str, Any]]


def _measure_variants(run: OpenRun, variants: Sequence[Variant], split: str) -> tuple[Rows, str]:
    """Measure each variant without training, against the whole network on the same images: rows and a caption."""
    trained = run.subject.trained
    split_name, data = run.load_data(split)
    reference = _measure_network(run, data.splits[split_name])
    rows = [_variant_row("unchanged", reference.metrics, _parameter_count(trained.network))]
    for variant in variants:
        with _skip_layers(trained.network, variant.removed_layers):
            measurement = _measure_network(run, data.splits[split_name])
        removed = nn.ModuleList(trained.network.get_submodule(place.module_name) for place in variant.removed_layers)
        row = _variant_row(variant.title, measurement.metrics, rows[0]["parameters"] - _parameter_count(removed))
        tests = compare_metrics(reference, measurement)
        distinguishable = [test["number"] for test in tests if test["distinguishable"]]
        rows.append(row | {"distinguishable": ", ".join(distinguishable) or "nothing"})
    return rows, f"{len(data.splits[split_name]):,} images of {split_name}; the weights were trained with all layers."


def _measure_network(run: OpenRun, examples: Examples) -> Measurement:
    trained = run.subject.trained
    batch = run.experiment.train.batch
    return measure_split(replace(trained.to_measure(), criterion=None), examples, batch)


def _variant_row(title: str, numbers: Mapping[str, float | None], parameters: int) -> dict[str, Any]:
    return {"variant": title, "parameters": parameters, **numbers}


def _parameter_count(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


@contextmanager
def _skip_layers(network: nn.Module, places: Sequence[NamedLayer]) -> Iterator[None]:
    """Make layers return their input inside the context."""

    def return_input(module: nn.Module, inputs: tuple[Any, ...], output: Any) -> Any:
        return inputs[0]

    handles = [network.get_submodule(place.module_name).register_forward_hook(return_input) for place in places]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


def _train_variants(run: OpenRun, variants: Sequence[Variant]) -> tuple[Rows, str]:
    """Train the unchanged config and each variant as runs of their own; finished runs are not trained again.

    Returns a row for each and a caption.
    """
    if not variants:
        raise ConfigError("--retrain: give layers to remove (--remove) or settings to change (--change)")
    experiment, runs, device = run.experiment, run.runs, run.device
    variant_experiments = [(Variant("unchanged"), experiment)]
    variant_experiments += [(variant, _variant_experiment(experiment, variant)) for variant in variants]
    facts = run.subject.trained.facts
    # Building every network first reports mistakes in any variant before the first training.
    networks = [build_checked_network(variant_experiment, facts) for _, variant_experiment in variant_experiments]
    rows = []
    for (variant, variant_experiment), network in zip(variant_experiments, networks, strict=True):
        say(f"{variant.title}:")
        result = train_run(variant_experiment, runs, device, resume=True)
        path = Path(result["run"])
        report_writer.report_after_training(path, runs, device, overwrite="already_finished" not in result)
        metrics: dict[str, float | None] = {}
        for split in ("train", "val"):
            evaluation = evaluate_run(path, runs, device, split)
            metrics |= {f"{split}/{key}": value for key, value in evaluation["numbers"].items()}
        rows.append(_variant_row(variant.title, metrics, network.parameter_count) | {"run": str(path)})
    return rows, "Each variant trained from scratch as the config says, its best checkpoint measured."


def _write_result(run: OpenRun, rows: Rows, caption: str, split: str, out: Path | None) -> dict[str, Any]:
    """Write the table and a figure of the monitored metric, or of the task's first metric if that is not measured."""
    monitor = run.experiment.train.monitor
    metric = monitor if not split else monitor.removeprefix("val/")
    if metric not in rows[0]:
        metric = ("" if split else "val/") + next(iter(run.experiment.task.metrics()))
    positions = [float(position) for position in range(len(rows))]
    series = Series(metric, [row[metric] for row in rows], positions, "points")
    plot = Plot("variants", metric, "", (series,), ticks=tuple(row["variant"] for row in rows))
    explanation = Explanation(titled_grid([[("", plot_to_pillow(plot))]]), caption, {"variants": rows}, "variants")
    return write_explanation(run, "ablate-retrained" if not split else "ablate", explanation, out)


def _variant_experiment(base: Experiment, variant: Variant) -> Experiment:
    """Build and check the config of a variant. Raises ConfigError."""
    data = base.model_dump(mode="json", by_alias=True, exclude_none=True)
    data["name"] = f"{base.name}-{variant.name}"
    layers = data["model"]["layers"] if isinstance(data["model"], dict) else data["model"]
    for place in sorted({place.path for place in variant.removed_layers}, key=_path_keys, reverse=True):
        *parent_keys, index = _path_keys(place)
        node: Any = layers
        for key in parent_keys:
            node = node[key]
        del node[index]
    overrides = list(variant.overrides)
    try:
        return parse_config(yaml_reader.dump_yaml(data), variant.title, overrides)
    except ConfigError as error:
        raise ConfigError(*(f"{escape(variant.title)}: {line}" for line in error.lines)) from None


def _path_keys(path: str) -> list[Any]:
    """Split a layer's path into keys below `model`: model[2].residual.layers[0].conv -> 2, residual, layers, 0."""
    matches = re.findall(r"\[(\d+)\]|\.(\w+)", path.removeprefix("model"))
    keys: list[Any] = [int(index) if index else name for index, name in matches]
    while keys and not isinstance(keys[-1], int):
        keys.pop()
    return keys
