"""Headless Chromium for tests of HTML pages: their console messages, requests and rendered content."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest

# No sandbox: CI runs as root. No /dev/shm: containers keep it small. No GPU: there is none.
FLAGS = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu", "--no-first-run", "--disable-extensions"]


@dataclass
class Visit:
    """An open page with its console messages and requests."""

    page: Any
    console: list[str] = field(default_factory=list)
    requests: list[str] = field(default_factory=list)


def chromium_path() -> str:
    """Path of Chromium. The test is skipped without it."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if found is None:
        pytest.skip("no Chromium on this machine (Debian: apt-get install chromium)")
    return found


@contextmanager
def open_page(path: Path, width: int = 1280, height: int = 900, scheme: str = "light") -> Iterator[Visit]:
    """Open a file in a window of the given size and wait until its charts are drawn."""
    from playwright.sync_api import sync_playwright

    with sync_playwright() as playwright:
        browser = playwright.chromium.launch(executable_path=chromium_path(), args=FLAGS)
        page = browser.new_page(viewport={"width": width, "height": height}, color_scheme=scheme)
        visit = Visit(page)
        page.on("console", lambda message: visit.console.append(f"{message.type}: {message.text}"))
        page.on("pageerror", lambda error: visit.console.append(f"error: {error}"))
        page.on("request", lambda request: visit.requests.append(request.url))
        page.goto(path.resolve().as_uri())
        page.wait_for_function("document.documentElement.dataset.drawn === 'yes'")
        try:
            yield visit
        finally:
            browser.close()
