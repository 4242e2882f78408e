"""ONNX: one file with pre-processing, weights and metadata, for any ONNX runtime."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cnnrun.base.errors import CheckpointError, ConfigError
from cnnrun.config.spec import Kind

INPUT = "pixels"


class Onnx(Kind):
    """A graph from uint8 pixels [batch, height, width, channels] to the task's results, any batch size."""

    kind = "onnx"
    suffix: ClassVar[str] = ".onnx"
    record: ClassVar[str] = "parity.json"

    def write(self, module: nn.Module, example: Tensor, names: list[str], metadata: dict[str, Any], path: Path) -> None:
        """Write `module` as one ONNX file. Raises ConfigError where a layer has no ONNX form."""
        import onnx

        try:
            with silence_exporter():
                program = torch.onnx.export(
                    module,
                    (example,),
                    input_names=[INPUT],
                    output_names=names,
                    dynamic_shapes=({0: torch.export.Dim("batch")},),
                    dynamo=True,
                    custom_translation_table={torch.ops.cnnrun.non_maximum_suppression.default: _unsuppressed},
                )
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            raise ConfigError(f"the network has no ONNX form: {str(error).splitlines()[0]}") from None
        assert program is not None
        proto = program.model_proto
        for key, value in metadata.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
        _forget_where_it_was_made(proto.graph)
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString())

    def reload(self, path: Path) -> Callable[[NDArray[np.uint8]], list[NDArray[Any]]]:
        """The written file as a function of pixels. Raises CheckpointError where it does not load."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            # Bytes, not the path: a file that names other files as its weights then cannot read them.
            session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise CheckpointError(f"{path}: ONNX Runtime refuses it: {error}") from None

        def run(pixels: NDArray[np.uint8]) -> list[NDArray[Any]]:
            results: list[NDArray[Any]] = session.run(None, {INPUT: pixels})
            return results

        return run


def _unsuppressed(boxes: Any, scores: Any, labels: Any, most: float) -> Any:
    """`boxes.non_maximum_suppression` in ONNX's words: NonMaxSuppression, which wants a row of scores a class."""
    from onnxscript import opset18

    op: Any = opset18
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    classes = op.Add(op.ReduceMax(labels, keepdims=0), op.Constant(value_int=1))
    of_class = op.OneHot(labels, op.Reshape(classes, one), op.Constant(value_floats=[0.0, 1.0]), axis=1)
    by_class = op.Mul(of_class, op.Unsqueeze(scores, one))
    count = op.Shape(scores, start=1, end=2)
    threshold, none = op.Constant(value_floats=[most]), op.Constant(value_floats=[0.0])
    left = op.NonMaxSuppression(boxes, by_class, count, threshold, none)  # [S, 3]: picture, class, box
    places = op.Gather(left, op.Constant(value_ints=[0, 2]), axis=1)
    nothing = op.Expand(zero, op.Shape(scores))
    marks = op.Expand(one, op.Shape(left, start=0, end=1))
    return op.Cast(op.ScatterND(nothing, places, marks), to=9)  # to booleans


def _forget_where_it_was_made(graph: Any) -> None:
    """Remove the exporter's notes: every node carries a stack trace with the paths of this machine."""
    for entry in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")


@contextmanager
def silence_exporter() -> Iterator[None]:
    """The exporter narrates on stdout and logs about torchvision; our users asked for a file."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
