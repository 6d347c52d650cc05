"""Speculation: rows take guesses of their next tokens along, which the same step proves right or wrong.

A guess is a further token of its sequence, as in a chunk. The sampler chooses a token after each as it
always does, so what a row gets are the tokens that it would have got one by one: the first, and each further
one as long as the guess before it was the token chosen there. Keys and values of wrong guesses are written
again by the tokens that come instead.

Not guessed for are rows held to a grammar, since their masks come one at a time, and beams.
"""

from app.engine.blocks import KVBlocks
from app.engine.items import guessing_item
from app.engine.plan import PlanItem
from app.engine.sequence import Sequence
from app.engine.step import Step

# Tokens that would cost as much as a step does whatever it takes, most of all to read the weights: 26 on
# CPUs without matrix tiles, more on others.
_FREE_TOKENS = 24


class Speculation:
    """Decides which rows of a step take guesses along."""

    def __init__(self, blocks: KVBlocks, most: int) -> None:
        """`most` is the number of guesses of a row in a step; 0: there are none."""
        self._blocks = blocks
        self._most = most

    def extend(self, step: Step, num_running: int) -> None:
        """Let decoding rows, the step's first items, take guesses along where these are worth their cost.

        What nothing else wants is theirs: the rest of the step's budget, and free blocks while one stays free
        for each running row.
        """
        num_rows = step.counts.decode_rows if self._most else 0
        least_chance = num_rows / (_FREE_TOKENS + num_rows)  # a token's cost, in tokens that come for it
        for place in range(num_rows):
            item = step.items[place]
            sequence = step.sequences[item.id]
            if sequence.beams is None and sequence.constraint is None:
                guesses = self._guess(sequence, min(self._most, step.budget), least_chance)
                if guesses:
                    guesses = guesses[: self._room(sequence, item, len(guesses), num_running)]
                if guesses:
                    step.guess(place, guessing_item(sequence, item, guesses), guesses)

    @staticmethod
    def _guess(sequence: Sequence, most: int, least_chance: float) -> tuple[int, ...]:
        num_missing = sequence.request.max_new_tokens - sequence.num_generated
        return sequence.lookup.guess(sequence.tokens, min(most, num_missing - 1), least_chance)

    def _room(self, sequence: Sequence, item: PlanItem, count: int, num_running: int) -> int:
        """Make room for guesses after a row's token; return for how many there is."""
        table, slot = sequence.table, item.kv.num_computed
        assert table is not None
        end = slot + 1 + count
        if end > table.end:
            spare = num_running * self._blocks.blocks_for(1)
            if (table.missing_blocks(slot, end) + spare > self._blocks.num_free).any():
                end = table.end
        grown = table.grow(slot, end)
        assert grown, "there is room in its blocks, or in those that are free"
        return end - slot - 1
