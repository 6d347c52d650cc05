"""The steps that take most memory, as Plans over a few slots, and what they take where they run.

Contexts name the same few slots again and again, so they can be as long as the model allows before there is
any memory for them. What comes of these steps means nothing.
"""

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial

import numpy as np

from app.engine.items import MAX_SCORED_ROWS
from app.engine.memory.device import Meter
from app.engine.plan import Plan, PlanItem, SourceItem
from app.engine.sampling.inputs import SamplingInput
from app.engine.sampling.state import SamplingState
from app.engine.scheduler import SchedulerConfig
from app.models.attention.kv_cache import KVCache, KVGroup, Slots
from app.models.attention.metadata import PackedItem, PackedSource
from app.models.backbone import Backbone
from app.prompt import ModelGeometry
from app.request import SamplingParams
from app.sites import Site

_NUM_SLOTS = 1024  # of the trial's K/V cache
_SHORT, _DEEP = 16, 4096  # slots that a row of one token sees
_LONGEST = 1 << 17  # that a chunk sees; beyond it steps take more only where attention is torch's
_NUM_TOP = 20
# Each filter sorts or copies all logits in float32.
_WIDEST = SamplingParams(
    do_sample=True,
    seed=0,
    temperature=0.9,
    top_h=0.9,
    top_k=1000,
    top_p=0.9,
    min_p=0.01,
    typical_p=0.9,
    epsilon_cutoff=1e-6,
    eta_cutoff=1e-6,
    repetition_penalty=1.1,
)


@dataclass(frozen=True, slots=True)
class StepPeaks:
    """Bytes that steps take beside the model and the K/V cache."""

    largest: int  # any step with short rows
    decode: int  # a step of as many rows of one token as run at once, which see `_DEEP` slots each
    per_slot: float  # more, for each slot that such rows see


def trial_cache(backbone: Backbone) -> KVCache:
    """Return a small cache, in which trial steps run; zeros, since they read what nothing wrote."""
    groups = backbone.kv_groups
    cache = KVCache(groups, [_NUM_SLOTS] * len(groups), dtype=backbone.dtype, device=backbone.device)
    for group in groups:
        for layer in group.layers:
            for pool in cache.pools((group.site, layer)):
                pool.zero_()
    return cache


def measure_steps(run: Callable[[Plan], object], meter: Meter, trials: "Trials") -> StepPeaks:
    """Run the trials; raise what a step raises, such as torch.OutOfMemoryError.

    The first pass through each doesn't count: kernels are compiled, and libraries take memory that stays.
    """
    largest, decode, deep = trials.largest(), trials.decode(_SHORT), trials.decode(_DEEP)
    for plan in (*largest, decode, deep):
        run(plan)
    shallow_bytes, deep_bytes = (meter.peak(partial(run, plan)) for plan in (decode, deep))
    num_slots = trials.num_seen(deep) - trials.num_seen(decode)
    return StepPeaks(
        max(meter.peak(partial(run, plan)) for plan in largest),
        max(shallow_bytes, deep_bytes),
        max(0, deep_bytes - shallow_bytes) / max(1, num_slots),
    )


