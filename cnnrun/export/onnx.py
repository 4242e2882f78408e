"""Export to ONNX: one file with normalization, weights and metadata, for any ONNX runtime."""

from __future__ import annotations

import io
import json
import logging
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any, ClassVar

import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from cnnrun.base.errors import CheckpointError, ConfigError
from cnnrun.config.spec import Kind

INPUT = "pixels"


class Onnx(Kind):
    """An ONNX graph from uint8 pixels [batch, height, width, channels] to the task's results, for any batch size.

    The pixels are uint16, or int16 with a black below 0, for a network whose images keep 16 bits.
    """

    kind = "onnx"
    suffix: ClassVar[str] = ".onnx"
    record: ClassVar[str] = "parity.json"

    def write(
        self,
        module: nn.Module,
        example: Tensor,
        names: list[str],
        metadata: dict[str, Any],
        path: Path,
        *,
        has_any_size: bool = False,
    ) -> None:
        """Write `module` as one ONNX file, for any batch size; with `has_any_size` for images of any size too.

        Raises ConfigError if a layer has no ONNX form.
        """
        import onnx

        dimensions = (0, 1, 2) if has_any_size else (0,)
        try:
            with silence_exporter():
                program = torch.onnx.export(
                    module,
                    (example,),
                    input_names=[INPUT],
                    output_names=names,
                    dynamic_shapes=(dict.fromkeys(dimensions, torch.export.Dim.DYNAMIC),),
                    dynamo=True,
                    custom_translation_table={torch.ops.cnnrun.non_maximum_suppression.default: _suppression_graph},
                )
        except (torch.onnx.OnnxExporterError, torch.onnx.errors.OnnxExporterError) as error:
            raise ConfigError(f"the network has no ONNX form: {str(error).splitlines()[0]}") from None
        assert program is not None
        proto = program.model_proto
        for key, value in metadata.items():
            entry = proto.metadata_props.add()
            entry.key, entry.value = key, value if isinstance(value, str) else json.dumps(value)
        _remove_exporter_notes(proto.graph)
        onnx.checker.check_model(proto)
        path.write_bytes(proto.SerializeToString())

    def reload(self, path: Path) -> Callable[[NDArray[Any]], list[NDArray[Any]]]:
        """Load a written file as a function of pixels. Raises CheckpointError if it does not load."""
        import onnxruntime

        options = onnxruntime.SessionOptions()
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            # From bytes, not a path, so that the file cannot make the runtime read other files as its weights.
            session = onnxruntime.InferenceSession(path.read_bytes(), options, providers=["CPUExecutionProvider"])
        except Exception as error:  # onnxruntime's own exceptions share no base class
            raise CheckpointError(f"{path}: ONNX Runtime cannot load it ({error})") from None

        def run(pixels: NDArray[Any]) -> list[NDArray[Any]]:
            results: list[NDArray[Any]] = session.run(None, {INPUT: pixels})
            return results

        return run


def _suppression_graph(boxes: Any, scores: Any, labels: Any, max_overlap: float) -> Any:
    """Translate `boxes.non_maximum_suppression` to ONNX's operator, which takes a row of scores per class."""
    from onnxscript import opset18

    op: Any = opset18
    zero, one = op.Constant(value_ints=[0]), op.Constant(value_ints=[1])
    classes = op.Add(op.ReduceMax(labels, keepdims=0), op.Constant(value_int=1))
    one_hot = op.OneHot(labels, op.Reshape(classes, one), op.Constant(value_floats=[0.0, 1.0]), axis=1)
    scores_by_class = op.Mul(one_hot, op.Unsqueeze(scores, one))
    count = op.Shape(scores, start=1, end=2)
    overlap, min_score = op.Constant(value_floats=[max_overlap]), op.Constant(value_floats=[0.0])
    remaining = op.NonMaxSuppression(boxes, scores_by_class, count, overlap, min_score)  # [S, 3]: image, class, box
    indices = op.Gather(remaining, op.Constant(value_ints=[0, 2]), axis=1)
    zeros = op.Expand(zero, op.Shape(scores))
    ones = op.Expand(one, op.Shape(remaining, start=0, end=1))
    return op.Cast(op.ScatterND(zeros, indices, ones), to=9)  # 9 is bool


def _remove_exporter_notes(graph: Any) -> None:
    """Remove the stack traces that the exporter adds to every node, with the paths of this machine."""
    for entry in (graph, *graph.node, *graph.value_info, *graph.input, *graph.output, *graph.initializer):
        entry.ClearField("doc_string")
        entry.ClearField("metadata_props")


@contextmanager
def silence_exporter() -> Iterator[None]:
    """Suppress the exporter's output on stdout, its log messages and its warnings."""
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
