"""The curve of self-consistency: the first n ballots are the vote of n."""

from app.scoring.items import Item, Outcome
from app.scoring.self_consistency import curve_lines, majority, self_consistency


def outcome(*ballots: str, expected: str = "27", answer: str | None = "27") -> Outcome:
    return Outcome(Item(inputs="x", expected=expected, answer=answer), majority(ballots), ballots=ballots)


def test_the_most_frequent_answer_wins_and_of_equal_ones_the_earliest() -> None:
    assert majority(["a", "b", "b"]) == "b"
    assert majority(["a", "b"]) == "a"
    assert majority(["", "", "b"]) == "b"
    assert majority(["", ""]) == ""
    assert majority(["b", "a  a", "a a\n", " "]) == "a a"  # as a server counts


def test_the_curve_counts_each_number_of_ballots() -> None:
    outcomes = [outcome("1", "27", "27", "27"), outcome("27", "1", "1", "27"), outcome("", "27", "27", "2")]
    points = self_consistency(outcomes)
    assert [(each.num_ballots, each.right.count) for each in points] == [(1, 1), (3, 2), (4, 3)]
    assert points[-1].as_json()["share"] == 1.0
    assert curve_lines(points)[2].split()[:4] == ["3", "2", "of", "3"]


def test_whole_texts_are_compared_with_white_space_normalised() -> None:
    assert self_consistency([outcome("a b", expected=" a  b\n", answer=None)])[0].right.count == 1
    refused = Outcome(Item(inputs="x", expected="", answer=None), "", error="no")
    assert self_consistency([refused, outcome("27")])[0].right.count == 1
