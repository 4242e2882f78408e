"""The state of a training that is not a tensor: counters, the best metric, the loss since the last epoch."""

from __future__ import annotations

import json
from dataclasses import dataclass, fields
from typing import Any, ClassVar

from pydantic import ConfigDict, TypeAdapter, ValidationError

from cnnrun.base.errors import CheckpointError, escape


@dataclass
class TrainingState:
    """Everything that changes during a run and is not a tensor; `checkpoint` saves it as it is."""

    step: int = 0
    accumulate: int = 0  # micro-batches a batch: the config's, or more where memory did not suffice
    evaluated: int = 0  # the step after which val was measured last
    best: float | None = None
    best_step: int = 0
    waited: int = 0
    mark: float | None = None  # what an evaluation must beat by early_stop.min_delta for the waiting to start anew
    loss_sum: float = 0.0  # of this epoch's steps so far
    loss_count: int = 0
    metrics_offset: int = 0

    __pydantic_config__: ClassVar[ConfigDict] = ConfigDict(extra="forbid", allow_inf_nan=False)

    @classmethod
    def from_json(cls, data: Any, where: str) -> TrainingState:
        """The state that a checkpoint holds. Raises CheckpointError."""
        try:
            state = TypeAdapter(cls).validate_json(json.dumps(data), strict=True)
        except ValidationError as error:
            first = error.errors(include_url=False, include_input=False)[0]
            place = ".".join(escape(str(each)) for each in first["loc"])
            raise CheckpointError(f"{where}: damaged (training.{place}: {first['msg']})") from None
        if missing := [each.name for each in fields(cls) if each.name not in data]:
            raise CheckpointError(f"{where}: damaged (training.{missing[0]} is missing)")
        counters = (state.step, state.evaluated, state.best_step, state.waited, state.loss_count, state.metrics_offset)
        ahead = max(state.evaluated, state.best_step) > state.step or (state.best is None) != (state.best_step == 0)
        if min(counters) < 0 or state.accumulate < 1 or ahead:
            raise CheckpointError(f"{where}: damaged (its counters are of no training)")
        return state
