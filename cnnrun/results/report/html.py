"""HTML pages in one file: rendered by Jinja2, with embedded images, charts and the Vega script that draws them."""

from __future__ import annotations

import base64
import contextlib
import hashlib
import io
import json
from collections.abc import Mapping
from importlib import resources
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from cnnrun import __version__
from cnnrun.base.atomic_files import write_file
from cnnrun.base.errors import StorageError
from cnnrun.base.ownership import ownership_problem
from cnnrun.base.progress import say
from cnnrun.data.cache import user_cache_folder

GENERATOR = "cnnrun report"  # written into each page, which marks it as ours
_MAX_PNG_LENGTH = 60_000  # characters of an encoded image: JPEG is tried for longer ones
_MAX_WIDTH = 1800  # pixels


def render_page(page: Mapping[str, Any], specs: Mapping[str, Any]) -> bytes:
    """Render the page as HTML; `specs` are Vega-Lite specifications by the id of the element to draw them in."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = resources.files("cnnrun.results.report") / "page"
    texts = {file.name: file.read_text() for file in folder.iterdir() if file.is_file()}
    environment = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    # Neither text may end the script element early: JSON may write `<` as an escape.
    escaped_specs = json.dumps(specs, allow_nan=False).replace("<", "\\u003c")
    vega = _vega_script().replace("</script", "<\\/script")
    template = environment.get_template("report.html")
    text = template.render(**page, specs=escaped_specs, vega=vega, by=GENERATOR, version=__version__)
    return text.encode(errors="backslashreplace")  # file names that are not UTF-8


def image_data_url(pixels: NDArray[np.uint8], max_width: int = _MAX_WIDTH) -> str:
    """Encode an image [H, W, 3] as a data URL: PNG, or JPEG if the PNG is large and JPEG is smaller.

    An image wider than `max_width` pixels is scaled down.
    """
    from PIL import Image as Pil

    pillow_image = Pil.fromarray(pixels)
    pillow_image.thumbnail((max_width, 10 * max_width))

    def encode_as(format: str) -> str:
        buffer = io.BytesIO()
        pillow_image.save(buffer, format, compress_level=4, quality=85)  # a higher level takes seconds
        return f"data:image/{format.lower()};base64,{base64.b64encode(buffer.getvalue()).decode()}"

    png_url = encode_as("PNG")
    return png_url if len(png_url) < _MAX_PNG_LENGTH else min(png_url, encode_as("JPEG"), key=len)


def _vega_script() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script. Building it takes a second, so it is stored in the user's cache."""
    import vl_convert

    folder = user_cache_folder()
    path = folder / f"vega-{version('vl-convert-python')}.js" if folder else None
    problem = ownership_problem(path) if path else None
    if problem:
        say(f"{problem}: the script of the charts is not read from there but built again")
    elif path and (cached := _read_cached_script(path)):
        return cached
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if path and not problem:
        with contextlib.suppress(StorageError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_file(path, f"{_hash_line(script)}\n{script}".encode())
    return script


def _read_cached_script(path: Path) -> str | None:
    """Read the script that an earlier report stored at `path`; None if there is none or its hash does not fit."""
    try:
        line, _, script = path.read_bytes().decode(errors="replace").partition("\n")
    except OSError:
        return None
    if line == _hash_line(script):
        return script
    say(f"{path}: damaged, or written by another version; building it again")
    return None


def _hash_line(script: str) -> str:
    return f"// sha256 {hashlib.sha256(script.encode()).hexdigest()}"
