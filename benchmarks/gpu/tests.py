"""Run the tests marked `cuda`, with one result per test. Warnings are not errors: the versions are not ours.

python benchmarks/gpu/tests.py [pytest's arguments]
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

import pytest

HERE = Path(__file__).resolve().parent
# The most valuable first, in case time runs out.
FILES = [f"tests/cuda/test_cuda_{name}.py" for name in ("training", "copies", "memory", "commands", "faces", "ranks")]


def main() -> None:
    """Run pytest in this process, with the plugin beside this file."""
    os.chdir(HERE.parents[1])
    sys.path.insert(0, str(HERE))
    quiet = ["-q", "-p", "no:cacheprovider", "-p", "pytest_results", "-o", "filterwarnings=default"]
    sys.exit(pytest.main(["-m", "cuda", *quiet, *(sys.argv[1:] or FILES)]))


if __name__ == "__main__":
    main()
