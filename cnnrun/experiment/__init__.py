"""The whole file and what joins packages: schema, cross-checks, assembly, resuming, opening a finished run, init.

`schema.load` reads a config, `assemble` makes objects of it. Only here and above is the whole file seen.
Imports `training` and what is below.
"""
