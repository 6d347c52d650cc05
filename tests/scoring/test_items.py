"""Outputs whose rightness is known."""

import pytest

from app.scoring.items import Item, Outcome


def outcome(generated: str, expected: str = "", **fields: object) -> Outcome:
    return Outcome(Item(inputs="", expected=expected, **fields), generated)


@pytest.mark.parametrize(
    ("generated", "expected", "is_exact"),
    [(" positive\n", "positive", True), ("Positive", "positive", False), ("positive!", "positive", False)],
)
def test_exact_is_the_whole_output_but_for_space_around_it(
    generated: str, expected: str, is_exact: bool
) -> None:
    assert outcome(generated, expected).is_exact is is_exact


@pytest.mark.parametrize(
    ("generated", "is_right"),
    [
        ("4 + 5 = 9; 3 * 9 = 27; answer: 27", True),
        ("The answer is 27.", True),
        ("27", True),
        ("answer: 127", False),
        ("27 it is not, but 28", False),
        ("", False),
    ],
)
def test_a_right_output_ends_with_the_answer(generated: str, is_right: bool) -> None:
    assert outcome(generated, answer="27").is_right is is_right


def test_a_refused_request_is_wrong_in_every_respect() -> None:
    refused = Outcome(Item(inputs="", expected="", slots=(), answer=""), "", error="too long")
    assert not refused.is_exact
    assert not refused.is_right
    assert not refused.has_every_slot
