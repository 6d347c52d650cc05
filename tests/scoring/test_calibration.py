"""Calibration by hand."""

import math
from pathlib import Path

import pytest

from app.scoring.calibration import Calibration, calibration_error, choice_metrics
from app.scoring.items import Item, Outcome
from app.scoring.pictures import check_picture
from app.scoring.reliability import reliability_lines, save_reliability


def outcome(probability: float, expected: str = "a") -> Outcome:
    """An outcome where `a` has the probability and `b` the rest."""
    probabilities = {"a": probability, "b": 1 - probability}
    return Outcome(Item(inputs="", expected=expected), "a", probabilities=probabilities)


# Confidences 0.7 (wrong), 0.7 (right), 0.9 (right), 0.6 (`b`, right), 1.0 (right).
OUTCOMES = [outcome(0.7, "b"), outcome(0.7), outcome(0.9), outcome(0.4, "b"), outcome(1.0)]


def test_choice_metrics_by_hand() -> None:
    accuracy, macro_f1, brier, nll = choice_metrics(OUTCOMES, ("a", "b"))
    assert accuracy.share.count == 4
    assert macro_f1.value == pytest.approx((2 * 3 / (4 + 3) + 2 * 1 / (1 + 2)) / 2)
    assert brier.value == pytest.approx(2 * (0.7**2 + 0.3**2 + 0.1**2 + 0.4**2 + 0) / 5)
    assert nll.value == pytest.approx(-sum(map(math.log, (0.3, 0.7, 0.9, 0.6, 1.0))) / 5)


def test_a_refused_outcome_is_wrong_and_has_no_loss() -> None:
    refused = Outcome(Item(inputs="", expected="a"), "", error="too long")
    accuracy, _, brier, _ = choice_metrics([*OUTCOMES, refused], ("a", "b"))
    assert (accuracy.share.count, accuracy.share.total) == (4, 6)
    assert brier.value == pytest.approx(choice_metrics(OUTCOMES, ("a", "b"))[2].value)


def test_a_probability_of_zero_has_a_finite_loss() -> None:
    assert choice_metrics([outcome(0.0)], ("a", "b"))[3].value == pytest.approx(-math.log(1e-15))


def test_calibration_error_with_bins_of_equal_width() -> None:
    bins = Calibration.of(OUTCOMES).equal_width()
    assert [(round(each.low * 15), each.right.count, each.right.total) for each in bins] == [
        (8, 1, 1),  # 0.6 stands at the upper end of its bin
        (10, 1, 2),
        (13, 1, 1),
        (14, 1, 1),
    ]
    assert calibration_error(bins) == pytest.approx((1 * 0.4 + 2 * 0.2 + 1 * 0.1 + 0) / 5)


def test_calibration_error_with_bins_of_equal_count() -> None:
    outcomes = [outcome(0.5 + n / 100, "ab"[n % 2]) for n in range(1, 46)]
    bins = Calibration.of(outcomes).adaptive()
    assert [each.right.total for each in bins] == [3] * 15
    means = [0.5 + (3 * n + 2) / 100 for n in range(15)]
    shares = [sum(number % 2 == 0 for number in range(3 * n + 1, 3 * n + 4)) / 3 for n in range(15)]
    gaps = [abs(share - mean) for share, mean in zip(shares, means, strict=True)]
    assert calibration_error(bins) == pytest.approx(sum(gaps) / 15)


def test_the_diagram_as_text() -> None:
    lines = reliability_lines(Calibration.of(OUTCOMES))
    assert lines[1:] == [
        "0.53 to 0.60       1 of 1  ############|#######.",
        "0.67 to 0.73       1 of 2  ##########....|......",
        "0.87 to 0.93       1 of 1  ##################|#.",
        "0.93 to 1.00       1 of 1  ####################|",
    ]


def test_the_diagram_as_a_picture(tmp_path: Path) -> None:
    calibration = Calibration.of(OUTCOMES)
    pictures = [tmp_path / "one.svg", tmp_path / "two.svg", tmp_path / "three.png"]
    for path in pictures:
        check_picture(path)
        save_reliability(calibration, path, "mood@1 on $test.jsonl")
    assert pictures[0].read_bytes() == pictures[1].read_bytes()
    assert b"<svg" in pictures[0].read_bytes()
    assert pictures[2].read_bytes().startswith(b"\x89PNG")
    with pytest.raises(ValueError, match=r"\.svg or \.png"):
        check_picture(tmp_path / "plot.pdf")
