"""The network that the `model` section describes: layers, structures, builder, outline and weights files.

`network.build_network` builds a network without memory; `network.materialize` gives it weights.
Imports `tasks`, `data` and the packages below them.
"""

__all__ = [
    "batch_norm_folding",
    "builder",
    "inference_layers",
    "layers",
    "network",
    "outline",
    "receptive_field",
    "structures",
    "tensor_matching",
    "trained_network",
    "weights_file",
]
