"""Export of trained networks: the formats, one module each, and the parity check.

The union `Format` is the registry of formats. `write.export_network` writes a file and keeps it only if its results
equal the network's. This package imports `experiment` and the packages below it, but not `explain`.
"""

from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code

Format = Onnx | Code
