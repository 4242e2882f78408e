"""Headers of NumPy's files, read before memory is allocated for what they claim."""

from __future__ import annotations

from tokenize import TokenError
from typing import Any

import numpy as np


def read_npy_header(file: Any) -> tuple[tuple[int, ...], np.dtype[Any]]:
    """Read the header of an opened .npy file: its shape and type. Raises ValueError if it is damaged."""
    version = np.lib.format.read_magic(file)
    read_header = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    try:
        shape, _, dtype = read_header(file)
    except (SyntaxError, TypeError, MemoryError, RecursionError, EOFError, TokenError) as error:
        raise ValueError(str(error)) from None
    return shape, dtype
