"""A training that is killed anywhere and resumed ends with the same bits as an undisturbed one."""

from __future__ import annotations

import pytest

from tests.support.images import write_pictures
from tests.support.killed_trainings import CASES, HOWS, Undisturbed, kill_repeatedly, run_undisturbed


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    return write_pictures(tmp_path_factory.mktemp("killed") / "pictures")


@pytest.fixture(scope="module")
def expected(folder):
    made: dict[object, Undisturbed] = {}

    def of(case) -> Undisturbed:
        if case not in made:
            made[case] = run_undisturbed(folder, case)
        return made[case]

    return of


@pytest.mark.parametrize("kind", ["ema", "detect"])
def test_an_undisturbed_run_is_reproducible_for_any_number_of_workers(folder, expected, kind):
    first = expected((0, 1, kind))
    assert run_undisturbed(folder, (0, 1, kind)).digest == first.digest == expected((2, 1, kind)).digest
    assert first.digest != expected((0, 1, "mixup")).digest
    assert first.calls > 100


@pytest.mark.parametrize("how", HOWS)
@pytest.mark.parametrize("case", CASES, ids=lambda case: "-".join(map(str, case)))
def test_a_training_killed_twice_ends_with_the_same_bits(folder, expected, case, how):
    """Each case is killed twice, at places drawn from its seed."""
    story = kill_repeatedly(folder, case, expected(case), 2, how, seed=CASES.index(case))
    assert not story.trouble
    assert story.found == expected(case).digest


@pytest.mark.parametrize("how", HOWS)
def test_a_training_killed_ten_times_ends_with_the_same_bits(folder, expected, how):
    story = kill_repeatedly(folder, (2, 3, "mixup"), expected((2, 3, "mixup")), 10, how, seed=7, early=0.12)
    assert not story.trouble
    assert story.kills == 10
