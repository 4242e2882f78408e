"""Write a config for new data: read it, choose every setting, audit it, and check the config."""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

from cnnrun.base.atomic_files import write_text
from cnnrun.base.errors import CheckpointError, ConfigError, escape
from cnnrun.base.progress import progress_bar, say
from cnnrun.data.audit import audit_dataset
from cnnrun.data.dataset import Dataset
from cnnrun.data.index import index_source
from cnnrun.data.prepare import build_dataset
from cnnrun.data.settings import Data
from cnnrun.experiment.assemble import load_initial_weights
from cnnrun.experiment.config_file import parse_config
from cnnrun.experiment.init.choice import Choice, choose
from cnnrun.experiment.init.config_text import format_config
from cnnrun.experiment.init.layouts import guess_data
from cnnrun.experiment.init.pretrained import Pretrained, find_pretrained
from cnnrun.experiment.init.reading import Reading, Request
from cnnrun.experiment.init.recipes import RECIPES, Recipe
from cnnrun.experiment.init.survey import Survey, survey_source
from cnnrun.experiment.init.tuned_recipes import FACE_SIZE, reason_without_weights, recipes_from_weights
from cnnrun.experiment.schema import Experiment
from cnnrun.experiment.training_checks import check_training_possible
from cnnrun.model.weights_file import Weights


def write_config(
    data: str,
    request: Request,
    out: Path | None,
    minutes: float,
    weights: Path | None = None,
    from_scratch: bool = False,
) -> dict[str, Any]:
    """Write a config for the data; return how it was read, the chosen settings and the audit.

    The number of epochs is chosen for a training of `minutes`. `weights` are published weights to start from, by
    default those in the user's cache; with `from_scratch` none are. Raises ConfigError or DataError.
    """
    reading = _read_data(data, request)
    path = out or Path(f"{reading.name}.yaml")
    _refuse_path(path)
    for line in (reading.describe(), *reading.notes, *reading.questions):
        say(line)
    survey = survey_source(reading.source, RECIPES[reading.task].holds_out_classes)
    pretrained = None if from_scratch else find_pretrained(weights, reading.verifies_faces)
    if reading.verifies_faces and not from_scratch:
        _say_about_face_network(survey, pretrained)
    choice = _choose_settings(RECIPES[reading.task](survey), pretrained, weights, minutes)
    dataset, findings = _audit_source(survey, choice)
    text = format_config(reading, choice, dataset, findings, minutes, path)
    experiment = parse_config(text, str(path))
    initial_weights = _load_weights(experiment)
    built_network = check_training_possible(experiment, dataset, initial_weights)
    write_text(path, text)
    return {
        "path": str(path),
        "task": reading.task,
        "reason": reading.reason,
        "parameters": built_network.parameter_count,
        "weights": experiment.model.weights,
        "frozen": experiment.train.freeze is not None,
        **_describe_choice(choice),
        **findings,
    }


def _read_data(data: str, request: Request) -> Reading:
    if request.task is not None and request.task not in RECIPES:
        raise ConfigError(f"--task {escape(request.task)}: init writes configs for {', '.join(RECIPES)}")
    return guess_data(data, request)


def _say_about_face_network(survey: Survey, pretrained: Pretrained | None) -> None:
    """Say why the published face network is not used, if it is not."""
    height, width = survey.median
    if survey.median != FACE_SIZE:
        say(f"faces of {width}x{height}: the published face network takes 150x150 (cnnrun faces --size 150)")
    elif pretrained is None:
        network = "the published face network, which can tell faces apart without training on yours"
        say(f"{network}, is not here: scripts/get_data face-models")


def _refuse_path(path: Path) -> None:
    """Raise ConfigError if no config can be written to `path`."""
    if path.exists():
        raise ConfigError(f"{escape(str(path))}: already exists; choose another --out")
    if not path.parent.is_dir():
        raise ConfigError(f"{escape(str(path.parent))}: no such folder; choose another --out")


def _describe_choice(choice: Choice) -> dict[str, Any]:
    return {
        "size": list(choice.size),
        "channels": choice.channels,
        "epochs": choice.epochs,
        "batch": choice.batch,
        "images_per_second": round(choice.images_per_second),
        "minutes": round(choice.seconds / 60, 2),
    }


def _choose_settings(recipe: Recipe, pretrained: Pretrained | None, asked: Path | None, minutes: float) -> Choice:
    """Choose the settings from scratch, or from published weights if there are any and the minutes allow it.

    Raises ConfigError if weights were asked for that the task cannot use.
    """
    candidates = recipes_from_weights(recipe, pretrained) if pretrained is not None else []
    if asked and not candidates:
        raise ConfigError(f"--weights {escape(str(asked))}: {reason_without_weights(recipe)}; leave it out")
    passed_over = []
    for candidate in candidates:
        choice = choose(candidate, minutes)
        fewest = candidate.min_epochs or candidate.epochs[0]
        if choice.epochs >= fewest:
            return choice
        passed_over.append(f"{fewest} epochs from them take {math.ceil(choice.minutes_of(fewest))} minutes (--minutes)")
    if pretrained and passed_over:
        say(f"not from the weights of {pretrained.network} in {minutes:g} minutes: {passed_over[-1]}")
    return choose(recipe, minutes)


def _load_weights(experiment: Experiment) -> Weights | None:
    """Read the weights that the config starts from. Raises CheckpointError that says how to do without."""
    try:
        return load_initial_weights(experiment)
    except CheckpointError as error:
        raise CheckpointError(
            *error.lines, "fetch them again with `cnnrun zoo weights`, or use --from-scratch"
        ) from None


def _audit_source(survey: Survey, choice: Choice) -> tuple[Dataset, dict[str, Any]]:
    """Decode the source with the chosen settings; returns its usable images, and the audit of all its images."""
    skip = {"bad_files": "skip", "bad_boxes": "skip", "leakage": "skip"}
    settings = Data.model_validate({**choice.data_section(), **skip})
    contents = None if settings.split.by == "label" else survey.index.contents  # not read, and its notes said, twice
    source_index = index_source(settings, contents)
    dataset = build_dataset(settings, source_index, progress_bar)
    lenient = settings.model_copy(update={"leakage": "keep"})
    strict = settings.model_copy(update={"leakage": "error", "bad_files": "error", "bad_boxes": "error"})
    audit = audit_dataset(strict, build_dataset(lenient, source_index, progress_bar), progress_bar)
    return dataset, audit | {"bad_boxes": sum(not box.is_used for box in source_index.contents.bad_boxes)}
