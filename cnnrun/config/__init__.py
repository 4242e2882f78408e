"""The YAML config: text -> tree with positions -> validated spec; also blocks, suggestions and the zoo's files.

This package names no layer, task or source. It imports `base`.
"""

__all__ = ["blocks", "messages", "spec", "tree", "yaml_reader", "zoo"]
