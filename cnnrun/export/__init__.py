"""Export of trained networks: the formats (`onnx`, `python_file`) and the comparison with the network.

The union `Format` is the registry. `write.export_network` writes a file and keeps it only if it equals the network.
Imports `experiment` and the packages below it, not `explain`.
"""

from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code

__all__ = ["Format", "onnx", "parity", "python_file", "write"]

Format = Onnx | Code
