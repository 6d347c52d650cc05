"""Which rows of a step read the slots that they begin with together, once for a tile of rows.

A row then attends to the shared slots and to its own apart, and the two are merged: that costs partial
results, so it is done only where it saves more (`CascadeCosts`).
Source: cascade attention (Ye et al., FlashInfer 2024).
"""

from collections.abc import Collection, Sequence
from typing import NamedTuple

from app.models.attention.backend import Context, Head

MIN_KEYS = 128  # of an item that is a part of a longer range


class CascadeCosts(NamedTuple):
    """What sharing costs, in keys that one row reads (with their values, of all kv heads)."""

    partial: float  # for each partial result of a token, of all heads: to write and to merge it
    fixed: float  # for a step in which anything is shared; infinite: nothing ever is


ALWAYS = CascadeCosts(0.0, 0.0)
NEVER = CascadeCosts(0.0, float("inf"))


class SharedHead(NamedTuple):
    """Rows that attend to the same leading slots together."""

    rows: Sequence[int]
    num_slots: int


def shared_heads(
    contexts: Sequence[Context], num_keys: int, queries_per_tile: int, num_items: int, costs: CascadeCosts
) -> tuple[list[SharedHead], float]:
    """Return what rows may share, each row at most once, and the keys that it saves, less partial results.

    Contexts of one token come first. `num_keys` are all rows' together, to be split in about `num_items`
    items.
    """
    found = _candidates(contexts, queries_per_tile)
    if not found:
        return [], 0.0
    saved = [_num_saved(len(rows), num_slots, queries_per_tile) for rows, num_slots in found]
    keys_per_part = max(MIN_KEYS, (num_keys - sum(saved)) / num_items)
    gains = [
        keys - costs.partial * len(head.rows) * (2 + head.num_slots // keys_per_part)
        for keys, head in zip(saved, found, strict=True)
    ]
    shared = [head for head, gain in zip(found, gains, strict=True) if gain > 0]
    return shared, sum(gain for gain in gains if gain > 0)


def _candidates(contexts: Sequence[Context], tile: int) -> list[SharedHead]:
    """Return the heads that save most for the rows that have them: each row comes with one at most."""
    lines = _lines(contexts)
    counts: dict[int, int] = {}  # rows that have a head, by its id
    for rows in lines:
        for id_, _ in contexts[rows[0]].heads:
            counts[id_] = counts.get(id_, 0) + len(rows)
    if max(counts.values(), default=1) == 1:
        return []

    def saving(head: Head) -> int:
        return _num_saved(counts[head.id], head.num_slots, tile)

    chosen: dict[Head, list[int]] = {}
    for rows in lines:
        heads = contexts[rows[0]].heads
        best = heads[0] if len(heads) == 1 else max(heads, key=saving)
        if best in chosen:
            chosen[best] += rows
        elif saving(best):
            chosen[best] = rows
    return [SharedHead(_whole_tiles(rows, tile), head.num_slots) for head, rows in chosen.items()]


def _lines(contexts: Sequence[Context]) -> Collection[list[int]]:
    """Return the rows that have heads, by the last of them: those of a list have the same."""
    lines: dict[int, list[int]] = {}
    for row, (num_tokens, _, _, heads) in enumerate(contexts):
        if num_tokens > 1:
            break
        if heads:
            lines.setdefault(heads[-1][0], []).append(row)
    return lines.values()


def _num_saved(num_rows: int, num_slots: int, tile: int) -> int:
    """Return the keys that are read less when a tile of rows reads them at once than when each row does."""
    return (num_rows + -num_rows // tile) * num_slots


def _whole_tiles(rows: list[int], tile: int) -> list[int]:
    """Leave out a row that would be alone in a tile, where tiles of equal sizes have two rows or one."""
    return rows[:-1] if tile == 2 and len(rows) % 2 else rows
