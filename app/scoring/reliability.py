"""The reliability diagram: accuracy beside confidence, bin by bin, as text and as a picture."""

from pathlib import Path

from app.scoring.calibration import NUM_BINS, Calibration, calibration_error
from app.scoring.pictures import save_figure

_WIDTH = 20  # characters of a bar


def reliability_lines(calibration: Calibration) -> list[str]:
    """Return a line for each bin of equal width: a bar as long as its accuracy, `|` at its confidence."""
    lines = [f"{'confidence':<12} {'right':>12}  accuracy (#) against confidence (|)"]
    for each in calibration.equal_width():
        bar = list(("#" * round(each.right.share * _WIDTH)).ljust(_WIDTH + 1, "."))
        bar[round(each.confidence * _WIDTH)] = "|"
        counts = f"{each.right.count} of {each.right.total}"
        lines.append(f"{each.low:.2f} to {each.high:.2f} {counts:>12}  {''.join(bar)}")
    return lines


def save_reliability(calibration: Calibration, path: Path, title: str) -> None:
    """Draw the diagram with its 95% intervals, and below it how many answers each bin has."""
    from matplotlib.figure import Figure

    bins = calibration.equal_width()
    centres, shares = [(each.low + each.high) / 2 for each in bins], [each.right.share for each in bins]
    intervals = [each.right.interval() for each in bins]
    below = [share - low for share, (low, _) in zip(shares, intervals, strict=True)]
    above = [high - share for share, (_, high) in zip(shares, intervals, strict=True)]
    figure = Figure(figsize=(5, 6), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=(3, 1))
    upper.bar(centres, shares, 1 / NUM_BINS, yerr=(below, above), color="#9ecae1", edgecolor="#3182bd")
    upper.plot((0, 1), (0, 1), "--", color="#636363", label="confidence = accuracy")
    upper.plot([each.confidence for each in bins], shares, "o", color="#08519c", label="mean confidence")
    upper.set(
        xlim=(0, 1), ylim=(0, 1.02), ylabel="accuracy", title=f"{title}\n{errors_in_words(calibration)}"
    )
    upper.legend(loc="upper left")
    lower.bar(
        centres, [each.right.total for each in bins], 1 / NUM_BINS, color="#bdbdbd", edgecolor="#636363"
    )
    lower.set(xlabel="confidence", ylabel="answers")
    save_figure(figure, path)


def errors_in_words(calibration: Calibration) -> str:
    """Return the expected calibration error by both kinds of bins."""
    equal, adaptive = calibration.equal_width(), calibration.adaptive()
    return (
        f"ECE {calibration_error(equal):.3f} ({NUM_BINS} bins of equal width), "
        f"{calibration_error(adaptive):.3f} ({len(adaptive)} of equal count)"
    )
