"""`scripts/gpu_wheels` collects the packages that a GPU machine lacks, and only those are installed there."""

from __future__ import annotations

import importlib.machinery
import importlib.util
import subprocess
import sys
import time
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
HERE = ROOT / "benchmarks" / "gpu"
sys.path.insert(0, str(HERE))

import check  # noqa: E402
import packages  # noqa: E402
from packages import RefusedError, Requirement, Version  # noqa: E402
from records import Record  # noqa: E402

sys.path.remove(str(HERE))


def wheel(folder: Path, name: str, version: str = "1.0", requires: tuple[str, ...] = ()) -> Path:
    """Write a wheel of one empty module."""
    folder.mkdir(exist_ok=True)
    path = folder / f"{name}-{version}-py3-none-any.whl"
    about = f"{name}-{version}.dist-info"
    metadata = "".join(f"Requires-Dist: {each}\n" for each in requires)
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr(f"{name}/__init__.py", "")
        archive.writestr(f"{about}/METADATA", f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n{metadata}")
        archive.writestr(f"{about}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        archive.writestr(f"{about}/RECORD", "")
    return path


WANTED = list(
    map(Requirement, ["absent>=1", "old>=2", "there>=1", "unread>=5", "nowhere>=1", "other; sys_platform == 'x'"])
)
PRESENT = {"old": Version("1.9"), "there": Version("1.0"), "unread": None}


def names_and_missing(folder: Path) -> tuple[list[str], list[str]]:
    found = packages.read_wheels(folder)
    chosen, missing = packages.needed_wheels(WANTED, PRESENT, packages.find_among(found))
    return [each.path.name for each in chosen], missing


def test_only_missing_or_too_old_packages_are_installed(tmp_path):
    wheel(tmp_path, "absent", "1.5", requires=("needs_this", "there>=0.5", "not_this; extra == 'more'"))
    wheel(tmp_path, "old", "2.0")
    wheel(tmp_path, "there", "3.0")
    wheel(tmp_path, "unread", "6.0")
    wheel(tmp_path, "needs_this", "0.1")
    names, missing = names_and_missing(tmp_path)
    assert names == ["absent-1.5-py3-none-any.whl", "old-2.0-py3-none-any.whl", "needs_this-0.1-py3-none-any.whl"]
    assert missing == ["nowhere>=1"]


def test_a_wheel_that_is_too_old_is_not_installed(tmp_path):
    wheel(tmp_path, "old", "1.95")
    assert names_and_missing(tmp_path) == ([], ["absent>=1", "old>=2", "nowhere>=1"])


@pytest.mark.parametrize("name", ["torch", "torchvision", "triton", "nvidia_cublas"])
def test_wheels_of_packages_that_the_machine_provides_are_refused(tmp_path, name):
    path = wheel(tmp_path, name)
    with pytest.raises(RefusedError) as refused:
        packages.read_wheels(tmp_path)
    assert str(refused.value) == f"{path}: the machine has a {name.replace('_', '-')} of its own; remove this wheel"


def test_missing_duplicate_and_damaged_wheels_are_refused(tmp_path):
    with pytest.raises(RefusedError, match="no such folder"):
        packages.read_wheels(tmp_path / "none")
    wheel(tmp_path, "twice", "1.0")
    second = wheel(tmp_path, "twice", "1.1")
    with pytest.raises(RefusedError, match="a second wheel of twice"):
        packages.read_wheels(tmp_path)
    second.write_bytes(b"no archive")
    with pytest.raises(RefusedError, match="not a wheel"):
        packages.read_wheels(tmp_path)


def test_installing_writes_only_into_its_folder(tmp_path, monkeypatch):
    path = wheel(tmp_path / "wheels", "tiny_and_fake")
    site = tmp_path / "site"
    monkeypatch.setattr(check, "requirements", lambda path: [Requirement("tiny-and-fake"), Requirement("not-anywhere")])
    with Record(tmp_path / "out", "a check") as record:
        check.prepare(path.parent, site, record, time.monotonic() + 60)
    assert (site / "tiny_and_fake" / "__init__.py").exists()
    assert record.notes[1:] == ["installed from wheels: tiny-and-fake 1.0", "missing: not-anywhere"]
    asked = [sys.executable, "-c", "import tiny_and_fake, cnnrun; print(tiny_and_fake.__file__, cnnrun.__file__)"]
    environment = check.step_environment(tmp_path, rehearse=False)
    told = subprocess.run(asked, env=environment, capture_output=True, text=True, check=True, cwd=tmp_path).stdout
    assert told.split() == [str(site / "tiny_and_fake" / "__init__.py"), str(ROOT / "cnnrun" / "__init__.py")]
    assert importlib.util.find_spec("tiny_and_fake") is None


def test_a_failed_installation_is_reported(tmp_path):
    found = packages.read_wheel(wheel(tmp_path, "gone"))
    found.path.unlink()
    problem = packages.install([found], tmp_path / "site", 60)
    assert problem
    assert "gone-1.0" in problem


def test_an_invalid_line_of_a_package_list_is_refused(tmp_path):
    path = tmp_path / "machine.txt"
    path.write_text("# a machine\nPy_YAML\n\ntorch==2.11.0+cu130  # with CUDA\n")
    assert packages.read_versions(path) == {"py-yaml": None, "torch": Version("2.11.0+cu130")}
    path.write_text("fine\nnot fine\n")
    with pytest.raises(RefusedError, match=":2: 'not fine' is neither"):
        packages.read_versions(path)


def test_the_shipped_package_lists_are_valid():
    assert {"torch", "pip", "pytest"} <= packages.read_versions(HERE / "machine.txt").keys()
    named = {each.name for each in packages.requirements(ROOT / "pyproject.toml")}
    assert {"pydantic", "torch", "pytest", "hypothesis"} <= named
    assert "ruff" not in named
    assert all((HERE / f"{name}.py").is_file() for name in check.SHARES)


@pytest.fixture(scope="module")
def gpu_wheels():
    loader = importlib.machinery.SourceFileLoader("gpu_wheels", str(ROOT / "scripts" / "gpu_wheels"))
    module = importlib.util.module_from_spec(importlib.util.spec_from_loader("gpu_wheels", loader))
    before = sys.path[:]
    loader.exec_module(module)
    sys.path[:] = before
    return module


def test_wheels_beyond_the_size_limit_are_refused(gpu_wheels):
    million = 10**6
    assert gpu_wheels.too_large({"a.whl": 39 * million, "checkout": 20 * million}) is None
    assert "the largest is b.whl" in gpu_wheels.too_large({"a.whl": 20 * million, "b.whl": 21 * million})
    assert "the wheels are 39.1 MiB" in gpu_wheels.too_large({"a.whl": 41 * million})
    assert "all together is 66.8 MiB" in gpu_wheels.too_large({"a.whl": 39 * million, "checkout": 31 * million})


def test_collected_wheels_are_the_missing_ones_and_pure_python_spares(gpu_wheels, tmp_path, monkeypatch):
    asked = []
    deep = {"pydantic": ("typing-inspection", "pydantic-core==2")}

    def fetch(name, version, out, platforms):
        asked.append((name, str(version), platforms == ["any"]))
        path = wheel(tmp_path, name.replace("-", "_"), str(version), deep.get(name, ()))
        return packages.read_wheel(path)

    listed = ["pydantic>=2", "torch>=2", "scipy>=1", "numpy>=1", "rich", "pytest>=8", "vl-convert-python>=1"]
    pins = "torch==2.14\npydantic==2.5\npydantic_core==2\ntyping-inspection==1\npytest==9\nscipy==1.5\n"
    (tmp_path / "constraints.txt").write_text(pins)
    monkeypatch.setattr(gpu_wheels, "ROOT", tmp_path)
    monkeypatch.setattr(gpu_wheels, "requirements", lambda path: list(map(Requirement, listed)))
    monkeypatch.setattr(gpu_wheels, "fetch", fetch)
    present = {"torch": None, "scipy": Version("1.9"), "numpy": None, "rich": None, "pytest": None}
    gpu_wheels.collect(tmp_path / "out", present)
    expected = [("pydantic", "2.5", False), ("pytest", "9", True)]
    assert asked == [*expected, ("typing-inspection", "1", False), ("pydantic-core", "2", False)]
    monkeypatch.setattr(gpu_wheels, "fetch", lambda *_: None)
    too_old = {**present, "pydantic": Version("2.5"), "scipy": Version("0.1")}
    with pytest.raises(RefusedError, match="scipy>=1: not on the machine"):
        gpu_wheels.collect(tmp_path / "out", too_old)
