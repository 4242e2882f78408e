"""Explanations of a run: open it, load the images, apply a method, write the result."""

from __future__ import annotations

import io
import re
from contextlib import closing
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from cnnrun.base.atomic_files import Folder, storage_errors, write_file
from cnnrun.base.errors import ConfigError, InterruptionError, escape
from cnnrun.base.progress import say
from cnnrun.explain.figures.contact_sheet import write_png
from cnnrun.explain.figures.tiles import add_caption
from cnnrun.explain.method_base import ExplainMethod
from cnnrun.explain.run import OpenRun, open_run
from cnnrun.explain.subject import Explanation
from cnnrun.training.event_file import EventFile
from cnnrun.training.run_records import EXPLAIN

_GENERATOR = "cnnrun explain"  # written into the PNG files, which marks them as ours


def explain_run(
    method: ExplainMethod, run_path: Path | None, runs: Path, device: torch.device, out: Path | None = None
) -> dict[str, Any]:
    """Explain a run by a method and write the result, by default into the run's folder; returns its data.

    Raises CheckpointError, ConfigError, DataError, StorageError.
    """
    run = open_run(run_path, runs, device)
    if out and method.suffixes:
        if out.suffix not in method.suffixes:
            raise ConfigError(f"--out {out}: give a file that ends in {' or '.join(method.suffixes)}")
        if out.exists():
            raise ConfigError(f"--out {escape(str(out))}: already exists; choose another")
    explanation = method.explain(run)
    if not method.suffixes:
        return write_explanation(run, method.kind, explanation, out)
    name = f"{method.kind}-{_file_name_part(explanation.data['layer'])}{method.suffixes[0]}"
    return _write_arrays(run, method.kind, explanation, out or run.subject.trained.run / EXPLAIN / name)


def _write_arrays(run: OpenRun, name: str, explanation: Explanation, path: Path) -> dict[str, Any]:
    """Write the arrays to `path` and the image beside them."""
    content = _encode_arrays(explanation.arrays, path.suffix)
    data = write_explanation(run, name, explanation, path.with_suffix(".png"))
    write_file(path, content)
    return {"features": str(path), **data}


def write_explanation(run: OpenRun, name: str, explanation: Explanation, out: Path | None = None) -> dict[str, Any]:
    """Write an explanation as PNG and for TensorBoard; returns its data. Raises StorageError, ConfigError."""
    trained = run.subject.trained
    layer = f"-{_file_name_part(explanation.data['layer'])}" if "layer" in explanation.data else ""
    path = out or trained.run / EXPLAIN / f"{name}{layer}.png"
    pixels = add_caption(explanation.image, explanation.caption)
    if path.parent == trained.run / EXPLAIN:
        _open_explain_folder(trained.run).remove_abandoned()
    write_png(path, pixels, _GENERATOR)
    _write_event(trained.run, f"explain/{name}{layer}", pixels, trained.step)
    data = {"run": str(trained.run), "step": trained.step, "path": str(path)}
    return data | {"caption": explanation.caption, "table": explanation.table} | explanation.data


def _open_explain_folder(run: Path) -> Folder:
    """Open the run's folder for explanations, creating it if needed. Raises StorageError, CheckpointError."""
    with storage_errors(run / EXPLAIN, 0):
        return Folder(run).open_child(EXPLAIN, create=True)


def _write_event(run: Path, name: str, pixels: NDArray[np.uint8], step: int) -> None:
    """Write an image for TensorBoard into the run; a failure is only printed."""
    try:
        with closing(EventFile(_open_explain_folder(run))) as board:
            board.add_image(name, pixels, step)
    except InterruptionError:
        raise
    except Exception as error:
        say(f"{run / EXPLAIN}: nothing written for TensorBoard: {escape(str(error))}")


def _file_name_part(path: str) -> str:
    """Convert a layer's path to a part of a file name."""
    return re.sub(r"[^\w]+", "-", path).strip("-")


def _encode_arrays(arrays: dict[str, NDArray[Any]], suffix: str) -> bytes:
    """Encode arrays as .npz or as Parquet with a row for each image. Raises ConfigError without pyarrow."""
    buffer = io.BytesIO()
    if suffix == ".npz":
        np.savez(buffer, **arrays)  # type: ignore[arg-type]
        return buffer.getvalue()
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError("Parquet needs pyarrow: pip install 'cnnrun[parquet]'") from None
    rows = len(arrays["features"])
    columns = {name: values.tolist() + [None] * (rows - len(values)) for name, values in arrays.items()}
    columns["picture"] = [escape(name) for name in columns["picture"]]  # Parquet takes only valid UTF-8
    pq.write_table(pa.table(columns), buffer)
    return buffer.getvalue()
