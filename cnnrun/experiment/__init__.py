"""The whole config, and everything that needs all of it: schema, cross-checks, assembly, training, resuming, init.

`config_file.read_config` reads a config; `assemble` builds data, network and training setup from it. The packages below
see only their own sections. Imports `training` and the packages below it.
"""

__all__ = [
    "assemble",
    "checks",
    "config_differences",
    "config_file",
    "data_check",
    "extensions",
    "import_weights",
    "init",
    "open_run",
    "preparation",
    "run",
    "schema",
    "training_checks",
    "zoo_weights",
]
