"""A request's progress: mutable, owned by the engine's one thread."""

import enum
import time
from dataclasses import dataclass, field
from functools import cached_property
from itertools import chain

from app.engine.beams import BeamSearch
from app.engine.blocks import SlotTable
from app.engine.lookup import Lookup
from app.engine.plan import new_id
from app.engine.prefixes import Key, Prefix
from app.engine.sampling.inputs import SampledToken
from app.engine.sampling.state import SamplingState
from app.engine.sampling.token_masks import AsyncTokenMask
from app.engine.sources import Source, SourceKey, source_key
from app.models.attention.kv_cache import Slots
from app.models.attention.metadata import PackedItem
from app.prompt import Prompt
from app.request import FinishReason, Request, RequestTimings, TokenScore


class Phase(enum.Enum):
    """LOADING -> WAITING -> RUNNING -> FINISHED; preemption goes back to WAITING."""

    LOADING = enum.auto()  # parked until its prompts' bytes are here
    WAITING = enum.auto()  # in the fair queue; holds nothing on the device
    RUNNING = enum.auto()  # holds a pin and blocks
    FINISHED = enum.auto()


@dataclass(eq=False)
class BeamGroup:
    """A request in beam search: a sequence for each beam, which run, wait and end together."""

    search: BeamSearch
    leader: "Sequence"  # that the request came with; it alone waits in the queue
    rows: list["Sequence"]  # one for each beam, in the search's order
    results: dict[int, SampledToken] = field(default_factory=dict)  # that are known, by a row's id

    @property
    def num_missing(self) -> int:
        """Rows that it may get beside those that it has."""
        return self.search.num_beams - len(self.rows)


