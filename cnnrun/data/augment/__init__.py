"""Random augmentations of batches of images, as pure functions of (seed, epoch, sample)."""

__all__ = ["geometry", "random_slots", "settings"]
