import pytest

from cnnrun.base.counts import format_count


@pytest.mark.parametrize(
    ("count", "nouns", "text"),
    [
        (0, ["image"], "0 images"),
        (1, ["image"], "1 image"),
        (60_000, ["image"], "60,000 images"),
        (1, ["class", "classes"], "1 class"),
        (2, ["class", "classes"], "2 classes"),
    ],
)
def test_format_count(count: int, nouns: list[str], text: str) -> None:
    assert format_count(count, *nouns) == text
