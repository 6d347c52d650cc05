"""The frozen decision of one step, and what came of it."""

from dataclasses import dataclass, field

from app.engine.prefixes import Prefix
from app.engine.sampling.inputs import SampledToken, SamplingInput
from app.engine.sequence import Sequence
from app.models.attention.kv_cache import Slots
from app.models.attention.metadata import PackedItem
from app.prompt import Prompt
from app.request import TokenScore


@dataclass(frozen=True, slots=True)
class PrefixWrite:
    """Keys and values to put at `slots` (per KV group) as they are, before the forward pass."""

    prefix: Prefix
    prompt: Prompt
    slots: tuple[Slots, ...]


@dataclass(frozen=True, slots=True)
class PlanItem:
    """Consecutive tokens of one owner, taken through the model in this step.

    The owner is a sequence, or a prefix under construction. Inputs are token ids, or rows
    `num_computed .. num_computed + num_tokens` of a soft prompt's embeddings.
    """

    owner: Sequence | Prefix
    kv: PackedItem  # where its keys and values go and what exists already
    position: int  # of the first token, as the model sees it
    token_ids: tuple[int, ...] = ()
    soft_prompt: Prompt | None = None
    sampling: SamplingInput | None = None  # given: its last token's logits choose the next token
    score_from: int = 0  # its tokens from here on tell how probable `score_ids` are, which follow them
    score_ids: tuple[int, ...] = ()
    num_top: int = 0  # most probable tokens to report beside each of `score_ids`


@dataclass(frozen=True, slots=True, kw_only=True)
class Plan:
    """One step. Items of one token come first."""

    writes: tuple[PrefixWrite, ...]
    items: tuple[PlanItem, ...]

    @property
    def is_empty(self) -> bool:
        return not self.writes and not self.items


@dataclass(slots=True)
class PlanDraft:
    """A Plan in the making."""

    budget: int
    writes: list[PrefixWrite] = field(default_factory=list)
    items: list[PlanItem] = field(default_factory=list)

    def add(self, item: PlanItem) -> None:
        """Take an item's tokens from the budget."""
        self.items.append(item)
        self.budget -= item.kv.num_tokens

    def plan(self) -> Plan:
        """What it has become."""
        # Rows of like length stand together, since they share a bucket (attention/step.py).
        rows_first = sorted(self.items, key=lambda item: (item.kv.num_tokens > 1, item.kv.num_computed))
        return Plan(writes=tuple(self.writes), items=tuple(rows_first))


@dataclass(frozen=True, slots=True)
class StepResult:
    """Sampled tokens, in the order of the Plan's sampling items, and scores, in that of its scoring ones."""

    tokens: tuple[SampledToken, ...]
    scores: tuple[tuple[TokenScore, ...], ...] = ()
