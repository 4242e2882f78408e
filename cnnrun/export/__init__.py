"""Export of trained networks: the formats, one module for each (`onnx`, `python_file`), and the parity check.

The union `Format` is the registry. `write.export_network` writes a file and keeps it only if its results equal the
network's. Imports `experiment` and the packages below it, not `explain`.
"""

from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code

__all__ = ["Format", "onnx", "parity", "python_file", "writer"]

Format = Onnx | Code
