"""Random changes of a batch of images, as pure functions of (seed, epoch, sample)."""