@dataclass(eq=False)
class Sequence:
    """One request on its way, or one of its beams. `tokens` are its own: the prompt's, then the generated."""

    request: Request
    prefix_keys: tuple[Key, ...] = ()  # one for each of the request's segments
    beams: BeamGroup | None = None  # that it is a row of
    tokens: list[int] = field(init=False)
    id: int = field(default_factory=new_id)  # in Plans
    phase: Phase = Phase.WAITING
    constraint: AsyncTokenMask | None = None  # kept through preemptions, as the tokens are
    awaited: set[str] = field(default_factory=set)  # digests of the prompts that it is parked for
    prompts: dict[str, Prompt] = field(default_factory=dict)  # by digest, between arrival and admission
    prefixes: tuple[Prefix, ...] = ()  # of its segments, pinned while running
    stands_on: tuple[int, ...] = ()  # their ids
    source: Source | None = None  # that its tokens attend to, in an encoder-decoder; used while running
    reads: int | None = None  # its id
    table: SlotTable | None = None
    cross_slots: tuple[Slots, ...] = ()  # of the source and the prefixes before it, per group
    num_generated: int = 0
    num_computed: int = 0  # own tokens whose keys and values exist, or will with the steps under way
    arrived: float = field(default_factory=time.monotonic)  # all times: time.monotonic() seconds
    admitted: float | None = None
    first_token: float | None = None
    last_token: float | None = None
    source_key: SourceKey | None = field(init=False)
    is_held: bool = field(init=False)  # what it has on the device stays after its end
    scores: list[TokenScore] = field(default_factory=list)  # as far as they are known
    latency: float = 0.0  # seconds that the last token took since the one before, or since arrival

    def __post_init__(self) -> None:
        request = self.request
        # Where only scores are wanted, the last token is looked up in the logits of the one before it.
        self.tokens = list(request.token_ids[:-1] if request.is_only_scored else request.token_ids)
        self.is_held = request.is_held and request.source is None and request.sampling.num_beams == 1
        self.source_key = source_key(self.request, self.prefix_keys)
        self._first_slot = self.request.num_prefix_slots
        self.party = self.request.tenant, self.request.task  # for fair share
        if self.beams is None and self.request.sampling.num_beams > 1 and self.request.max_new_tokens:
            self.beams = BeamGroup(BeamSearch(self.request), self, [self])

    @property
    def leader(self) -> "Sequence":
        """The sequence that the request came with."""
        return self if self.beams is None else self.beams.leader

    @property
    def rows(self) -> tuple["Sequence", ...]:
        """All sequences of the request that run, wait and end with it, itself included."""
        return (self,) if self.beams is None else tuple(self.beams.rows)

    @property
    def num_rows(self) -> int:
        """How many they may become."""
        return 1 if self.beams is None else self.beams.search.num_beams

    @cached_property
    def sampling(self) -> SamplingState:
        """Made for the first token, so that a sequence in the queue holds no arrays."""
        request = self.request
        beams = request.sampling.num_beams
        return SamplingState(
            request.sampling,
            request.prompt_ids,
            num_top=request.num_top,
            num_candidates=beams + len(request.stop_ids) if beams > 1 else 0,
            inputs=None if request.source is None else request.source.token_ids,
        )

    @cached_property
    def lookup(self) -> Lookup:
        """Made for the first guess, from all ids that the model has read."""
        source, segments = self.request.source, self.request.segments
        before = () if source is None else source.token_ids
        return Lookup(chain(before, *(segment.token_ids for segment in segments)))

    def kv(self, start: int, count: int) -> PackedItem:
        """Return where `count` tokens from slot index `start` on are written, and what they see."""
        assert self.table is not None
        heads = self.prefixes[-1].heads if self.prefixes else ()
        return PackedItem(start, count, self.table.slots(start + count) + self.cross_slots, heads)

    @property
    def transient_keys(self) -> tuple[Key, ...]:
        """Keys of the prefixes that only requests which run together share; a source's go with it."""
        return self.prefix_keys[self.request.num_kept_segments :] if self.request.source is None else ()

    @property
    def num_reusable(self) -> int:
        """Own tokens that may be there already: one has to be computed, and those before scored ones."""
        num_unscored = self.request.num_scored - len(self.scores)
        first_scored = len(self.request.token_ids) - num_unscored - 1 if num_unscored else len(self.tokens)
        return min(first_scored, len(self.tokens) - 1)

    @property
    def is_all_scored(self) -> bool:
        """Whether it has all scores, and nothing else is wanted of it."""
        return self.request.is_only_scored and len(self.scores) == self.request.num_scored

    @property
    def num_pending(self) -> int:
        """Own tokens that the next forward passes have to take; 1 for a decoding sequence.

        0 where the next one is under way; -1 where it is also taken through the model already.
        """
        return len(self.tokens) - self.num_computed

    @property
    def next_slot(self) -> int:
        """The slot index that its first pending token takes."""
        return self._first_slot + self.num_computed

    @property
    def pending_slots(self) -> tuple[int, int]:
        """Slot indices that the pending tokens, or the one under way, take: the first, and after the last."""
        return self.next_slot, self._first_slot + max(len(self.tokens), self.num_computed + 1)

    def go_back(self, slot: int) -> None:
        """Take its tokens from slot index `slot` on through the model again."""
        self.num_computed = slot - self._first_slot

    @property
    def is_decoding(self) -> bool:
        """One generated token is pending (as for the last token of a recomputation)."""
        return self.num_generated > 0 and len(self.tokens) - self.num_computed == 1

    @property
    def goes_on(self) -> bool:
        """Whether the token under way will be taken through the model, unless it ends the answer."""
        return (
            self.phase is Phase.RUNNING
            and self.num_computed == len(self.tokens)
            and self.num_generated + 1 < self.request.max_new_tokens
            and self.beams is None  # it is not known which of them go on
        )

    @property
    def first_position(self) -> int:
        """The position that the model sees for the first own token."""
        return self.prefixes[-1].end_position if self.prefixes else 0

    def accept(self, token_id: int, now: float) -> FinishReason | None:
        """Append a sampled token; return why the sequence ends with it, if it does."""
        self.tokens.append(token_id)
        self.num_generated += 1
        self.sampling.accept(token_id)
        self.latency = now - (self.last_token or self.arrived)
        self.first_token = self.first_token or now
        self.last_token = now
        if token_id in self.request.stop_ids:
            return FinishReason.EOS
        if self.num_generated >= self.request.max_new_tokens:
            return FinishReason.LENGTH
        if self.constraint is not None:
            self.constraint.accept(token_id)
        return None

    def timings(self, now: float) -> RequestTimings:
        admitted = self.admitted or now
        first_token = self.first_token or now
        return RequestTimings(
            queue=admitted - self.arrived, prefill=first_token - admitted, decode=now - first_token
        )
