"""A batch, and the legend of the shape letters that stand at the end of names.

B batch   C channels   H height   W width   K classes   N any count   S slots   F features
pictures_BCHW: pixel values 0..255, uint8 or float32 (the network normalises); labels_B: int64 class numbers
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Pictures with their targets; `index_B` are the samples' numbers in their split."""

    pictures: Tensor
    targets: dict[str, Tensor]
    index_B: Tensor

    def __len__(self) -> int:
        return self.pictures.shape[0]

    def split(self, parts: int) -> list[Batch]:
        """Consecutive micro-batches, as equal as possible; `parts` = 1 gives the batch itself."""
        if parts == 1:
            return [self]
        pictures, index = self.pictures.tensor_split(parts), self.index_B.tensor_split(parts)
        targets = {name: value.tensor_split(parts) for name, value in self.targets.items()}
        return [
            Batch(pictures[i], {name: pieces[i] for name, pieces in targets.items()}, index[i])
            for i in range(parts)
            if len(index[i])
        ]
