"""Results of image files, batch by batch: the next batch is decoded while the network computes."""

from __future__ import annotations

import itertools
from collections.abc import Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import torch
from numpy.typing import NDArray
from torch import Tensor

from cnnrun.base.counts import format_count
from cnnrun.base.errors import ConfigError, DataError, UserError
from cnnrun.base.machine_load import processor_count
from cnnrun.base.progress import say
from cnnrun.contracts.results import Results, View
from cnnrun.data.image_files import load_with_view, to_network_batch
from cnnrun.model.batch_norm_folding import fold_batch_norms
from cnnrun.model.trained_network import TrainedNetwork
from cnnrun.training.dtypes import Precision, autocast, has_bfloat16

Item = TypeVar("Item")
LoadedImage = tuple[NDArray[Any], View] | DataError
Chunk = Sequence[tuple[Path, DataError | None]]  # paths, each with the reason that it cannot be read


class InferenceNetwork:
    """A trained network that only predicts: batch norms are folded, and with `fast` it computes in bfloat16.

    Raises ConfigError if `fast` is wanted of a device that does not compute in bfloat16.
    """

    def __init__(self, trained: TrainedNetwork, fast: bool = False) -> None:
        if fast and not has_bfloat16(trained.device):
            raise ConfigError(f"--fast needs a device that computes in bfloat16; {trained.device.type} does not")
        self._trained = trained
        self._precision: Precision = "bfloat16" if fast else "float32"
        self._network = fold_batch_norms(trained.network).to(memory_format=torch.channels_last)
        self._should_print_difference = fast

    def outputs(self, images_BCHW: Tensor) -> Tensor:
        """Pixel values 0..255 -> raw outputs in float32, without gradients."""
        return self._outputs(images_BCHW, self._precision)

    def results(self, images_BCHW: Tensor) -> Results:
        """Pixel values 0..255 -> results, without gradients. In bfloat16, the first call prints what that changes."""
        results = self._decode(self.outputs(images_BCHW))
        if self._should_print_difference:
            self._should_print_difference = False
            exact = self._decode(self._outputs(images_BCHW, "float32"))
            say(self._describe_difference(exact, results, images_BCHW))
        return results

    def _outputs(self, images_BCHW: Tensor, precision: Precision) -> Tensor:
        with torch.inference_mode(), autocast(self._trained.device, precision):
            outputs: Tensor = self._network(images_BCHW)
        return outputs.float()

    def _decode(self, outputs: Tensor) -> Results:
        with torch.inference_mode():
            results: Results = self._trained.decoder(outputs)
            return results

    def _describe_difference(self, exact: Results, fast: Results, images_BCHW: Tensor) -> str:
        trained, images = self._trained, format_count(len(images_BCHW), "image")
        gap = trained.task.predicting.largest_difference(exact, fast)
        line = f"--fast: on the first {images}, results in bfloat16 differ by up to {gap:.2g} from those in float32"
        views = [View((images_BCHW.shape[2], images_BCHW.shape[3]))] * len(images_BCHW)
        pairs = zip(trained.predictions(exact, views), trained.predictions(fast, views), strict=True)
        changed = [first.answer() != second.answer() for first, second in pairs if first.answer() is not None]
        return f"{line}, and {sum(changed):,} of {len(changed):,} answers change" if changed else line


def compute_results(
    trained: TrainedNetwork, paths: Iterable[Path], batch: int, fast: bool = False
) -> Iterator[tuple[Chunk, Results, list[View]]]:
    """Compute the results of image files, `batch` at a time: the files, and results and views of the readable ones.

    At most two batches of images are in memory.
    """
    channels, height, width = trained.facts.image_shape
    network = InferenceNetwork(trained, fast)

    def load_image(path: Path) -> LoadedImage:
        try:
            return load_with_view(path, (height, width), channels, trained.image)
        except DataError as error:
            return error

    def load_chunks(pool: ThreadPoolExecutor) -> Iterator[tuple[list[Path], list[Future[LoadedImage]]]]:
        source = iter(paths)
        while chunk := list(itertools.islice(source, batch)):
            yield chunk, [pool.submit(load_image, path) for path in chunk]

    with ThreadPoolExecutor(processor_count()) as pool:
        for chunk, tasks in _one_ahead(load_chunks(pool)):
            loaded = [task.result() for task in tasks]
            images = [image for image in loaded if not isinstance(image, DataError)]
            errors = [image if isinstance(image, DataError) else None for image in loaded]
            results: Results = {}
            if images:
                batch_pixels = [pixels for pixels, _ in images]
                results = network.results(to_network_batch(batch_pixels, trained.image, trained.device))
            yield list(zip(chunk, errors, strict=True)), results, [view for _, view in images]


def _one_ahead(items: Iterable[Item]) -> Iterator[Item]:
    """Yield each item after the next one has started. If starting one fails, the earlier ones are yielded first."""
    ahead: list[Item] = []
    try:
        for item in items:
            ahead.append(item)
            if len(ahead) > 1:
                yield ahead.pop(0)
    except UserError:
        yield from ahead
        raise
    yield from ahead
