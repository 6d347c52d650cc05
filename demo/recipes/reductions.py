"""Expressions, solved by rewriting: ``3 * (4 + 5)`` -> ``4 + 5 = 9; 3 * 9`` -> ``3 * 9 = 27; answer: 27``.

Each output does the operations that can be done at once, and writes what is left; it is the next input.
"""

from __future__ import annotations

import random
from collections.abc import Callable

from demo.recipes.arithmetic import OutOfRange, apply, expression, filled, solve, tokens_of
from demo.recipes.splits import Example, Split, split_of

# Capitals: up to 50; else 1-9. The corpus has the first three forms, and none of the others.
THREE_OF_CORPUS = ("(a + b) * (c + d)", "a * b + c * d", "a * (b + c) + D")
THREE_OTHERS = (
    "(a + b) * c - D",
    "A + b * (c + d)",
    "A - b * (c + d)",
    "A + b * c - D",
    "A - (b + c) - d",
    "A + B - C + D",
    "(A - B) * c + D",
    "(A - B) * (c + d)",
)
FOUR = (
    "(a + b) * (c + d) - E",
    "a * b + c * d + E",
    "A + b * (c + d) - E",
    "a * (b + c) - d * e",
    "A - (b + c) - (d + e)",
    "(A - B) * c + d * e",
)
FOUR_UNTRAINED = (  # nothing is trained on these
    "a * (b + c) + d * e",
    "(a + b) * c + D - E",
    "a * (b + c) + (D - E)",
    "A + (b + c) * d - E",
)
_DOMAIN = "arithmetic"  # whose split holds for these too

Tree = int | tuple["Tree", str, "Tree"]


def parse(text: str) -> Tree:
    """An expression as a tree: products bind closer than sums, equal operators from the left."""
    return _sum(tokens_of(text))


def _sum(tokens: list[str]) -> Tree:
    return _joined(tokens, "+-", _product)


def _product(tokens: list[str]) -> Tree:
    return _joined(tokens, "*", _atom)


def _joined(tokens: list[str], operators: str, part: Callable[[list[str]], Tree]) -> Tree:
    tree = part(tokens)
    while tokens and tokens[0] in operators:
        tree = (tree, tokens.pop(0), part(tokens))
    return tree


def _atom(tokens: list[str]) -> Tree:
    token = tokens.pop(0)
    if token != "(":
        return int(token)
    inner = _sum(tokens)
    tokens.pop(0)
    return inner


def reduced(tree: Tree, steps: list[str]) -> Tree:
    """The tree with its innermost operations done; they are recorded in ``steps``, from the left."""
    if isinstance(tree, int):
        return tree
    left, operator, right = tree
    if isinstance(left, int) and isinstance(right, int):
        result = apply(left, operator, right)
        steps.append(f"{left} {operator} {right} = {result}")
        return result
    return reduced(left, steps), operator, reduced(right, steps)


def written(tree: Tree) -> str:
    """The tree in words, with the brackets that it needs."""
    if isinstance(tree, int):
        return str(tree)
    left, operator, right = tree
    shown_left = f"({written(left)})" if operator == "*" and _is_sum(left) else written(left)
    shown_right = f"({written(right)})" if _is_sum(right) else written(right)
    return f"{shown_left} {operator} {shown_right}"


def _is_sum(tree: Tree) -> bool:
    return not isinstance(tree, int) and tree[1] != "*"


def outputs(text: str) -> list[str]:
    """What the steps of a chain write."""
    tree, found = parse(text), []
    while not isinstance(tree, int):
        done: list[str] = []
        tree = reduced(tree, done)
        found.append("; ".join([*done, f"answer: {tree}" if isinstance(tree, int) else written(tree)]))
    return found


def rewrites(example: Example) -> list[tuple[str, str]]:
    """The inputs of a chain's steps with their outputs; without those of held-out expressions."""
    said = outputs(example.text)
    pairs = zip([example.text, *said], said, strict=False)
    return [(text, output) for text, output in pairs if not _is_heldout(text.split("; ")[-1])]


def _is_heldout(state: str) -> bool:
    return split_of(_DOMAIN, state.replace(" ", "")) is Split.HELDOUT


def of_forms(*forms: str) -> Callable[[random.Random], Example]:
    """A maker of expressions of these forms; answer: ``steps``."""

    def make(rng: random.Random) -> Example:
        while True:
            text = filled(rng, rng.choice(forms))
            try:
                return Example(_DOMAIN, text, text.replace(" ", ""), {"steps": solve(text)})
            except OutOfRange:
                continue

    return make


_MIXTURE = (
    expression,
    of_forms(*THREE_OF_CORPUS),
    of_forms(*THREE_OTHERS),
    of_forms(*FOUR),
)


def nested(rng: random.Random) -> Example:
    """An expression of one to four operations, most with three; answer: ``steps``."""
    return rng.choices(_MIXTURE, (3, 3, 5, 4))[0](rng)
