"""State of a training besides tensors: counters, the best metric, the loss of the current epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cnnrun.base.errors import CheckpointError, escape


@dataclass
class TrainingState:
    """Everything except tensors that changes during a run. A checkpoint holds it as JSON, by these names."""

    step: int = 0
    accumulate: int = 0  # micro-batches per batch: the config's, or more if memory ran out
    evaluated: int = 0  # the last step after which val was measured
    best: float | None = None
    best_step: int = 0
    waited: int = 0  # evaluations without improvement
    mark: float | None = None  # an evaluation better by early_stop.min_delta resets `waited`
    loss_sum: float = 0.0  # over the current epoch's steps
    loss_count: int = 0
    metrics_offset: int = 0  # size of metrics.jsonl in bytes

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_json(cls, data: Any, where: str) -> TrainingState:
        """Parse the state of a checkpoint; `where` is its file. Raises CheckpointError if it is damaged."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(escape(str(part)) for part in first["loc"])
            raise CheckpointError(f"{where}: damaged (training.{key}: {first['msg']})") from None
        if missing := [field.name for field in fields(cls) if field.name not in data]:
            raise CheckpointError(f"{where}: damaged (training.{missing[0]} is missing)")
        counters = (state.step, state.evaluated, state.best_step, state.waited, state.loss_count, state.metrics_offset)
        contradictory = max(state.evaluated, state.best_step) > state.step or (state.best is None) != (
            state.best_step == 0
        )
        if min(counters) < 0 or state.accumulate < 1 or contradictory:
            raise CheckpointError(f"{where}: damaged (its counters contradict each other)")
        return state
