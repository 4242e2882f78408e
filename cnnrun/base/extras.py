"""Optional packages: a command checks for them before it starts, and says in one line how to install them."""

from __future__ import annotations

from importlib.util import find_spec

from cnnrun.base.errors import ConfigError, UserError


def missing_package(package: str, extra: str, feature: str) -> str | None:
    """Line that says what needs the package and how to install it; None if it is installed."""
    if find_spec(package):
        return None
    return f"{feature} needs {package}: pip install 'cnnrun[{extra}]'"


def require_package(package: str, extra: str, feature: str, error: type[UserError] = ConfigError) -> None:
    """Raise `error` if a package is not installed; `feature` is what needs it, such as a command."""
    if problem := missing_package(package, extra, feature):
        raise error(problem)
