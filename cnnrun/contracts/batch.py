"""A batch, and the legend of the shape letters that stand at the end of names.

B batch   C channels   H height   W width   K classes   N any count   S slots   F features
pictures_BCHW: pixel values 0..255, uint8 or float32 (the network normalises); labels_B: int64 class numbers
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures with their targets; `index_B` are the samples' numbers in their split.

    Of an optimizer step's batch this is one rank's share: `whole` pictures on all ranks, `parts` in its micro-batches.
    """

    pictures: Tensor
    targets: dict[str, Tensor]
    index_B: Tensor
    whole: int
    parts: tuple[int, ...]

    def __len__(self) -> int:
        return self.pictures.shape[0]

    def micro(self) -> list[Batch]:
        """Its micro-batches."""
        if len(self.parts) == 1:
            return [self]
        pictures, index = self.pictures.split(self.parts), self.index_B.split(self.parts)
        targets = {name: value.split(self.parts) for name, value in self.targets.items()}
        return [
            Batch(pictures[i], {name: pieces[i] for name, pieces in targets.items()}, index[i], self.whole, (size,))
            for i, size in enumerate(self.parts)
        ]
