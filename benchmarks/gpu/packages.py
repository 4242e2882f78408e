"""Find the wheels that a machine lacks: cnnrun's core dependencies, those of the tests, and what these require."""

from __future__ import annotations

import subprocess
import sys
import tomllib
import zipfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from email.parser import Parser
from importlib.metadata import distributions
from pathlib import Path

from pip._vendor.packaging.requirements import InvalidRequirement, Requirement
from pip._vendor.packaging.utils import canonicalize_name, parse_wheel_filename
from pip._vendor.packaging.version import InvalidVersion, Version

TESTING = ("pytest", "hypothesis")
PLATFORM_OWN = ("torch", "torchvision", "triton")  # built for the machine's driver: never replaced
LEFT_OUT = {"vl-convert-python": "32 MiB; only `cnnrun report`'s page needs it, which no step writes"}


class RefusedError(Exception):
    """One line that says why wheels must not be installed."""


@dataclass(frozen=True)
class Wheel:
    """A wheel file and its requirements."""

    path: Path
    name: str
    version: Version
    requires: tuple[Requirement, ...]


def requirements(pyproject: Path) -> list[Requirement]:
    """Return cnnrun's core dependencies and those of the tests, with their bounds."""
    project = tomllib.loads(pyproject.read_text())["project"]
    testing = map(Requirement, project["optional-dependencies"]["dev"])
    return [
        *map(Requirement, project["dependencies"]),
        *(requirement for requirement in testing if requirement.name in TESTING),
    ]


def is_platform_own(name: str) -> bool:
    """Return whether a package belongs to the machine's own build of PyTorch."""
    return name in PLATFORM_OWN or name.startswith("nvidia-")


def read_wheel(path: Path) -> Wheel:
    """Read a wheel's name, version and requirements. Raises RefusedError if it must not be installed."""
    try:
        name, version, *_ = parse_wheel_filename(path.name)
        with zipfile.ZipFile(path) as archive:
            names = archive.namelist()
            (member,) = (name for name in names if name.endswith(".dist-info/METADATA") and name.count("/") == 1)
            metadata = Parser().parsestr(archive.read(member).decode())
    except (ValueError, zipfile.BadZipFile, OSError) as error:
        raise RefusedError(f"{path}: not a wheel ({error})") from None
    if is_platform_own(name):
        raise RefusedError(f"{path}: the machine has a {name} of its own; remove this wheel")
    return Wheel(path, name, version, tuple(map(Requirement, metadata.get_all("Requires-Dist", []))))


def read_wheels(folder: Path) -> dict[str, Wheel]:
    """Read a folder's wheels by name. Raises RefusedError, also for two versions of one package."""
    if not folder.is_dir():
        raise RefusedError(f"--wheels {folder}: no such folder; scripts/gpu_wheels makes one")
    wheels: dict[str, Wheel] = {}
    for path in sorted(folder.glob("*.whl")):
        wheel = read_wheel(path)
        if wheel.name in wheels:
            raise RefusedError(f"{path}: a second wheel of {wheel.name}; remove one")
        wheels[wheel.name] = wheel
    return wheels


def find_among(wheels: Mapping[str, Wheel]) -> Callable[[Requirement], Wheel | None]:
    """Return a function that finds the wheel of a required package, or None."""
    return lambda requirement: wheels.get(canonicalize_name(requirement.name))


def read_versions(path: Path) -> dict[str, Version | None]:
    """Read a list of packages, `name` or `name==version` a line, by name. Raises RefusedError for another line."""
    versions: dict[str, Version | None] = {}
    for number, line in enumerate(path.read_text().splitlines(), 1):
        name, _, version = line.partition("#")[0].strip().partition("==")
        try:
            if name:
                versions[canonicalize_name(Requirement(name).name)] = Version(version) if version else None
        except (InvalidRequirement, InvalidVersion):
            raise RefusedError(f"{path}:{number}: {line!r} is neither `name` nor `name==version`") from None
    return versions


def installed_versions() -> dict[str, Version | None]:
    """Return the installed packages by name; None for a version that cannot be read."""
    versions: dict[str, Version | None] = {}
    for distribution in distributions():
        if name := distribution.metadata["Name"]:
            try:
                versions.setdefault(canonicalize_name(name), Version(distribution.version))
            except (InvalidVersion, TypeError):
                versions.setdefault(canonicalize_name(name), None)
    return versions


def needed_wheels(
    required: Iterable[Requirement],
    present: Mapping[str, Version | None],
    find: Callable[[Requirement], Wheel | None],
    target: Mapping[str, str] | None = None,
) -> tuple[list[Wheel], list[str]]:
    """Return the wheels to add to the packages that are `present`, and the requirements that remain unmet.

    A present package in a fitting version is left alone, with everything that it requires. `target` has the markers of
    another machine; the default is this machine.
    """
    chosen: dict[str, Wheel] = {}
    missing: list[str] = []
    queue = list(required)
    while queue:
        requirement = queue.pop(0)
        if requirement.marker and not requirement.marker.evaluate({"extra": "", **(target or {})}):
            continue
        name = canonicalize_name(requirement.name)
        if name not in chosen and name in present and fits(requirement, present[name]):
            continue
        wheel = chosen.get(name) or find(requirement)
        if wheel is None or not fits(requirement, wheel.version):
            missing.append(str(requirement).partition(";")[0].strip())
        elif name not in chosen:
            chosen[name] = wheel
            queue += wheel.requires
    return list(chosen.values()), list(dict.fromkeys(missing))


def fits(requirement: Requirement, version: Version | None) -> bool:
    """Return whether a version meets a requirement; an unreadable version counts as fitting."""
    return version is None or requirement.specifier.contains(version, prereleases=True)


def install(wheels: Iterable[Wheel], folder: Path, seconds: float) -> str | None:
    """Install only these wheels into a folder; returns pip's message if it failed, else None."""
    paths = [str(wheel.path) for wheel in wheels]
    offline = ["--no-index", "--no-deps", "--no-compile", "--no-cache-dir", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "install", "--quiet", *offline, "--target", str(folder), *paths]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=seconds)
    except subprocess.TimeoutExpired:
        return f"pip was not done after {seconds:.0f} s"
    return (done.stderr.strip() or f"pip left with {done.returncode}") if done.returncode else None
