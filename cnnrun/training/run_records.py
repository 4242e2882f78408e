"""The JSON files of a run: their names, their contents, and reading them strictly, never through a link."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any, TypeVar

from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError

from cnnrun.base.atomic_files import Folder
from cnnrun.base.bounded_files import read_bytes
from cnnrun.base.errors import CheckpointError, escape
from cnnrun.contracts import stored_facts
from cnnrun.contracts.choices import Choices
from cnnrun.contracts.facts import DataFacts

CONFIG = "config.yaml"
RESULT = "result.json"
ENVIRONMENT = "environment.json"
INITIAL_WEIGHTS = "weights.json"  # the weights file that the run started from
EXTENDED = "extended.json"  # the finished run that the run goes on from
EXTENSIONS = "extensions.jsonl"  # the runs that go on from it
DATA_LIST = "data.tsv.gz"  # the files of its training data
PLAN = "plan.json"  # the estimates of `cnnrun plan`
CALIBRATION = "calibration.json"  # the choices of `cnnrun calibrate`, by digest of the weights
FACTS = "facts.json"  # the data facts at the start
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
    """The outcome of a finished training. Later versions of cnnrun may add fields."""

    steps: int = Field(ge=0)
    best_step: int = Field(ge=0)
    best: dict[str, float]
    # Times are of the last process of a resumed training.
    seconds: float = Field(ge=0)
    images_per_second: float = Field(ge=0)
    data_wait_share: float
    peak_memory_mib: int | None = None


class Environments(_Record):
    """The environment in which a run started, entry by entry, and those of later resumes."""

    __pydantic_extra__: Environment
    later: list[Environment] = []


class WeightsRecord(_Record):
    """The weights file that a run started from."""

    path: str
    sha256: Digest


class ExtensionRecord(_Record):
    """The finished run that a run goes on from: its folder, its epochs, and the step and SHA-256 of its checkpoint."""

    run: str
    epochs: int = Field(ge=1)
    step: int = Field(ge=1)
    sha256: Digest


_EXTENSION = TypeAdapter(ExtensionRecord)
_EXTENSIONS = TypeAdapter(dict[str, str])
_RESULT, _ENVIRONMENTS = TypeAdapter(TrainingResult), TypeAdapter(Environments)
_WEIGHTS, _CALIBRATION = TypeAdapter(WeightsRecord), TypeAdapter(dict[Digest, dict[str, Any]])
_STORED_FACTS = TypeAdapter(dict[str, Any])
_METRICS = TypeAdapter(dict[str, float | int | str | None])


def read_result(run: Path) -> dict[str, Any] | None:
    """Read the outcome of a finished run; None if the run is unfinished. Raises CheckpointError if damaged."""
    result = _read_record(run, RESULT, _RESULT)
    return None if result is None else result.model_dump()


def read_environments(run: Path) -> list[Environment]:
    """Read the environments in which the run was trained, oldest first. Raises CheckpointError if damaged."""
    record = _read_record(run, ENVIRONMENT, _ENVIRONMENTS)
    return [] if record is None else [dict(record.__pydantic_extra__), *record.later]


def read_initial_weights(run: Path) -> WeightsRecord | None:
    """Read which weights the run started from; None for random weights. Raises CheckpointError if damaged."""
    return _read_record(run, INITIAL_WEIGHTS, _WEIGHTS)


def read_extension(run: Path) -> ExtensionRecord | None:
    """Read which run this one extends; None if it began at its first step. Raises CheckpointError if damaged."""
    return _read_record(run, EXTENDED, _EXTENSION)


def read_extensions(run: Path) -> list[str]:
    """Read the folders of the runs that extend this one, oldest first. Raises CheckpointError if damaged."""
    path = run / EXTENSIONS
    if not path.is_symlink() and not path.exists():
        return []
    lines = read_bytes(path, CheckpointError, MAX_JSON_BYTES, Folder(run)).split(b"\n")[:-1]  # a cut line is left out
    return [_parse(f"{path} line {number}", line, _EXTENSIONS)["run"] for number, line in enumerate(lines, 1)]


def read_facts(run: Path) -> DataFacts | None:
    """Read the data facts at the start of the run; None before it has decoded its data.

    Raises CheckpointError if the file is damaged.
    """
    stored = _read_record(run, FACTS, _STORED_FACTS)
    return None if stored is None else parse_facts({"facts": stored}, str(run / FACTS))[0]


def read_calibration(run: Path) -> dict[str, dict[str, Any]]:
    """Read the records of `cnnrun calibrate`, by the weights' digest. Raises CheckpointError if damaged."""
    return _read_record(run, CALIBRATION, _CALIBRATION) or {}


def parse_calibration(record: dict[str, Any], run: Path) -> Choices:
    """Parse the choices of a record of `read_calibration`. Raises CheckpointError if they are damaged."""
    try:
        if "choices" in record:
            return stored_facts.parse_choices(record["choices"])
        return stored_facts.parse_described_choices(record["chosen"])
    except (ValueError, KeyError) as error:
        raise CheckpointError(f"{escape(str(run / CALIBRATION))}: damaged ({_first_problem(error)})") from None


def read_metrics(run: Path) -> list[dict[str, Any]]:
    """Read a row for each epoch, without a last line that is still being written.

    Raises CheckpointError if the file is damaged.
    """
    path = run / METRICS
    if not path.exists():
        return []
    data = read_bytes(path, CheckpointError, MAX_METRICS_BYTES, Folder(run))
    rows = []
    for number, line in enumerate(data[: data.rfind(b"\n") + 1].splitlines(), 1):
        row: dict[str, Any] = _parse(f"{path}:{number}", line, _METRICS)
        if not isinstance(row.get("step"), int) or not isinstance(row.get("epoch"), int):
            raise CheckpointError(f"{escape(str(path))}:{number}: damaged (no step or no epoch)")
        rows.append(row)
    return rows


def parse_facts(state: dict[str, Any], where: str) -> tuple[DataFacts, Choices]:
    """Parse the data facts and choices of a checkpoint's state. Raises CheckpointError if they are damaged."""
    try:
        facts, choices = stored_facts.parse_stored_facts(state.get("facts"))
        return facts, stored_facts.parse_choices(state["choices"]) if "choices" in state else choices
    except ValueError as error:
        raise CheckpointError(f"{escape(where)}: damaged ({_first_problem(error)})") from None


def _read_record(run: Path, name: str, adapter: TypeAdapter[Record]) -> Record | None:
    path = run / name
    if not path.is_symlink() and not path.exists():
        return None
    return _parse(str(path), read_bytes(path, CheckpointError, MAX_JSON_BYTES, Folder(run)), adapter)


def _parse(where: str, data: bytes, adapter: TypeAdapter[Record]) -> Record:
    try:
        return adapter.validate_json(data, strict=True)
    except ValidationError as error:
        raise CheckpointError(f"{escape(where)}: damaged ({_first_problem(error)})") from None


def _first_problem(error: Exception) -> str:
    """Describe the first error of a file in one line."""
    if not isinstance(error, ValidationError):
        return escape(str(error))
    first = error.errors(include_url=False, include_input=False)[0]
    key = ".".join(escape(str(part)) for part in first["loc"])
    return f"{key}: {first['msg']}" if key else str(first["msg"])
