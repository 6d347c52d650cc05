"""Small expressions, solved in steps: ``3 * (4 + 5)`` -> ``4 + 5 = 9; 3 * 9 = 27; answer: 27``.

Numbers are small on purpose: two-digit by one-digit products are where a model of this size errs.
"""

from __future__ import annotations

import random
import re
from dataclasses import dataclass

from demo.recipes.splits import Example

LARGEST_FACTOR = 12
LARGEST_PRODUCT = 100
LARGEST_SUM = 99
# letter: a small number (1-9); capital: up to 50.
FORMS: tuple[tuple[str, int], ...] = (
    ("A + B", 2),
    ("A - B", 2),
    ("a * b", 1),
    ("a * (b + c)", 5),
    ("(a + b) * c", 5),
    ("a * (B - C)", 3),
    ("(A - B) * c", 3),
    ("A + b * c", 4),
    ("a * b + C", 4),
    ("A - b * c", 3),
    ("a * b - C", 3),
    ("A + B + C", 2),
    ("A + B - C", 2),
    ("A - (b + c)", 2),
    ("(a + b) * (c + d)", 3),
    ("a * b + c * d", 2),
    ("a * (b + c) + D", 3),
)


class OutOfRange(ValueError):
    """The expression holds a number that the demo leaves out."""


@dataclass(slots=True)
class _Solver:
    """Recursive descent over ``+ - * ( )``; ``steps`` are recorded in the order of evaluation."""

    tokens: list[str]
    steps: list[str]

    def sum(self) -> int:
        value = self.product()
        while self.tokens and self.tokens[0] in "+-":
            operator = self.tokens.pop(0)
            value = self._apply(value, operator, self.product())
        return value

    def product(self) -> int:
        value = self.atom()
        while self.tokens and self.tokens[0] == "*":
            self.tokens.pop(0)
            value = self._apply(value, "*", self.atom())
        return value

    def atom(self) -> int:
        token = self.tokens.pop(0)
        if token != "(":
            return int(token)
        value = self.sum()
        self.tokens.pop(0)
        return value

    def _apply(self, left: int, operator: str, right: int) -> int:
        result = apply(left, operator, right)
        self.steps.append(f"{left} {operator} {right} = {result}")
        return result


def apply(left: int, operator: str, right: int) -> int:
    """One operation. OutOfRange for numbers that the demo leaves out."""
    result = {"+": left + right, "-": left - right, "*": left * right}[operator]
    limit = LARGEST_PRODUCT if operator == "*" else LARGEST_SUM
    if not 0 <= result <= limit or (operator == "*" and max(left, right) > LARGEST_FACTOR):
        raise OutOfRange(f"{left} {operator} {right}")
    return result


def tokens_of(text: str) -> list[str]:
    """Numbers, operators and brackets."""
    return re.findall(r"\d+|[-+*()]", text)


def solve(text: str) -> str:
    """The steps and the answer of an expression."""
    solver = _Solver(tokens_of(text), [])
    value = solver.sum()
    return "; ".join([*solver.steps, f"answer: {value}"])


def expression(rng: random.Random) -> Example:
    """Answer: ``steps``. One in seven is written without spaces."""
    forms, weights = zip(*FORMS, strict=True)
    while True:
        form: str = rng.choices(forms, weights)[0]
        text = filled(rng, form)
        try:
            steps = solve(text)
        except OutOfRange:
            continue
        compact = text.replace(" ", "")
        shown = compact if rng.random() < 1 / 7 else text
        return Example("arithmetic", shown, compact, {"steps": steps})


def filled(rng: random.Random, form: str) -> str:
    """The form with numbers in place of its letters."""
    return "".join(_number(rng, letter) if letter.isalpha() else letter for letter in form)


def _number(rng: random.Random, letter: str) -> str:
    return str(rng.randint(1, 9) if letter.islower() else rng.randint(1, 50))
