"""Precisions in which a network computes, and whether a device has instructions for bfloat16."""

from __future__ import annotations

from typing import Literal

import torch

Precision = Literal["auto", "float32", "bfloat16", "float16"]
# `auto` is float32 until `precision.choose_precision` has measured.
_DTYPES = {
    "auto": torch.float32,
    "float32": torch.float32,
    "bfloat16": torch.bfloat16,
    "float16": torch.float16,
}


def autocast(device: torch.device, precision: Precision) -> torch.autocast:
    """Context that computes in a precision on a device."""
    return torch.autocast(device.type, dtype=_DTYPES[precision], enabled=_DTYPES[precision] != torch.float32)


def has_bfloat16(device: torch.device) -> bool:
    """Return whether a device has instructions for bfloat16."""
    if device.type == "cuda":
        return bool(torch.cuda.is_bf16_supported(including_emulation=False))
    if device.type != "cpu":
        return False
    features: dict[str, object] = getattr(torch.cpu, "get_capabilities", dict)()  # absent in older versions of PyTorch
    return any(bool(features.get(name)) for name in ("avx512_bf16", "amx_bf16", "bf16"))  # the last is Arm's
