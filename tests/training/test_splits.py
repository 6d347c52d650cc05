"""Splits by hash stay as they are where lines come, go and move; near-duplicates across them are found."""

import random
import time
from collections.abc import Sequence

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from app.training.examples import Example
from app.training.near_duplicates import near_duplicate_warnings, near_duplicates
from app.training.splits import SMALL, Splits, by_input, plain_text, split_by_hash

TEXTS = st.lists(st.text(min_size=1, max_size=4), min_size=1, max_size=60)


def examples(texts: Sequence[str], outputs: Sequence[str] = ("a",)) -> list[Example]:
    return [
        Example(inputs=text, output=outputs[number % len(outputs)], line=number + 1)
        for number, text in enumerate(texts)
    ]


def split_of(splits: Splits) -> dict[str, str]:
    named = {"train": splits.train, "dev": splits.dev, "test": splits.test}
    return {plain_text(each): name for name, found in named.items() for each in found}


def words(count: int, begin: int = 0) -> list[str]:
    return [f"text number {number}" for number in range(begin, begin + count)]


@settings(max_examples=50, deadline=None)
@given(texts=TEXTS, seed=st.integers(0, 3), order=st.randoms(use_true_random=False))
def test_every_example_is_in_one_split_whatever_the_order(
    texts: list[str], seed: int, order: random.Random
) -> None:
    chosen = examples(texts)
    splits = split_by_hash(by_input(chosen), split_seed=seed)
    assert sorted(each.line for each in (*splits.train, *splits.dev, *splits.test)) == [
        each.line for each in chosen
    ]
    order.shuffle(chosen)
    assert split_by_hash(by_input(chosen), split_seed=seed) == splits
    assert splits.train


def test_lines_that_are_added_move_none_but_at_the_sizes_that_are_said() -> None:
    few, some, many = (
        split_of(split_by_hash(by_input(examples(words(count))))) for count in (300, SMALL - 1, 3000)
    )
    assert all(some[text] == split for text, split in few.items())
    moved = {(split, many[text]) for text, split in some.items() if many[text] != split}
    assert moved <= {("dev", "train"), ("test", "train")}


@pytest.mark.parametrize(("count", "dev", "test"), [(10, 1, 1), (80, 8, 8), (200, 15, 25), (5000, 450, 450)])
def test_each_size_holds_out_enough(count: int, dev: int, test: int) -> None:
    splits = split_by_hash(by_input(examples(words(count))))
    assert len(splits.dev) >= dev
    assert len(splits.test) >= test
    assert len(splits.train) >= 0.5 * count


def test_another_seed_holds_out_others_and_shares_are_as_asked() -> None:
    groups = by_input(examples(words(2000)))
    one, other = (split_by_hash(groups, split_seed=seed) for seed in (0, 1))
    assert len({each.line for each in one.test} & {each.line for each in other.test}) < 60
    asked = split_by_hash(groups, dev_share=0.3, test_share=0)
    assert 500 < len(asked.dev) < 700
    assert not asked.test


def test_equal_inputs_with_other_answers_stay_together() -> None:
    chosen = examples([*words(200), *(f" TEXT  number {n}\n" for n in range(200))], ["a", "b", "c"])
    splits = split_by_hash(by_input(chosen))
    where = [{plain_text(each) for each in found} for found in (splits.train, splits.dev, splits.test)]
    assert len(set.union(*where)) == sum(map(len, where)) == 200


def test_each_label_is_in_each_split() -> None:
    outputs = [*"ab" * 40, *"c" * 20]
    chosen = [Example(inputs=f"{n}", output=label, line=n) for n, label in enumerate(outputs)]
    splits = split_by_hash(by_input(chosen), by_label=True)
    for found in (splits.train, splits.dev, splits.test):
        assert {each.output for each in found} == {"a", "b", "c"}
    rare = [*chosen, Example(inputs="once", output="d", line=100)]
    assert "d" in {each.output for each in split_by_hash(by_input(rare), by_label=True).train}


SENTENCE = "The food was wonderful and the staff were friendly, but the room was cold."


@pytest.mark.parametrize(
    "near",
    [
        SENTENCE.replace("cold.", "cold!"),
        SENTENCE.upper().replace(" ", "  "),
        "Well: " + SENTENCE,
        SENTENCE.replace("staff", "stuff"),
    ],
)
def test_a_near_duplicate_is_found(near: str) -> None:
    train, test = examples([*words(50), SENTENCE]), examples(["quite another text is here", near])
    [pair] = near_duplicates(train, test)
    assert (pair.held_out, pair.trained) == (test[1], train[-1])
    [line] = near_duplicate_warnings(Splits(tuple(train), (), tuple(test)))
    assert line.startswith(
        "at least 1 of 2 inputs of test are nearly those of train, so scores may be too good: "
    )
    assert "line 2" in line
    assert "line 51" in line


@pytest.mark.parametrize(
    "other",
    [
        "The food was cold and the staff were wonderful, but the room was friendly.",
        SENTENCE[: len(SENTENCE) // 2],
        "Seven large ships left the harbour of Lisbon on a Monday morning in May.",
    ],
)
def test_texts_that_share_words_are_none(other: str) -> None:
    assert not near_duplicates(examples([SENTENCE]), examples([other]))


def test_short_texts_are_not_compared() -> None:
    splits = Splits(tuple(examples(["12 * (3 + 4)"])), (), tuple(examples(["12 * (3 + 5)"])))
    assert not list(near_duplicate_warnings(splits))


def test_much_data_takes_seconds() -> None:
    chance = random.Random(0)
    vocabulary = ["".join(chance.choices("abcdefghijklmnop", k=6)) for _ in range(2000)]
    texts = [" ".join(chance.choices(vocabulary, k=12)) for _ in range(5000)]
    splits = split_by_hash(by_input(examples([*texts, *texts[:50]])))
    began = time.process_time()
    assert not list(near_duplicate_warnings(splits))  # equal ones are in one split
    assert time.process_time() - began < 5  # usually 0.3
