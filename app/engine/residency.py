"""What running sequences hold in K/V memory: prefixes that they share, a source, and blocks of their own."""

from app.engine.blocks import Counts, KVBlocks, SlotTable
from app.engine.held import HeldSequences
from app.engine.prefixes import Prefix, PrefixCache
from app.engine.sequence import Sequence
from app.engine.sources import Source, SourceTable
from app.engine.step import StepCounts
from app.errors import RequestTooLong
from app.request import Request
from app.request import Source as Input
from app.sites import Site


class Residency:
    """All that is on the device; a sequence gets all that it needs or nothing."""

    def __init__(self, blocks: KVBlocks) -> None:
        self.blocks = blocks
        self.prefixes = PrefixCache(blocks)
        self.sources = SourceTable(blocks)
        self.held = HeldSequences(self.prefixes)

    def check_fits(self, request: Request) -> None:
        """Refuse a request that could not run even alone.

        Raises:
            RequestTooLong: Its keys and values exceed all blocks there are.
        """
        needed = self.blocks.blocks_for(len(request.token_ids) + request.max_new_tokens)
        needed *= request.sampling.num_beams
        for segment in request.segments:
            needed += self.prefixes.blocks_for(segment)
        if request.source is not None:
            needed += self._blocks_of_source(request.source)
        # No argmax of numpy's: it gives up the GIL, and the device's thread may keep it for a step.
        pairs = zip(needed.tolist(), self.blocks.capacity.tolist(), strict=True)
        asked, limit = (
            count * self.blocks.block_size for count in max(pairs, key=lambda pair: pair[0] - pair[1])
        )
        if asked > limit:
            beams = request.sampling.num_beams
            source = "" if request.source is None else f"source {request.source.num_slots}, "
            times, remedy = (f", each for {beams} beams", "beams or new") if beams > 1 else ("", "new")
            raise RequestTooLong(
                f"the request needs {asked} K/V slots (prefix {request.num_prefix_slots}, {source}prompt "
                f"{len(request.token_ids)}, new {request.max_new_tokens}{times}), but the server has "
                f"{limit}; ask for fewer {remedy} tokens or give the server more K/V memory",
                param="max_new_tokens",
                limit=limit,
                asked=f"{asked} tokens",
            )

    def missing_prompts(self, sequence: Sequence) -> set[str]:
        """Return the digests of the prompts that it needs the bytes of, and hasn't got."""
        request, prompts = sequence.request, sequence.prompts
        missing = {
            segment.prompt_digest
            for key, segment in zip(sequence.prefix_keys, request.segments, strict=True)
            if segment.prompt_digest not in prompts and self.prefixes.get(key) is None
        }
        if request.source is not None and self.sources.get(sequence.source_key) is None:
            missing |= {request.source.prompt_digest} - prompts.keys()
        return {digest for digest in missing if digest is not None} if missing else set()

    def place(self, sequence: Sequence, num_spare: int, counts: StepCounts) -> bool:
        """Give a sequence, and all rows of its beams, prefixes, a source and blocks for all tokens.

        Return False, with nothing given, where they don't suffice or `num_spare` more wouldn't stay free.
        """
        segments = sequence.request.segments
        found = [prefix for key in sequence.prefix_keys if (prefix := self.prefixes.get(key)) is not None]
        num_spare += sequence.num_rows - len(sequence.rows)
        needed = num_spare * self.blocks.blocks_for(1)
        if sequence.request.continues is not None:
            self._continue(sequence)
        for row in sequence.rows:
            needed += self._blocks_of_row(row)
        for segment in segments[len(found) :]:
            needed += self.prefixes.blocks_for(segment)
        source = sequence.request.source
        if source is not None and self.sources.get(sequence.source_key) is None:
            needed += self._blocks_of_source(source)
        self.prefixes.pin(found)  # before anything is evicted
        if not self.make_room(needed):
            self.prefixes.unpin(found)
            self._drop_fork(sequence)
            return False
        if sequence.num_computed:
            self.held.lend(sequence.request.continues)
            counts.reused_tokens += sequence.num_computed
        if len(found) < len(segments):
            counts.prefix_misses += 1
        elif segments:
            counts.prefix_hits += 1
        self._give(sequence, found)
        return True

    def make_room(self, num_free: Counts) -> bool:
        """Evict held sequences, then idle prefixes, until `num_free` blocks of each pool are free.

        Return False where that isn't enough.
        """
        while len(self.held) and (self.blocks.num_free < num_free).any() and self.held.evict():
            pass
        return self.prefixes.evict_until(num_free)

    def aligned(self, request: Request) -> Request:
        """Return a request with segments cut as those of what it continues, where that can be run."""
        held = self.held.get(request.continues)
        if held is None:
            return request
        found = held.aligned(request)
        try:
            self.check_fits(found)
        except RequestTooLong:  # by a block that ends where the segments do
            return request
        return found

    def fork(self, parent: Sequence, row: Sequence) -> None:
        """Let a row of beam search go on from its parent's slots, in place of its own."""
        assert parent.table is not None
        if row.table is None:
            self._join(row, parent)
        else:
            row.table.release()
        row.table = parent.table.fork()

    def vacate(self, sequence: Sequence, *, is_done: bool = False) -> None:
        """Take everything back; of one that `is_done`, what is to be held stays."""
        assert sequence.table is not None
        if is_done and sequence.is_held and sequence.num_computed:
            self.held.add(sequence)
        else:
            sequence.table.release()
            self.prefixes.unpin(sequence.prefixes)
        sequence.table = None
        sequence.prefixes = sequence.stands_on = ()
        if sequence.source is not None:
            self.sources.let_go(sequence.source)
            sequence.source = sequence.reads = None
            sequence.cross_slots = ()

    def check_integrity(self, running: list[Sequence]) -> None:
        """Assert that blocks, slots, pins and users are conserved."""
        tables = [table for prefix in self.prefixes for table in prefix.tables.values()]
        tables += [source.table for source in self.sources]
        tables += [sequence.table for sequence in running if sequence.table is not None]
        tables += [held.table for held in self.held]
        self.blocks.check_integrity(tables)
        self.prefixes.check_integrity([each.prefixes for each in (*running, *self.held)])
        self.sources.check_integrity([each.source for each in running if each.source is not None])

    def _blocks_of_source(self, source: Input) -> Counts:
        return self.blocks.blocks_for(source.num_slots, Site.DECODER_CROSS)

    def _give(self, sequence: Sequence, line: list[Prefix]) -> None:
        """Complete the line of prefixes that a sequence stands on, and begin its own table."""
        num_kept = sequence.request.num_kept_segments
        self._extend(sequence, line, num_kept)
        sequence.source = source = self._source(sequence, line[:num_kept])
        if source is not None:
            sequence.reads, sequence.cross_slots = source.id, source.slots
        self._extend(sequence, line, len(sequence.prefix_keys))
        sequence.prompts.clear()  # prefixes and source have them now, for as long as they are needed
        sequence.prefixes = tuple(line)
        sequence.stands_on = tuple(prefix.id for prefix in line)
        for row in sequence.rows:
            if row is not sequence:
                self._join(row, sequence)
            if row.table is None:
                first_slot, _ = row.pending_slots
                row.table = SlotTable(self.blocks, line[-1].table if line else None, first_slot)
            grown = row.table.grow(*row.pending_slots)
            assert grown, "blocks were counted before"

    def _continue(self, sequence: Sequence) -> None:
        """Let a sequence begin on a fork of what it continues, as far as that is held and the same."""
        held = self.held.get(sequence.request.continues)
        num_shared = 0 if held is None else held.num_shared(sequence)
        if held is not None and num_shared:
            sequence.table = held.table.fork_before(sequence.request.num_prefix_slots + num_shared)
            sequence.num_computed = 0 if sequence.table is None else num_shared

    @staticmethod
    def _drop_fork(sequence: Sequence) -> None:
        if sequence.table is not None:
            sequence.table.release()
            sequence.table, sequence.num_computed = None, 0

    def _blocks_of_row(self, row: Sequence) -> Counts:
        """Return the blocks that all its tokens take beside those of a fork."""
        return (
            self.blocks.blocks_for(len(row.tokens))
            if row.table is None
            else row.table.missing_blocks(*row.pending_slots)
        )

    def _join(self, row: Sequence, other: Sequence) -> None:
        """Let a row of beam search stand on what another one of its group stands on."""
        self.prefixes.pin(other.prefixes)
        row.prefixes, row.stands_on = other.prefixes, other.stands_on
        row.source, row.reads, row.cross_slots = other.source, other.reads, other.cross_slots
        if row.source is not None:
            row.source.users += 1

    def _extend(self, sequence: Sequence, line: list[Prefix], length: int) -> None:
        for number in range(len(line), length):
            segment = sequence.request.segments[number]
            prompt = sequence.prompts.get(segment.prompt_digest or "")
            parent = line[-1] if line else None
            source = None if segment.is_kept else sequence.source
            line.append(self.prefixes.create(sequence.prefix_keys[number], segment, parent, prompt, source))

    def _source(self, sequence: Sequence, before: list[Prefix]) -> Source | None:
        """Return the source that a sequence reads: one that others run on, or a new one."""
        key, given = sequence.source_key, sequence.request.source
        if key is None or given is None:
            return None
        source = self.sources.get(key)
        if source is not None:
            source.users += 1
            return source
        last = before[-1] if before else None
        is_prefixed = last is not None and last.end_slots[Site.ENCODER_SELF]
        return self.sources.create(
            key,
            given,
            head=None if last is None else last.tables[Site.DECODER_CROSS],
            head_slots=0 if last is None else last.end_slots[Site.DECODER_CROSS],
            prefix_slots=last.slots(Site.ENCODER_SELF) if last is not None and is_prefixed else (),
            prompt=sequence.prompts.get(given.prompt_digest or ""),
        )
