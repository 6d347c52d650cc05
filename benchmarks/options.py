"""Options that several commands have."""

import argparse
from collections.abc import Sequence
from typing import Any


def names(known: Sequence[str]) -> Any:
    """A parser of names with commas between; argparse shows the message where one is unknown."""

    def parse(text: str) -> list[str]:
        given = [name for name in text.split(",") if name]
        if unknown := sorted(set(given) - set(known)):
            raise argparse.ArgumentTypeError(f"unknown: {', '.join(unknown)}; choose from {', '.join(known)}")
        return given

    return parse
