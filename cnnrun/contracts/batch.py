"""A batch of images and targets, and the meaning of the shape letters at the end of names.

B batch   C channels   H height   W width   K classes   N, M any count   S slots of random numbers   F features
P pairs or partners   T targets of a regression, or thresholds   4 corners of a box   N1 N + 1
images_BCHW: pixel values 0..255, uint8 or float32 (the network normalises them); labels_B: int64 class indices
"""

from __future__ import annotations

from dataclasses import dataclass

from torch import Tensor


@dataclass(frozen=True)
class Batch:
    """Images with their targets; `index_B` are the indices of the samples in their split.

    This is one rank's share of the batch of an optimizer step. `global_size` counts the images on all ranks,
    `micro_sizes` those in each micro-batch of this rank.
    """

    images: Tensor
    targets: dict[str, Tensor]
    index_B: Tensor
    global_size: int
    micro_sizes: tuple[int, ...]

    def __len__(self) -> int:
        return self.images.shape[0]

    def micro_batches(self) -> list[Batch]:
        """Split the batch into micro-batches of `micro_sizes`."""
        if len(self.micro_sizes) == 1:
            return [self]
        images, indices = self.images.split(self.micro_sizes), self.index_B.split(self.micro_sizes)
        targets = {name: value.split(self.micro_sizes) for name, value in self.targets.items()}
        return [
            Batch(images[i], {name: parts[i] for name, parts in targets.items()}, indices[i], self.global_size, (size,))
            for i, size in enumerate(self.micro_sizes)
        ]
