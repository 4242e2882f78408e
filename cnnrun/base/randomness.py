"""Random numbers as pure functions of (seed, epoch, sample, slot).

Nothing here has state. The batch at step k does not depend on workers, prefetching, world size or earlier steps, and
resuming needs no saved generator. The generator is SplitMix64's finaliser (Steele, Lea and Flood 2014, fig. 16),
applied to a chain of keys. It passes BigCrush, is a bijection on 64 bits, and takes ten integer operations.
"""

from __future__ import annotations

import torch
from torch import Tensor

_GAMMA = 0x9E3779B97F4A7C15
_MASK = (1 << 64) - 1
_ORDER_SLOT = 1 << 32  # larger than the slot of any augmentation


def _signed(value: int) -> int:
    """The int64 value with the same 64 bits."""
    value &= _MASK
    return value - (1 << 64) if value >> 63 else value


def _shift(z: Tensor, bits: int) -> Tensor:
    """Shift right and fill with zeros; `>>` on int64 copies the sign."""
    return (z >> bits).bitwise_and_((1 << (64 - bits)) - 1)


def _mix(z: Tensor) -> Tensor:
    """Apply SplitMix64's finaliser in place."""
    z.bitwise_xor_(_shift(z, 30)).mul_(_signed(0xBF58476D1CE4E5B9))
    z.bitwise_xor_(_shift(z, 27)).mul_(_signed(0x94D049BB133111EB))
    return z.bitwise_xor_(_shift(z, 31))


def derive_key(*parts: int) -> int:
    """Derive a 64-bit key from several integers; different parts give unrelated keys."""
    state = 0
    for part in parts:
        z = (state ^ (part * _GAMMA)) & _MASK
        z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & _MASK
        z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & _MASK
        state = (z ^ (z >> 31)) + _GAMMA
    return _signed(state)


def random_bits(seed: int, epoch: int, index_B: Tensor, slot_S: Tensor) -> Tensor:
    """64 random bits for each sample and slot: int64 [B, S], on the samples' device."""
    sample_B = _mix(index_B * _signed(_GAMMA) + derive_key(seed, epoch))
    return _mix(sample_B[:, None] + slot_S * _signed(_GAMMA))


def uniform(seed: int, epoch: int, index_B: Tensor, slot_S: Tensor) -> Tensor:
    """Uniform numbers in [0, 1) for each sample and slot: float32 [B, S] with all 24 bits random."""
    return _shift(random_bits(seed, epoch, index_B, slot_S), 40).float() * 2.0**-24


def permutation(seed: int, epoch: int, count: int) -> Tensor:
    """Sample order of an epoch: a permutation of range(count), int64. No two keys tie, as `_mix` is a bijection."""
    sort_keys = random_bits(seed, epoch, torch.arange(count), torch.tensor([_ORDER_SLOT]))[:, 0]
    return torch.from_numpy(sort_keys.numpy().argsort())  # four times as fast as torch's argsort


def seed_step(seed: int, step: int, rank: int, device: torch.device) -> None:
    """Seed the device's generator, which dropout uses, from (seed, step, rank), so that no state need be saved."""
    generators = torch.cuda.default_generators if device.type == "cuda" else (torch.default_generator,)
    generators[device.index or 0].manual_seed(derive_key(seed, step, 1 + rank) & (_MASK >> 1))
