"""The frozen decision of one step, and what came of it: ids, numbers and arrays, so that both pickle.

The scheduler knows which sequence or prefix an id stands for. Arrays of slots are never written again once
they are in a Plan.
"""

import itertools
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import NamedTuple

from app.engine.sampling.inputs import LogitsEdits, SampledToken, SamplingInput
from app.engine.sampling.token_masks import PackedMask
from app.models.attention.kv_cache import Slots
from app.models.attention.metadata import PackedItem, PackedSource
from app.prompt import Prompt
from app.request import TokenScore

new_id = itertools.count(1).__next__  # for sequences and prefixes; never used again


@dataclass(frozen=True, slots=True)
class SlotCopies:
    """Slots of one pool to copy in all layers of its groups, before anything else of the step."""

    pool: int
    sources: Slots  # [n]
    targets: Slots  # [n]


@dataclass(frozen=True, slots=True)
class PrefixWrite:
    """Keys and values to put at `slots` (per KV group) as they are, before the forward pass."""

    id: int
    prompt: Prompt
    slots: tuple[Slots, ...]


@dataclass(frozen=True, slots=True)
class SourceItem:
    """A source to run through the encoder, whole, before the decoder's tokens of the same step."""

    id: int
    kv: PackedSource
    token_ids: tuple[int, ...]
    soft_prompt: Prompt | None = None  # its encoder rows come before the ids


class PlanItem(NamedTuple):
    """Consecutive tokens of one sequence, or of a prefix under construction, to run through the model.

    Inputs are token ids, or rows of a soft prompt's embeddings, from `soft_from` on.
    """

    id: int
    kv: PackedItem  # where its keys and values go and what exists already
    position: int  # of the first token, as the model sees it
    token_ids: tuple[int, ...] = ()
    follows: bool = False  # its one token is what the step before chooses for this id; there are no token_ids
    soft_prompt: Prompt | None = None
    soft_from: int = 0
    sampling: tuple[
        SamplingInput, ...
    ] = ()  # the logits of its last tokens, of as many, choose the next ones
    score_from: int = 0  # its tokens from here on tell how probable `score_ids` are, which follow them
    score_ids: tuple[int, ...] = ()
    num_top: int = 0  # most probable tokens to report beside each of `score_ids`
    stands_on: tuple[int, ...] = ()  # ids of the prefixes that its tokens attend to
    reads: int | None = None  # the id of its source, which is encoded in this step or was before

    @property
    def has_late_input(self) -> bool:
        """Whether more is needed to choose its token: a grammar's mask, or edits after a token under way."""
        return bool(self.sampling) and (self.sampling[0].is_constrained or self.sampling[0].has_late_edits)


class LateInput(NamedTuple):
    """What choosing an item's token needs beside its SamplingInput, given after its forward pass."""

    mask: PackedMask | None = None  # of a constrained one; without it, the token is late
    edits: LogitsEdits | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step. Items of one token come first."""

    writes: tuple[PrefixWrite, ...]
    items: tuple[PlanItem, ...]
    sources: tuple[SourceItem, ...] = ()  # each is read by an item
    copies: tuple[SlotCopies, ...] = ()

    @property
    def is_empty(self) -> bool:
        """Whether there is nothing to do."""
        return not self.writes and not self.items

    @property
    def follows(self) -> bool:
        """Whether an item follows the step before."""
        return any(item.follows for item in self.items)

    def part(self, ids: Collection[int]) -> "Plan":
        """Return the writes and items of some ids, in this order, with the sources that they read.

        All copies stay: no item of a step writes what they read or wrote, so they come to the same again.
        """
        items = tuple(item for item in self.items if item.id in ids)
        read = {item.reads for item in items}
        return Plan(
            writes=tuple(write for write in self.writes if write.id in ids),
            items=items,
            sources=tuple(source for source in self.sources if source.id in read),
            copies=self.copies,
        )


@dataclass(frozen=True, slots=True)
class StepResult:
    """The next tokens of each sampling item, and the scores of each scoring one, by id."""

    tokens: dict[int, tuple[SampledToken, ...]] = field(default_factory=dict)
    scores: dict[int, tuple[TokenScore, ...]] = field(default_factory=dict)