@dataclass(frozen=True, slots=True)
class Trials:
    """Makes the steps of an engine's bounds over a base."""

    geometry: ModelGeometry
    groups: tuple[KVGroup, ...]
    bounds: SchedulerConfig
    max_slots: int  # that memory could hold, at most

    def largest(self) -> list[Plan]:
        """Return the candidates for the largest step: which one it is depends on the base.

        Logits for every token, some to be scored and the others to be drawn from in the widest way; one
        chunk after the longest context; the longest source, or as many as a step encodes.
        """
        rows = self._rows(_SHORT, 1 + self.bounds.speculate, _widest())
        plans = [_plan([*rows, *chunks]) for chunks in (self._scored(rows), self._longest(rows))]
        if self.geometry.has_encoder:
            plans.append(self._encoding())
        return plans

    def decode(self, num_seen: int) -> Plan:
        """Return a step of greedy rows of one token, which see so many slots each."""
        return _plan(self._rows(num_seen, 1, SamplingInput(SamplingParams(), 0)))

    @staticmethod
    def num_seen(plan: Plan) -> int:
        """Return the slots that a plan's items see, those of cross-attention left out."""
        return sum(item.kv.num_computed + item.kv.num_tokens for item in plan.items)

    def _rows(self, num_seen: int, num_tokens: int, sampling: SamplingInput) -> list[PlanItem]:
        """Return as many as run at once, as far as the budget goes: all chosen from."""
        num_tokens = min(num_tokens, self.bounds.token_budget // self.bounds.max_rows)
        return [
            self._item(id_, num_seen, num_tokens)._replace(sampling=(sampling,) * num_tokens)
            for id_ in range(self.bounds.max_rows)
        ]

    def _scored(self, rows: list[PlanItem]) -> list[PlanItem]:
        """Return chunks of which every token is scored, for the budget that rows leave."""
        chunks = self._chunks(rows, MAX_SCORED_ROWS, 0)
        return [chunk._replace(score_ids=(0,) * chunk.kv.num_tokens, num_top=_NUM_TOP) for chunk in chunks]

    def _longest(self, rows: list[PlanItem]) -> list[PlanItem]:
        """Return chunks after contexts as long as there may be, for the budget that rows leave."""
        longest = self.geometry.max_source_positions or _LONGEST  # decoders with an encoder write as much
        chunks = self._chunks(rows, self.bounds.token_budget, min(longest, self.max_slots))
        return [chunk._replace(sampling=(_widest(),)) for chunk in chunks]

    def _chunks(self, rows: list[PlanItem], most: int, num_seen: int) -> list[PlanItem]:
        most = min(most, self.geometry.max_positions)
        num_left = self.bounds.token_budget - sum(row.kv.num_tokens for row in rows)
        return [
            self._item(len(rows) + begin, num_seen, min(most, num_left - begin))
            for begin in range(0, num_left, most)
        ]

    def _item(self, id_: int, num_seen: int, num_tokens: int) -> PlanItem:
        """Return tokens that see up to `num_seen` slots before them, as far as the model allows."""
        num_computed = max(0, min(num_seen, self.geometry.max_positions - num_tokens))
        own = [_slots(num_computed + num_tokens)] * self._num_groups(Site.DECODER_SELF)
        cross = [_slots(self.geometry.max_source_positions)] * self._num_groups(Site.DECODER_CROSS)
        kv = PackedItem(num_computed, num_tokens, (*own, *cross))
        return PlanItem(id_, kv, position=num_computed, token_ids=(0,) * num_tokens)

    def _encoding(self) -> Plan:
        length = self.geometry.max_source_positions
        slots = (_slots(length),) * self._num_groups(Site.DECODER_CROSS)
        sources = [
            SourceItem(id_, PackedSource(length, slots), (0,) * length)
            for id_ in range(max(1, self.bounds.token_budget // length))
        ]
        rows = self._rows(_SHORT, 1, _widest())
        reading = [row._replace(reads=id_ % len(sources)) for id_, row in enumerate(rows)]
        read = sources[: len(reading)]
        return Plan(writes=(), items=tuple(reading), sources=tuple(read))

    def _num_groups(self, site: Site) -> int:
        return sum(group.site is site for group in self.groups)


def _plan(items: list[PlanItem]) -> Plan:
    """Items of one token come first."""
    return Plan(writes=(), items=tuple(sorted(items, key=lambda item: item.kv.num_tokens > 1)))


def _slots(count: int) -> Slots:
    """Return slots in turn, without the one that stays zero."""
    return 1 + np.arange(count, dtype=np.int64) % (_NUM_SLOTS - 1)


def _widest() -> SamplingInput:
    return SamplingState(_WIDEST, (0,), _NUM_TOP).input(0)
