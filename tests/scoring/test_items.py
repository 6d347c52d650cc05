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
        ("answer: -27", False),
        ("answer: 1.27", False),
        ("9,27", False),
        ("answer=27", True),
        ("first 9, then 27", True),
        ("", False),
    ],
)
def test_a_right_output_ends_with_the_answer(generated: str, is_right: bool) -> None:
    assert outcome(generated, answer="27").is_right is is_right


@pytest.mark.parametrize(
    ("generated", "answer", "is_right"),
    [
        ("It is Acme Inc.", "Acme Inc.", True),
        ("It is Acme Inc", "Acme Inc.", True),
        ("Acme Inc...", "acme inc.", True),
        ("Acme", "Acme Inc.", False),
        ("-27", "-27", True),
        ("in 1,027", "1,027", True),
        ("well-known", "known", True),
    ],
)
def test_a_full_stop_of_the_answer_does_not_count_either(generated: str, answer: str, is_right: bool) -> None:
    assert outcome(generated, answer=answer).is_right is is_right


def test_a_refused_request_is_wrong_in_every_respect() -> None:
    refused = Outcome(Item(inputs="", expected="", slots=(), answer=""), "", error="too long")
    assert not refused.is_exact
    assert not refused.is_right
    assert not refused.has_every_slot
