"""Sources: what the encoder of an encoder-decoder read, as keys and values for cross-attention.

A source is encoded once, whole, in a step that also takes tokens of a sequence that reads it. All sequences
of a request (its samples, choices and beams) use the same one, for as long as one of them runs.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from functools import cached_property

from app.engine.blocks import KVBlocks, SlotTable
from app.engine.plan import new_id
from app.models.attention.kv_cache import Slots
from app.prompt import Prompt
from app.request import Request
from app.request import Source as Input
from app.sites import Site

SourceKey = tuple[Input, bytes]  # what is read, its id included, and the key of the last prefix before it


def source_key(request: Request, prefix_keys: Sequence[bytes]) -> SourceKey | None:
    """Return what tells a request's source from all others; None: it has none."""
    if request.source is None:
        return None
    before = prefix_keys[: request.num_kept_segments]
    return request.source, before[-1] if before else b""


@dataclass(eq=False)
class Source:
    """One source and whether it is encoded."""

    key: SourceKey
    input: Input
    table: SlotTable  # in cross-attention: slots of the prefixes before it, then its own
    end_slot: int  # the slot index after its last one
    prefix_slots: tuple[Slots, ...]  # of prefixes in the encoder's self-attention, per group; () without one
    prompt: Prompt | None  # the soft prompt of its first rows, until it is encoded
    is_encoded: bool = False  # or will be with the step that was planned last
    users: int = 1  # sequences that run on it
    id: int = field(default_factory=new_id)  # in Plans

    @cached_property
    def slots(self) -> tuple[Slots, ...]:
        """All slots that its readers see, per group of cross-attention."""
        return self.table.slots(self.end_slot)

    @property
    def own_slots(self) -> tuple[Slots, ...]:
        """The slots that its own rows are written to, per group of cross-attention."""
        return tuple(slots[len(slots) - self.input.num_slots :] for slots in self.slots)


class SourceTable:
    """The sources of all running sequences."""

    def __init__(self, blocks: KVBlocks) -> None:
        self._blocks = blocks
        self._sources: dict[SourceKey, Source] = {}

    def __len__(self) -> int:
        return len(self._sources)

    def __iter__(self) -> Iterator[Source]:
        return iter(self._sources.values())

    def get(self, key: SourceKey | None) -> Source | None:
        """Return the source of a key, encoded or not, if a running sequence uses it."""
        return None if key is None else self._sources.get(key)

    def create(
        self,
        key: SourceKey,
        given: Input,
        *,
        head: SlotTable | None,
        head_slots: int,
        prefix_slots: tuple[Slots, ...],
        prompt: Prompt | None,
    ) -> Source:
        """Start a source, used once, with blocks for all of it; the caller has made room.

        `head` has `head_slots` slots of prefixes that come before it in cross-attention.
        """
        table = SlotTable(self._blocks, head, head_slots, site=Site.DECODER_CROSS)
        end = head_slots + given.num_slots
        grown = table.grow(head_slots, end)
        assert grown, "callers make room before they create"
        source = Source(key, given, table, end, prefix_slots, prompt)
        self._sources[key] = source
        return source

    def let_go(self, source: Source) -> None:
        """Take back one use; with the last one its blocks are free."""
        assert source.users > 0
        source.users -= 1
        if not source.users:
            source.table.release()
            del self._sources[source.key]

    def check_integrity(self, used: Sequence[Source]) -> None:
        """Assert that uses and sources are conserved; `used`: the source of each running sequence."""
        users: dict[int, int] = {}
        for source in used:
            users[source.id] = users.get(source.id, 0) + 1
        assert users == {source.id: source.users for source in self}, "sources and their users differ"
        for key, source in self._sources.items():
            assert source.key == key
            assert source.table.end >= source.end_slot
            assert source.is_encoded or source.prompt is not None or not source.input.num_virtual_tokens
