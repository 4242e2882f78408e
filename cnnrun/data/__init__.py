"""From files to batches: sources, decoding, the cache, storage, splits, order, augmentation, the audit.

`settings` has the `data` section of the YAML, `index` lists a source, `prepare` decodes it, and `training_batches`
makes batches. This package imports `contracts` and the packages below it, not `tasks`.
"""

__all__ = [
    "audit",
    "augment",
    "cache",
    "dataset",
    "decode",
    "epoch_order",
    "file_listing",
    "image_files",
    "image_names",
    "image_paths",
    "image_planes",
    "image_settings",
    "image_stores",
    "index",
    "manifest",
    "mask_files",
    "prepare",
    "settings",
    "sources",
    "split_names",
    "split_table",
    "storage",
    "targets",
    "training_batches",
]
