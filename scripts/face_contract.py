"""A contract for import-linter: a package imports from another package only what that package's `__all__` names."""

from __future__ import annotations

import ast
from pathlib import Path

from grimp import ImportGraph
from importlinter import Contract, ContractCheck, output


class FaceContract(Contract):
    """Only the package itself imports modules that its `__all__` does not name."""

    type_name = "face"

    def check(self, graph: ImportGraph, verbose: bool) -> ContractCheck:
        """Find the imports that reach past a face."""
        violations = [
            f"{importer} imports {imported}, which {package}.__all__ does not name"
            for importer in sorted(graph.modules)
            for imported in sorted(graph.find_modules_directly_imported_by(importer))
            for package, module in _crossed_faces(importer, imported)
            if module not in _read_face(package)
        ]
        return ContractCheck(kept=not violations, metadata={"violations": violations})

    def render_broken_contract(self, check: ContractCheck) -> None:
        """Print each import that reaches past a face."""
        for line in check.metadata["violations"]:
            output.print_error(line)


def _crossed_faces(importer: str, imported: str) -> list[tuple[str, str]]:
    """Packages around `imported` that do not contain `importer`, each with its module on the way to `imported`."""
    parts = imported.split(".")
    steps = [(".".join(parts[:end]), parts[end]) for end in range(2, len(parts))]
    return [(package, module) for package, module in steps if not f"{importer}.".startswith(f"{package}.")]


def _read_face(package: str) -> list[str]:
    """The names in a package's `__all__`, read without importing the package."""
    for node in ast.parse(Path(*package.split("."), "__init__.py").read_text()).body:
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__":
            names: list[str] = ast.literal_eval(node.value)
            return names
    return []
