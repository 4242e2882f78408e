"""Export to Python: a file with the network's code, which needs only torch, and a file with its weights."""

from __future__ import annotations

import importlib.util
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any, ClassVar

import numpy as np
import safetensors.torch
import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.errors import CheckpointError
from cnnrun.config.spec import Kind
from cnnrun.contracts.pixels import PixelFormat
from cnnrun.export.python_source import Expression, SourceCollector, constructor_call, extract_layers, extract_repeats
from cnnrun.model.trained_network import ExportedNetwork

_HEAD = '''"""A network that was trained and exported by cnnrun {cnnrun}. It needs only torch.

    from {stem} import load
    network = load()
    results = network(pixels)  # {input}; network.classes has the names

Resize images of another size first: {resize}.
"""

from __future__ import annotations
'''

_VALUES = "pixels.permute(0, 3, 1, 2).float()"

_CHAIN = '''
def chain(**layers: nn.Module) -> nn.Sequential:
    """Build named layers that run one after the other."""
    return nn.Sequential(OrderedDict(layers))
'''

_TAIL = '''
class Deployed(nn.Module):
    """Network from pixels, {dtype} [B, H, W, C], to {results}."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.decoder, self.classes = network(), decoder(), list[str]()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = self.decoder(self.network({values}))
        return results


def load(weights: Path | None = None) -> Deployed:
    """Load the network with its weights, by default from the file beside this one, in evaluation mode."""
    deployed = Deployed()
    tensors, metadata = read_safetensors(weights or Path(__file__).with_suffix(".safetensors"))
    deployed.network.load_state_dict(tensors)
    deployed.classes = json.loads(metadata["classes"])
    return deployed.to(memory_format=torch.channels_last).eval()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Read the tensors and metadata of a safetensors file: length of a JSON header (8 bytes), the header, the data."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    header = json.loads(data[8:start])
    metadata = header.pop("__metadata__", {{}})
    dtypes = {{"F32": torch.float32, "I64": torch.int64}}
    tensors = {{}}
    for name, entry in header.items():
        first, last = entry["data_offsets"]
        values = torch.frombuffer(bytearray(data[start + first : start + last]), dtype=dtypes[entry["dtype"]])
        tensors[name] = values.reshape(entry["shape"])
    return tensors, metadata
'''


class Code(Kind):
    """A Python file and a safetensors file that need only torch."""

    kind = "code"
    suffix: ClassVar[str] = ".py"
    record: ClassVar[str] = "parity-code.json"

    def write(
        self, module: ExportedNetwork, example: Tensor, names: list[str], metadata: dict[str, Any], path: Path
    ) -> None:
        """Write the code to `path`, and the weights to the same path with suffix .safetensors."""
        path.write_text(generate_code(module, names, metadata, path.stem))
        tensors = {name: value.cpu().contiguous() for name, value in module.network.state_dict().items()}
        texts = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        path.with_suffix(".safetensors").write_bytes(safetensors.torch.save(tensors, texts))

    def reload(self, path: Path) -> Callable[[NDArray[Any]], list[NDArray[Any]]]:
        """Load a written file as a function of pixels. Raises CheckpointError if it does not run."""
        try:
            spec = importlib.util.spec_from_file_location("exported_network", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            network = module.load()
        except Exception as error:  # generated code may fail in any way, and then the file must not be kept
            raise CheckpointError(f"{path}: does not run ({type(error).__name__}: {error})") from None

        def run(pixels: NDArray[Any]) -> list[NDArray[Any]]:
            with torch.inference_mode():
                return [value.numpy() for value in network(torch.from_numpy(np.ascontiguousarray(pixels))).values()]

        return run


def generate_code(module: ExportedNetwork, names: list[str], metadata: dict[str, Any], stem: str) -> str:
    """Generate the text of the Python file; `names` are the results, `stem` is the file's name without suffix."""
    sources = SourceCollector(
        {"json": {""}, "pathlib": {"Path"}, "torch": {"", "nn", "Tensor"}, "collections": {"OrderedDict"}}
    )
    for submodule in [*module.network.modules(), *module.decoder.modules()]:
        if type(submodule).__module__.startswith("cnnrun."):
            sources.add(type(submodule))
    pixel_format = module.pixel_format
    network, repeats = extract_repeats(constructor_call(module.network))
    network, layers = extract_layers(network)
    pieces = [
        _HEAD.format(stem=re.sub(r"\W", "_", stem), **metadata) + "\n" + "\n".join(sources.import_lines()) + "\n",
        *(f"\n{text}\n" for text in sources.definitions.values()),
        _CHAIN,
        *(_function_text(name, call) for name, call in (repeats | layers).items()),
        _function_text("network", network),
        _function_text("decoder", constructor_call(module.decoder)),
        _TAIL.format(
            results=", ".join(names),
            dtype=pixel_format.file_dtype,
            values=_values_text(pixel_format),
        ),
    ]
    return "\n".join(pieces)


def _values_text(pixel_format: PixelFormat) -> str:
    """The expression that makes values 0..255 of pixels, as `PixelFormat.from_file` does."""
    if not pixel_format.is_deep:
        return _VALUES
    black, white, span = pixel_format.black, pixel_format.white, pixel_format.span
    return f"({_VALUES}.clamp({black}, {white}) - {black}) * 255 / {span}"


def _function_text(name: str, call: Expression) -> str:
    return f"\ndef {name}() -> nn.Module:\n    return {call.text(4, len('return '))}\n"
