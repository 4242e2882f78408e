"""Exported files: formats, a kind a file (`onnx`, `python_file`), and the parity gate.

The union is the registry of formats. `write.export` writes a file and keeps it only if it is the model.
Imports `experiment` and what is below, not `explain`.
"""

from cnnrun.export.onnx import Onnx
from cnnrun.export.python_file import Code

__all__ = ["Format", "onnx", "parity", "python_file", "write"]

Format = Onnx | Code
