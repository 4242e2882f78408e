"""Promises of layers, sources and tasks, and the plain data that passes between packages.

Specs are written against it, and whoever works with specs reads it first. Imports `config` and `base`.
"""
