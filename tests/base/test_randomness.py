from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from cnnrun.base.randomness import derive_key, permutation, random_bits, seed_step, uniform

MASK = (1 << 64) - 1
whole = st.integers(0, 2**63 - 1)


def mix(z: int) -> int:
    """SplitMix64's finaliser in Python's own integers."""
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) & MASK
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) & MASK
    return z ^ (z >> 31)


@given(whole, st.integers(0, 10**6), st.integers(0, 2**40), st.integers(0, 2**33))
@settings(max_examples=200, deadline=None)
def test_random_bits_equal_splitmix64_in_plain_integers(seed, epoch, index, slot):
    gamma = 0x9E3779B97F4A7C15
    sample = mix((index * gamma + derive_key(seed, epoch)) & MASK)
    expected = mix((sample + slot * gamma) & MASK)
    assert int(random_bits(seed, epoch, torch.tensor([index]), torch.tensor([slot]))) & MASK == expected


def test_the_generators_first_numbers_are_pinned():
    """A changed formula would change every existing run, so this test must fail first."""
    samples, slots = torch.tensor([3, 4]), torch.tensor([0, 1])
    top = (random_bits(1, 2, samples, slots) >> 40) & 0xFFFFFF  # the upper 24 bits, all that float32 holds
    assert torch.equal(uniform(1, 2, samples, slots).double(), top.double() / 2**24)
    assert permutation(7, 0, 8).tolist() == [4, 3, 6, 2, 7, 0, 1, 5]


def test_a_samples_random_numbers_do_not_depend_on_its_batch():
    slots = torch.arange(5)
    together = uniform(9, 4, torch.arange(100), slots)
    alone = torch.cat([uniform(9, 4, torch.tensor([i]), slots) for i in range(100)])
    assert torch.equal(together, alone)


def test_uniform_draws_are_uniform_and_uncorrelated_between_slots():
    draws = uniform(0, 0, torch.arange(200_000), torch.arange(3))
    assert float(draws.min()) >= 0
    assert float(draws.max()) < 1
    # A chi-squared test on 100 equal cells: its mean is 99, its deviation 14.
    for slot in range(3):
        counts = torch.histc(draws[:, slot], 100, 0, 1)
        assert 40 < float(((counts - 2000) ** 2 / 2000).sum()) < 180
    correlation = torch.corrcoef(draws.T)
    assert (correlation - torch.eye(3)).abs().max() < 0.01


@given(whole, st.integers(0, 1000), st.integers(1, 300))
@settings(max_examples=100, deadline=None)
def test_permutation_contains_each_index_once(seed, epoch, count):
    assert sorted(permutation(seed, epoch, count).tolist()) == list(range(count))


def test_permutations_differ_by_seed_and_epoch():
    orders = {tuple(permutation(seed, epoch, 50).tolist()) for seed in range(5) for epoch in range(5)}
    assert len(orders) == 25


def test_seeding_a_step_discards_the_earlier_random_state():
    cpu = torch.device("cpu")
    seed_step(3, 10, 0, cpu)
    expected = torch.rand(4)
    torch.rand(100)
    seed_step(3, 10, 0, cpu)
    assert torch.equal(torch.rand(4), expected)
    for other in ((3, 11, 0), (3, 10, 1), (4, 10, 0)):
        seed_step(*other, cpu)
        assert not torch.equal(torch.rand(4), expected)
