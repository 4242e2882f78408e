"""From files to batches: sources, decoding, the cache, storage, splits, order, augmentation, the audit.

`dataset` has the `data` section of the YAML, `prepare` decodes it, `training_batches` gives batches.
Imports `contracts` and what is below, not `tasks`.
"""
