"""Scores of outputs whose rightness is known, and held-out files that aren't."""

from pathlib import Path

import pytest

from app.cli.scoring import Item, Outcome, Share, read_items, scores


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


def test_slots_are_counted_one_by_one_and_all_together() -> None:
    slots = ("The Eagle", "Thai")
    found = scores([outcome("The Eagle serves Thai food.", slots=slots), outcome("The Eagle.", slots=slots)])
    assert (found["every_slot"].count, found["every_slot"].total) == (1, 2)
    assert (found["slot_values"].count, found["slot_values"].total) == (3, 4)


def test_only_what_the_items_ask_for_is_scored() -> None:
    found = scores([outcome("a", "a"), outcome("b", "b", answer="b"), outcome("c", "x", answer="c")])
    assert list(found) == ["exact", "accuracy"]
    assert (found["exact"].count, found["exact"].total) == (2, 3)
    assert (found["accuracy"].count, found["accuracy"].total) == (2, 2)


def test_a_refused_request_is_wrong_in_every_respect() -> None:
    refused = Outcome(Item(inputs="", expected="", slots=(), answer=""), "", error="too long")
    assert not refused.is_exact
    assert not refused.is_right
    assert not refused.has_every_slot


def test_wilson_intervals() -> None:
    # From scipy 1.17: binomtest(count, 30).proportion_ci(method="wilson").
    for count, low, high in ((0, 0.0, 0.1135), (28, 0.7868, 0.9815), (30, 0.8865, 1.0)):
        assert Share(count, 30).interval() == pytest.approx((low, high), abs=2e-4)


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
