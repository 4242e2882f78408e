"""The JSON files of a run: what each one holds, read strictly and never through a link."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cnnrun.base.atomic_files import Folder
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import CheckpointError, escape
from cnnrun.contracts.facts import Facts

CONFIG = "config.yaml"
RESULT = "result.json"
ENVIRONMENT = "environment.json"
INITIAL_WEIGHTS = "weights.json"  # the weights that the run began with
DATA_LIST = "data.tsv.gz"  # the files that it learns from
PLAN = "plan.json"  # what `cnnrun plan` foretold of the training
CALIBRATION = "calibration.json"  # what `cnnrun calibrate` chose, and for which weights
FACTS = "facts.json"  # the data facts when it began
METRICS = "metrics.jsonl"
REPORT = "report.html"
CHECKPOINTS = "checkpoints"
EXPORTS = "exports"
EXPLAIN = "explain"

MAX_JSON_BYTES = 4 << 20
MAX_METRICS_BYTES = 256 << 20

Record = TypeVar("Record")
Digest = Annotated[str, Field(pattern=r"^[0-9a-f]{64}$")]
Environment = dict[str, str | int]


class _Record(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", allow_inf_nan=False)


class TrainingResult(_Record):
    """The outcome of a finished training. Later versions may add to it."""

    steps: int = Field(ge=0)
    best_step: int = Field(ge=0)
    best: dict[str, float]
    seconds: float = Field(ge=0)
    images_per_second: float = Field(ge=0)
    data_wait_share: float
    peak_memory_mib: int | None = None


class Environments(_Record):
    """The machine that a run began on, entry by entry, and those of later resumes."""

    __pydantic_extra__: Environment
    later: list[Environment] = []


class WeightsRecord(_Record):
    """The weights file that a run began with."""

    path: str
    sha256: Digest


class Choices(_Record):
    """Choices that val made for the weights of one checkpoint after the training."""

    chosen: dict[str, float]


_RESULT, _ENVIRONMENTS = TypeAdapter(TrainingResult), TypeAdapter(Environments)
_WEIGHTS, _CALIBRATION = TypeAdapter(WeightsRecord), TypeAdapter(dict[Digest, Choices])
_FACTS = TypeAdapter(Facts)
_METRICS = TypeAdapter(dict[str, float | int | str | None])


def read_result(run: Path) -> dict[str, Any] | None:
    """Read the outcome of a finished run; None for one that is not finished. Raises CheckpointError."""
    found = _read(run, RESULT, _RESULT)
    return None if found is None else found.model_dump()


def read_environments(run: Path) -> list[Environment]:
    """Read every environment that the run was trained in, the first one first. Raises CheckpointError."""
    found = _read(run, ENVIRONMENT, _ENVIRONMENTS)
    return [] if found is None else [dict(found.__pydantic_extra__), *found.later]


def read_initial_weights(run: Path) -> WeightsRecord | None:
    """The weights that the run began with; None where it began with random ones. Raises CheckpointError."""
    return _read(run, INITIAL_WEIGHTS, _WEIGHTS)


def read_facts(run: Path) -> Facts | None:
    """The data facts when the run began; None where it has not come so far. Raises CheckpointError."""
    found = _read(run, FACTS, _FACTS)
    if found is not None and (problem := found.consistency_problem()):
        raise CheckpointError(f"{escape(str(run / FACTS))}: damaged ({problem})")
    return found


def read_calibration(run: Path) -> dict[str, Choices]:
    """Read what was chosen on val after the training, by the digest of the weights. Raises CheckpointError."""
    return _read(run, CALIBRATION, _CALIBRATION) or {}


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """A row for each epoch; a last line that is still being written is left out. Raises CheckpointError."""
    path = run / METRICS
    if not path.exists():
        return []
    data = read_bytes(path, CheckpointError, MAX_METRICS_BYTES, Folder(run))
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        row: dict[str, Any] = _parsed(f"{path}:{number}", line, _METRICS)
        if not isinstance(row.get("step"), int) or not isinstance(row.get("epoch"), int):
            raise CheckpointError(f"{escape(str(path))}:{number}: damaged (no step or no epoch)")
        rows.append(row)
    return rows


def parse_facts(data: Any, where: str) -> Facts:
    """Data facts as a checkpoint holds them. Raises CheckpointError."""
    facts = _parsed(where, json.dumps(data).encode(), _FACTS)
    if problem := facts.consistency_problem():
        raise CheckpointError(f"{escape(where)}: damaged ({problem})")
    return facts


def _read(run: Path, name: str, adapter: TypeAdapter[Record]) -> Record | None:
    path = run / name
    if not path.is_symlink() and not path.exists():
        return None
    return _parsed(str(path), read_bytes(path, CheckpointError, MAX_JSON_BYTES, Folder(run)), adapter)


def _parsed(where: str, data: bytes, adapter: TypeAdapter[Record]) -> Record:
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{escape(where)}: damaged ({_first_problem(error)})") from None


def _first_problem(error: ValidationError) -> str:
    """The first mistake in a file, in one line."""
    first = error.errors(include_url=False, include_input=False)[0]
    place = ".".join(escape(str(each)) for each in first["loc"])
    return f"{place}: {first['msg']}" if place else str(first["msg"])
