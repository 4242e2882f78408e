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

    images: Tensor
    targets: dict[str, Tensor]
    index_B: Tensor
    global_size: int
    micro_sizes: tuple[int, ...]

    def __len__(self) -> int:
        return self.images.shape[0]

    def micro_batches(self) -> list[Batch]:
        """Its micro-batches."""
        if len(self.micro_sizes) == 1:
            return [self]
        pictures, index = self.images.split(self.micro_sizes), self.index_B.split(self.micro_sizes)
        targets = {name: value.split(self.micro_sizes) for name, value in self.targets.items()}
        return [
            Batch(
                pictures[i], {name: pieces[i] for name, pieces in targets.items()}, index[i], self.global_size, (size,)
            )
            for i, size in enumerate(self.micro_sizes)
        ]
