import random

import pytest

from app.training.batches import BatchOrder


def _order(count: int, batch_size: int, seed: int = 0) -> tuple[BatchOrder, list[int]]:
    chance = random.Random(count)
    lengths = [chance.randrange(1, 100) for _ in range(count)]
    return BatchOrder(lengths, batch_size, seed), lengths


@pytest.mark.parametrize(("count", "batch_size"), [(1, 1), (1, 16), (5, 16), (17, 16), (200, 16), (5000, 8)])
def test_an_epoch_holds_each_example_once_in_batches_of_like_size(count: int, batch_size: int) -> None:
    order, _ = _order(count, batch_size)
    for epoch in range(3):
        batches = [order.batch(epoch * order.num_batches + index) for index in range(order.num_batches)]
        assert sorted(index for batch in batches for index in batch) == list(range(count))
        sizes = {len(batch) for batch in batches}
        assert max(sizes) <= batch_size
        assert max(sizes) - min(sizes) <= 1


def test_a_batch_depends_on_seed_and_number_alone() -> None:
    one, _ = _order(100, 8)
    another, _ = _order(100, 8)
    numbers = list(range(40))
    expected = {number: one.batch(number) for number in numbers}
    random.Random(1).shuffle(numbers)
    assert {number: another.batch(number) for number in numbers} == expected
    assert [_order(100, 8, seed=1)[0].batch(number) for number in range(5)] != [
        expected[number] for number in range(5)
    ]
    assert expected[0] != expected[one.num_batches], "epochs are shuffled anew"


def test_grouping_by_length_saves_most_of_the_padding() -> None:
    order, lengths = _order(2000, 16)

    def padding(batches: list[list[int]]) -> int:
        return sum(
            max(lengths[index] for index in batch) * len(batch) - sum(lengths[index] for index in batch)
            for batch in batches
        )

    grouped = padding([order.batch(number) for number in range(order.num_batches)])
    shuffled = list(range(2000))
    random.Random(0).shuffle(shuffled)
    plain = padding([shuffled[start : start + 16] for start in range(0, 2000, 16)])
    assert grouped < plain / 5


def test_lengths_are_mixed_over_an_epoch() -> None:
    order, lengths = _order(2000, 16)
    means = [sum(lengths[i] for i in order.batch(number)) / 16 for number in range(order.num_batches)]
    assert sorted(means) != means
    assert len({tuple(sorted(order.batch(number))) for number in range(2 * order.num_batches)}) == (
        2 * order.num_batches
    ), "other neighbours in another epoch"
