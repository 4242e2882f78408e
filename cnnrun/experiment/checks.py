"""Check and summarize a config without training: `cnnrun check`, `cnnrun summary` and the network's outline."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

from torch import Tensor

from cnnrun.contracts.facts import DataFacts
from cnnrun.contracts.task_parts import FeatureLevel
from cnnrun.data.index import SourceIndex, class_warnings, index_source
from cnnrun.data.prepare import refuse_bad_boxes, refuse_missing_files
from cnnrun.experiment.assemble import (
    build_checked_network,
    build_experiment_network,
    load_initial_weights,
    prepare_dataset,
)
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import check_eval_splits, check_training_possible, class_notes, step_notes
from cnnrun.model.network import BuiltNetwork, flops
from cnnrun.model.outline import OutlineEntry, build_outline
from cnnrun.model.weights_file import Weights


def check(experiment: Experiment, decode: bool = True) -> dict[str, Any]:
    """Check everything that training would check, and describe the training, without training.

    With `decode=False` images are not decoded, so damaged files and duplicates are not found. Raises ConfigError,
    DataError or CheckpointError, as training would.
    """
    weights = load_initial_weights(experiment)
    experiment = experiment.with_statistics_of_weights(weights.facts if weights else None)
    source_index = index_source(experiment.data)
    if decode:
        data = prepare_dataset(experiment, source_index)
        built_network, facts = check_training_possible(experiment, data, weights), data.facts
        targets, notes = data.splits["train"].all_targets(), [*data.notes, *class_notes(experiment, data)]
    else:
        built_network, facts, targets = _check_undecoded(experiment, source_index, weights)
        notes = [
            *class_warnings(source_index),
            "images were not decoded, so damaged files and duplicates were not looked for",
        ]
    levels = [FeatureLevel(level.shape, level.field, level.stride) for level in built_network.levels]
    notes += step_notes(experiment, facts)
    return {
        "name": experiment.name,
        "classes": list(facts.classes),
        "numbers": list(facts.to_json()["numbers"]),
        "image": list(facts.image_shape),
        "counts": facts.counts,
        "parameters": built_network.parameter_count,
        "flops": sum(flops(built_network)),
        "steps": experiment.train.steps_per_epoch(facts.counts["train"]) * experiment.train.epochs,
        "decoded": decode,
        "remarks": [
            *notes,
            *experiment.task.bind(facts).showing.feature_level_notes(levels, targets),
        ],
    }


def _check_undecoded(
    experiment: Experiment, source_index: SourceIndex, weights: Weights | None
) -> tuple[BuiltNetwork, DataFacts, dict[str, Tensor]]:
    """Check what can be checked without decoding. Returns the network, the data facts and the training targets."""
    facts, image = facts_before_decoding(experiment), experiment.data.image
    refuse_bad_boxes(source_index, experiment.data.bad_boxes)
    refuse_missing_files(source_index, experiment.data.bad_files)
    built_network = build_checked_network(experiment, facts, weights)
    targets = {name: source_index.targets(name, facts.image_shape, image) for name in source_index.splits}
    check_eval_splits(experiment, facts, targets)
    return built_network, facts, targets["train"]


def summarize(experiment: Experiment) -> dict[str, Any]:
    """Describe the network for the config's data, one row per layer."""
    facts = facts_before_decoding(experiment)
    built_network = build_experiment_network(experiment, experiment.task.bind(facts))
    summary_rows = zip(built_network.rows, flops(built_network), strict=True)
    rows = [asdict(row) | {"flops": row_flops} for row, row_flops in summary_rows]
    totals = {key: sum(row[key] for row in rows) for key in ("parameters", "flops", "activation_bytes")}
    return {"name": experiment.name, "image": list(facts.image_shape), "layers": rows, "total": totals}


def build_config_outline(experiment: Experiment) -> list[OutlineEntry]:
    """The outline of the network for the config's data."""
    return build_outline(
        build_experiment_network(experiment, experiment.task.bind(facts_before_decoding(experiment))),
        experiment.task.kind,
    )


def facts_before_decoding(experiment: Experiment) -> DataFacts:
    """The data facts that are known after listing the files, without decoding them."""
    source_index, shape = index_source(experiment.data), experiment.data.image_shape()
    assert shape is not None, "read_config refuses a config without an image size"
    return DataFacts(
        source_index.contents.classes,
        shape,
        class_counts=source_index.class_counts(),
        counts=source_index.counts,
        numbers=source_index.numbers(),
    )
