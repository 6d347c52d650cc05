"""What is guessed from a text, and how much."""

import random

from app.engine.lookup import Lookup

LONE = 1 / 25  # the least chance that a guess needs in a step of one row
CROWD = 16 / 40


def test_a_guess_is_what_followed_the_same_tokens_last() -> None:
    text = [1, 2, 3, 40, 41, 1, 2, 3, 50, 51, 9, 2, 3, 60, 1, 2, 3]
    assert Lookup(()).guess(text, 3, LONE) == (50, 51, 9), "three that are the same go before a later two"
    assert Lookup(()).guess([*text[:-3], 9, 3, 60], 2, LONE) == (9, 3)
    assert Lookup(()).guess([*text, 77], 3, LONE) == (), "nothing has followed it yet"
    assert Lookup(()).guess([5], 3, LONE) == Lookup(()).guess([5, 5], 3, LONE) == ()


def test_text_that_the_sequence_stands_on_counts() -> None:
    lookup = Lookup([100_000, 256_000, 7, 8, 9])
    assert lookup.guess([100_000, 256_000], 4, LONE) == (7, 8, 9, 100_000), "and goes on in its own"
    assert lookup.guess([100_000, 256_000, 7, 8], 2, LONE) == (9, 100_000), "which has grown"


def test_a_loop_goes_on() -> None:
    assert Lookup(()).guess([1, 2, 7, 8, 7, 8, 7, 8], 4, LONE) == (7, 8, 7, 8)
    assert Lookup(()).guess([4] * 9, 4, LONE) == (4, 4, 4, 4)


def test_any_id_of_a_vocabulary_may_be_guessed() -> None:
    for id_ in (0, 0xD800, 0xDFFF, 0xFFFF, 262_143):  # surrogates are characters like others
        assert Lookup(()).guess([id_, id_, id_], 1, LONE) == (id_,)


def test_right_guesses_make_more_of_them_and_wrong_ones_fewer() -> None:
    lookup, loop = Lookup(()), [4] * 9
    first = len(lookup.guess(loop, 64, LONE))
    lookup.learn(first, first)
    better = len(lookup.guess(loop, 64, LONE))
    assert 1 < first < better
    for _ in range(60):
        lookup.learn(8, 8)
    assert len(lookup.guess(loop, 64, LONE)) == 64
    for _ in range(8):
        lookup.learn(0, 8)
    assert len(lookup.guess(loop, 64, LONE)) < better


def test_a_row_whose_guesses_are_wrong_hardly_guesses_in_a_crowd_but_tries_again() -> None:
    lookup, loop, num_guessed = Lookup(()), [4] * 9, 0
    assert len(lookup.guess(loop, 8, CROWD)) == 1
    for _ in range(300):
        guesses = lookup.guess(loop, 8, CROWD)
        if guesses:
            num_guessed += len(guesses)
            lookup.learn(0, len(guesses))
    assert 3 <= num_guessed <= 30


def test_no_more_is_guessed_than_is_asked_for() -> None:
    rng, lookup, text = random.Random(1), Lookup(()), list[int]()
    for _ in range(500):
        text += [rng.randrange(3) for _ in range(rng.randrange(1, 4))]
        most = rng.randrange(-1, 6)
        guesses = lookup.guess(text, most, LONE)
        assert len(guesses) <= max(0, most)
        assert set(guesses) <= {0, 1, 2}
        lookup.learn(rng.randrange(len(guesses) + 1), len(guesses))
