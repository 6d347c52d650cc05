"""Dates as people write them, and their normal forms."""

from __future__ import annotations

import random
from datetime import date, timedelta

from demo.recipes import lexicon
from demo.recipes.splits import Example

_FIRST = date(1900, 1, 1)
_DAYS = (date(2099, 12, 31) - _FIRST).days
_CONTEXTS = (
    "The meeting is on {}.",
    "She was born on {}.",
    "It was signed on {}.",
    "We moved here on {}",
    "The shop opened on {}.",
    "Please reply before {}.",
    "due {}",
    "published {}",
)


def written_date(rng: random.Random) -> Example:
    """Answers: ``iso``, ``us``, ``dotted``, ``month``, ``year``. Half of the years are 1980 to 2035."""
    day = _FIRST + timedelta(days=rng.randint(0, _DAYS))
    if rng.random() < 0.5:
        day = day.replace(year=rng.randint(1980, 2035), day=min(day.day, 28))
    text = _write(rng, day)
    if rng.random() < 0.2:
        text = rng.choice(_CONTEXTS).format(text)
    answers = {
        "iso": day.isoformat(),
        "us": f"{day.month:02}/{day.day:02}/{day.year}",
        "dotted": f"{day.day:02}.{day.month:02}.{day.year}",
        "month": lexicon.MONTHS[day.month - 1],
        "year": str(day.year),
    }
    return Example("date", text, day.isoformat(), answers)


def _ordinal(number: int) -> str:
    suffix = {1: "st", 2: "nd", 3: "rd"}.get(number % 10, "th")
    return f"{number}{'th' if 11 <= number <= 13 else suffix}"


def _write(rng: random.Random, day: date) -> str:
    month = lexicon.MONTHS[day.month - 1]
    month = month[:3] if rng.random() < 0.3 else month
    weekday = lexicon.WEEKDAYS[day.weekday()]
    return rng.choice(
        (
            f"{month} {day.day}, {day.year}",
            f"{month} {day.day}, {day.year}",
            f"{day.day} {month} {day.year}",
            f"{day.day} {month} {day.year}",
            f"{month} {_ordinal(day.day)}, {day.year}",
            f"{_ordinal(day.day)} {month} {day.year}",
            f"the {_ordinal(day.day)} of {month}, {day.year}",
            f"the {_ordinal(day.day)} of {month} {day.year}",
            f"{weekday}, {day.day} {month} {day.year}",
            f"{weekday}, {month} {day.day}, {day.year}",
            f"{day.year}/{day.month:02}/{day.day:02}",
            f"{day.year} {month} {day.day}",
            f"{month} {day.day} {day.year}",
        )
    )
