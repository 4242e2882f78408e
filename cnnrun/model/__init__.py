"""From the `model` section to modules: layers, structures, builder, network, outline, weights files.

`network.build` makes a network without memory, `network.materialize` one with weights.
Imports `tasks`, `data` and what is below.
"""
