"""The import contracts name every kind of a family, so that a new kind that uses another is found."""

from __future__ import annotations

import tomllib
from pathlib import Path

import pytest

from cnnrun.config.spec import union_members
from cnnrun.data.sources import Source
from cnnrun.export import Format
from cnnrun.tasks import TaskUnion

ROOT = Path(__file__).parents[2]
CONTRACTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"]
INDEPENDENT = {contract["name"]: contract["modules"] for contract in CONTRACTS if contract["type"] == "independence"}


def _is_listed(module: str, contract: str) -> bool:
    """Whether a module, or a package that it is in, is in a contract."""
    return any(module == listed or module.startswith(f"{listed}.") for listed in INDEPENDENT[contract])


@pytest.mark.parametrize(
    ("union", "contract"),
    [
        (Source, "sources do not know each other"),
        (TaskUnion, "tasks do not know each other"),
        (Format, "export formats do not know each other"),
    ],
    ids=["sources", "tasks", "formats"],
)
def test_every_kind_is_in_the_contract_of_its_family(union, contract):
    missing = [kind.__module__ for kind in union_members(union) if not _is_listed(kind.__module__, contract)]
    assert not missing, f"add to the contract {contract!r} in pyproject.toml"


def test_every_explain_method_is_in_the_contract():
    folder = ROOT / "cnnrun" / "explain" / "methods"
    helpers = {"patches", "worst_images"}  # used by several methods
    modules = {path.stem for path in folder.glob("*.py")} - {"__init__"} - helpers
    contract = "explain methods do not know each other"
    missing = [name for name in sorted(modules) if not _is_listed(f"cnnrun.explain.methods.{name}", contract)]
    assert not missing, f"add to the contract {contract!r} in pyproject.toml"
