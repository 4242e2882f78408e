"""Packages that a plain install does not bring: looked for before work begins, missed in one line."""

from __future__ import annotations

from importlib.util import find_spec

from cnnrun.base.errors import ConfigError, UserError


def missing_package(package: str, extra: str, need: str) -> str | None:
    """Line that says what needs the package and which command brings it; None where it is installed."""
    if find_spec(package):
        return None
    return f"{need} needs {package}: pip install 'cnnrun[{extra}]'"


def require_package(package: str, extra: str, need: str, error: type[UserError] = ConfigError) -> None:
    """Raise `error` where a package is not installed; `need` is what needs it, such as a command."""
    if problem := missing_package(package, extra, need):
        raise error(problem)
