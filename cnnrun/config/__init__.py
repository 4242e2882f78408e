"""YAML text -> a positioned tree -> a checked spec: reading, blocks, overrides, suggestions, the zoo as text.

Knows no layer, task or source by name. Imports `base`.
"""
