"""Learning-rate schedules: factors on the optimizer's learning rate, which depend only on the step."""

from __future__ import annotations

import math
from typing import Annotated, Literal

from pydantic import Field

from cnnrun.config.spec import Kind

UnitInterval = Annotated[float, Field(ge=0, le=1)]


class ScheduleSpec(Kind):
    """A factor on the learning rate at each step."""

    def factor(self, step: int, total: int) -> float:
        """Return the factor for optimizer step `step` (from 0) of `total`."""
        raise NotImplementedError

    def problem(self, total: int) -> str | None:
        """The reason that the schedule does not fit a training of `total` steps, or None."""
        return None

    def decay_start(self, total: int) -> int | None:
        """The step at which the only part that depends on `total` begins; None if earlier factors depend on it too."""
        return None


class WarmupSchedule(ScheduleSpec):
    """A factor that rises to 1 during `warmup`, a fraction of the run."""

    warmup: float = Field(0.0, ge=0, lt=1)
    start: float = Field(0.01, ge=0, le=1)
    """The factor at the first step of the warm-up."""

    def factor(self, step: int, total: int) -> float:
        warmup_steps = self.warmup * total
        if step < warmup_steps:
            return self.start + (1 - self.start) * step / warmup_steps
        return self.factor_after_warmup((step - warmup_steps) / max(1.0, total - warmup_steps))

    def factor_after_warmup(self, progress: float) -> float:
        """Return the factor after the warm-up; `progress` in [0, 1) is the part of the remaining steps that is done."""
        raise NotImplementedError


class Constant(WarmupSchedule):
    """The optimizer's learning rate throughout, after the warm-up if there is one."""

    kind = "constant"

    def factor_after_warmup(self, progress: float) -> float:
        return 1.0


class Cosine(WarmupSchedule):
    """Half a cosine from 1 down to `end` (Loshchilov and Hutter 2017)."""

    kind = "cosine"
    end: UnitInterval = 0.0

    def factor_after_warmup(self, progress: float) -> float:
        return self.end + (1 - self.end) * (1 + math.cos(math.pi * progress)) / 2


class OneCycle(WarmupSchedule):
    """Up to the peak, then down to nearly zero (Smith and Topin 2019)."""

    kind = "one_cycle"
    main = "warmup"
    warmup: float = Field(0.3, ge=0, lt=1)
    start: UnitInterval = 0.04
    end: UnitInterval = 4e-6
    anneal: Literal["cosine", "linear"] = "cosine"

    def factor_after_warmup(self, progress: float) -> float:
        fraction = progress if self.anneal == "linear" else (1 - math.cos(math.pi * progress)) / 2
        return 1 + (self.end - 1) * fraction


class Step(WarmupSchedule):
    """Multiplies by `gamma` at each of the `milestones`, which are fractions of the run."""

    kind = "step"
    main = "milestones"
    milestones: list[UnitInterval] = Field([0.5, 0.75], min_length=1)
    gamma: float = Field(0.1, gt=0, le=1)

    def factor(self, step: int, total: int) -> float:
        passed = sum(step >= milestone * total for milestone in self.milestones)
        return self.gamma**passed * super().factor(step, total)

    def factor_after_warmup(self, progress: float) -> float:
        return 1.0


class WarmupStableDecay(ScheduleSpec):
    """Up, level, then down to `end` over the last part of the run (Hu et al. 2024, section 4; Hägele et al. 2024).

    A finished run can be extended from the checkpoint before its decay: 100 epochs and 50 more are then the same, to
    the bit, as 150.
    """

    kind = "warmup_stable_decay"
    main = "decay"
    decay: float = Field(0.2, gt=0, lt=1)
    """The last part of the run, in which the factor falls."""
    warmup_steps: int = Field(0, ge=0, le=1_000_000_000)
    """Optimizer steps of the warm-up; not a part of the run, so that a longer run begins in the same way."""
    start: UnitInterval = 0.01
    """The factor at the first step of the warm-up."""
    end: UnitInterval = 0.0
    anneal: Literal["linear", "sqrt"] = "linear"
    """`sqrt` falls as one minus the root of the decay's progress: fast at first."""

    def factor(self, step: int, total: int) -> float:
        rising = min(1.0, step / self.warmup_steps) if self.warmup_steps else 1.0
        level = self.start + (1 - self.start) * rising
        decay_start = self.decay_start(total)
        if step < decay_start:
            return level
        progress = (step - decay_start) / max(1, total - decay_start)
        fallen = progress if self.anneal == "linear" else math.sqrt(progress)
        return level * (1 + (self.end - 1) * fallen)

    def problem(self, total: int) -> str | None:
        if self.warmup_steps <= self.decay_start(total):
            return None
        return f"warmup_steps: {self.warmup_steps:,} of {total:,} steps reach into the decay; give fewer"

    def decay_start(self, total: int) -> int:
        return math.ceil((1 - self.decay) * total)


Schedule = Constant | Cosine | OneCycle | Step | WarmupStableDecay
