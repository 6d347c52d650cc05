"""Outputs whose rightness is known, and held-out files that aren't any."""

from pathlib import Path

import pytest

from app.scoring.items import Item, Outcome, read_items


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


def test_a_file_is_read(tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(
        '{"inputs": {"name": "é"}, "expected": "x", "slots": ["a"]}\n\n{"inputs": "i", "expected": ""}\n'
    )
    assert read_items(file) == [
        Item(inputs={"name": "é"}, expected="x", slots=("a",)),
        Item(inputs="i", expected=""),
    ]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "line 2"),
        ("[]", "expected a JSON object"),
        ('{"inputs": "x"}', "expected is missing"),
        ('{"inputs": "x", "expected": "y", "label": "z"}', "unknown field label"),
        ('{"inputs": 3, "expected": "y"}', "'inputs' must be"),
        ('{"inputs": "x", "expected": null}', "must be strings"),
        ('{"inputs": "x", "expected": "y", "slots": "z"}', "'slots' must be"),
        ('{"inputs": "x", "expected": "y", "slots": [""]}', "'slots' must be"),
    ],
)
def test_a_line_that_is_no_item_is_named(line: str, message: str, tmp_path: Path) -> None:
    file = tmp_path / "data.jsonl"
    file.write_text(f'{{"inputs": "x", "expected": "y"}}\n{line}\n')
    with pytest.raises(ValueError, match="line 2") as refused:
        read_items(file)
    assert message in str(refused.value)


def test_an_empty_file_is_no_held_out_file(tmp_path: Path) -> None:
    (tmp_path / "data.jsonl").write_text("\n")
    with pytest.raises(ValueError, match="holds no items"):
        read_items(tmp_path / "data.jsonl")
