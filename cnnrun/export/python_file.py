"""Code: the network as a Python file that needs torch alone, and its weights beside it."""

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
from cnnrun.export.python_source import Call, SourceCollector, constructor_call, extract_layers, extract_repeats
from cnnrun.model.trained_network import ExportedNetwork

_HEAD = '''"""A network trained and written by cnnrun {cnnrun}. It needs torch alone.

    from {stem} import load
    network = load()
    results = network(pixels)  # {input}; network.classes has the names

Pictures of another size are first brought to it: {resize}.
"""

from __future__ import annotations
'''

_CHAIN = '''
def chain(**layers: nn.Module) -> nn.Sequential:
    """Layers one after the other, by name."""
    return nn.Sequential(OrderedDict(layers))
'''

_TAIL = '''
class Deployed(nn.Module):
    """Pixels, uint8 [B, H, W, C] -> {results}."""

    def __init__(self) -> None:
        super().__init__()
        self.network, self.decoder, self.classes = network(), decoder(), list[str]()

    def forward(self, pixels: Tensor) -> dict[str, Tensor]:
        results: dict[str, Tensor] = self.decoder(self.network(pixels.permute(0, 3, 1, 2).float()))
        return results


def load(weights: Path | None = None) -> Deployed:
    """The network with its weights (by default those of the file beside this one), ready to use."""
    made = Deployed()
    tensors, metadata = read_safetensors(weights or Path(__file__).with_suffix(".safetensors"))
    made.network.load_state_dict(tensors)
    made.classes = json.loads(metadata["classes"])
    return made.to(memory_format=torch.channels_last).eval()


def read_safetensors(path: Path) -> tuple[dict[str, Tensor], dict[str, str]]:
    """Tensors and metadata of a file: eight bytes that give the length of a table in JSON, the table, the numbers."""
    data = path.read_bytes()
    start = 8 + int.from_bytes(data[:8], "little")
    table = json.loads(data[8:start])
    metadata = table.pop("__metadata__", {{}})
    dtypes = {{"F32": torch.float32, "I64": torch.int64}}
    tensors = {{}}
    for name, entry in table.items():
        first, last = entry["data_offsets"]
        numbers = torch.frombuffer(bytearray(data[start + first : start + last]), dtype=dtypes[entry["dtype"]])
        tensors[name] = numbers.reshape(entry["shape"])
    return tensors, metadata
'''


class Code(Kind):
    """A Python file and a safetensors file that need torch alone."""

    kind = "code"
    suffix: ClassVar[str] = ".py"
    record: ClassVar[str] = "parity-code.json"

    def write(
        self, module: ExportedNetwork, example: Tensor, names: list[str], metadata: dict[str, Any], path: Path
    ) -> None:
        """Write the code to `path` and the weights beside it."""
        path.write_text(generate_code(module, names, metadata, path.stem))
        tensors = {name: value.cpu().contiguous() for name, value in module.network.state_dict().items()}
        noted = {key: value if isinstance(value, str) else json.dumps(value) for key, value in metadata.items()}
        path.with_suffix(".safetensors").write_bytes(safetensors.torch.save(tensors, noted))

    def reload(self, path: Path) -> Callable[[NDArray[np.uint8]], list[NDArray[Any]]]:
        """The written file as a function of pixels. Raises CheckpointError where it does not run."""
        try:
            spec = importlib.util.spec_from_file_location("exported_network", path)
            assert spec is not None
            assert spec.loader is not None
            module = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(module)
            network = module.load()
        except Exception as error:  # whatever is wrong with generated code, the file is not kept
            raise CheckpointError(f"{path}: does not run: {type(error).__name__}: {error}") from None

        def run(pixels: NDArray[np.uint8]) -> list[NDArray[Any]]:
            with torch.inference_mode():
                return [value.numpy() for value in network(torch.from_numpy(np.ascontiguousarray(pixels))).values()]

        return run


def generate_code(module: ExportedNetwork, names: list[str], metadata: dict[str, Any], stem: str) -> str:
    """The text of the file."""
    sources = SourceCollector(
        {"json": {""}, "pathlib": {"Path"}, "torch": {"", "nn", "Tensor"}, "collections": {"OrderedDict"}}
    )
    for part in [*module.network.modules(), *module.decoder.modules()]:
        if type(part).__module__.startswith("cnnrun."):
            sources.add(type(part))
    whole, functions = extract_repeats(constructor_call(module.network))
    whole, layers = extract_layers(whole)
    pieces = [
        _HEAD.format(stem=re.sub(r"\W", "_", stem), **metadata) + "\n" + "\n".join(sources.import_lines()) + "\n",
        *(f"\n{text}\n" for text in sources.definitions.values()),
        _CHAIN,
        *(_function(name, call) for name, call in (functions | layers).items()),
        _function("network", whole),
        _function("decoder", constructor_call(module.decoder)),
        _TAIL.format(results=", ".join(names)),
    ]
    return "\n".join(pieces)


def _function(name: str, call: Call) -> str:
    return f"\ndef {name}() -> nn.Module:\n    return {call.text(4, len('return '))}\n"
