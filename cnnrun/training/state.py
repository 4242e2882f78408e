"""State of a training besides tensors: counters, the best metric, the loss of the current epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Annotated, Any, ClassVar

from pydantic import ConfigDict, Field, TypeAdapter, ValidationError

from cnnrun.base.errors import CheckpointError, escape


@dataclass
class TrainingState:
    """Everything except tensors that changes during a run. A checkpoint holds it as JSON, by these names or aliases."""

    step: int = 0
    accumulate: int = 0  # micro-batches per batch: the config's, or more if memory ran out
    evaluated_step: Annotated[int, Field(alias="evaluated")] = 0  # the last step after which val was measured
    best: float | None = None
    best_step: int = 0
    evaluations_without_improvement: Annotated[int, Field(alias="waited")] = 0
    # The metric of the last evaluation that reset this count: it improved by more than early_stop.min_delta.
    patience_reference: Annotated[float | None, Field(alias="mark")] = None
    loss_sum: float = 0.0  # over the current epoch's steps
    loss_count: int = 0
    metrics_offset: int = 0  # size of metrics.jsonl in bytes

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    def to_json(self) -> dict[str, Any]:
        """Return the state as plain data for JSON."""
        state: dict[str, Any] = TypeAdapter(TrainingState).dump_python(self, by_alias=True)
        return state

    @classmethod
    def from_json(cls, data: Any, where: str) -> TrainingState:
        """Parse the state of a checkpoint; `where` is its file. Raises CheckpointError if it is damaged."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            key = ".".join(escape(str(part)) for part in first["loc"])
            raise CheckpointError(f"{where}: damaged (training.{key}: {first['msg']})") from None
        if missing := [key for key in state.to_json() if key not in data]:
            raise CheckpointError(f"{where}: damaged (training.{missing[0]} is missing)")
        steps, counts = (state.evaluated_step, state.best_step), (state.loss_count, state.metrics_offset)
        is_negative = min(state.step, *steps, *counts, state.evaluations_without_improvement) < 0
        contradictory = max(steps) > state.step or (state.best is None) != (state.best_step == 0)
        if is_negative or state.accumulate < 1 or contradictory:
            raise CheckpointError(f"{where}: damaged (its counters contradict each other)")
        return state
