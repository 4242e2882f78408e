"""A page in one file: its words and pictures by Jinja2, its charts by Vega, which is inside."""

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

GENERATOR = "cnnrun report"  # what pages say of themselves
_LARGE = 60_000  # letters of a picture
_WIDEST = 1800  # pixels


def render_page(page: Mapping[str, Any], specs: Mapping[str, Any]) -> bytes:
    """The page as HTML; `specs` are Vega-Lite's, by the id of the element that they are drawn into."""
    from jinja2 import DictLoader, Environment, StrictUndefined

    folder = resources.files("cnnrun.results.report") / "page"
    texts = {each.name: each.read_text() for each in folder.iterdir() if each.is_file()}
    made = Environment(loader=DictLoader(texts), autoescape=True, undefined=StrictUndefined, trim_blocks=True)
    # Neither may hold what ends a script: in JSON `<` is written by its number.
    inside = json.dumps(specs, allow_nan=False).replace("<", "\\u003c")
    vega = _vega().replace("</script", "<\\/script")
    text = made.get_template("report.html").render(**page, specs=inside, vega=vega, by=GENERATOR, version=__version__)
    return text.encode(errors="backslashreplace")  # names of files that are no text


def image_data_url(pixels: NDArray[np.uint8], widest: int = _WIDEST) -> str:
    """A picture [H, W, 3] as the address of an <img>: PNG, or where that is large and JPEG smaller, JPEG.

    One that is wider than that is made smaller.
    """
    from PIL import Image as Pil

    picture = Pil.fromarray(pixels)
    picture.thumbnail((widest, 10 * widest))

    def saved(kind: str) -> str:
        made = io.BytesIO()
        picture.save(made, kind, compress_level=4, quality=85)  # a higher level takes seconds
        return f"data:image/{kind.lower()};base64,{base64.b64encode(made.getvalue()).decode()}"

    exact = saved("PNG")
    return exact if len(exact) < _LARGE else min(exact, saved("JPEG"), key=len)


def _vega() -> str:
    """Vega, Vega-Lite and Vega-Embed as one script. It takes a second to put together and is kept beside the cache."""
    import vl_convert

    folder = user_cache_folder()
    path = folder / f"vega-{version('vl-convert-python')}.js" if folder else None
    why = ownership_problem(path) if path else None
    if why:
        say(f"{why}: the charts' script is not read from there but put together anew")
    elif path and (kept := _kept(path)):
        return kept
    script: str = vl_convert.javascript_bundle("window.vegaEmbed = vegaEmbed;")
    if path and not why:
        with contextlib.suppress(StorageError, OSError):
            path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            write_file(path, f"{_hash_line(script)}\n{script}".encode())
    return script


def _kept(path: Path) -> str | None:
    """The script that an earlier page left at `path`; None where there is none, or not as it was written."""
    try:
        line, _, script = path.read_bytes().decode(errors="replace").partition("\n")
    except OSError:
        return None
    if line == _hash_line(script):
        return script
    say(f"{path}: not as this version writes it; put together anew")
    return None


def _hash_line(script: str) -> str:
    return f"// sha256 {hashlib.sha256(script.encode()).hexdigest()}"
