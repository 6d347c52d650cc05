"""Executes a Plan; the only code that touches the device.

T tokens of a step, d embedding width.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from itertools import accumulate, islice
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from app.engine.graphs.capture import Capture
from app.engine.graphs.decode_graphs import DecodeGraphs, Replayed, is_decode
from app.engine.graphs.decode_inputs import Followed
from app.engine.graphs.recording import Progress, record_decode_steps
from app.engine.plan import LateInput, Plan, PlanItem, SourceItem, StepResult
from app.engine.sampling.inputs import Sampled, SampledToken, SamplingInput
from app.engine.sampling.native_sampler import native_sampler
from app.engine.sampling.sampler import sample, score_tokens
from app.models.attention.kv_cache import KVCache
from app.models.backbone import Backbone
from app.models.cpu.openmp import without_workers
from app.models.transfer import to_device
from app.request import TokenScore
from app.sites import Embedding

# Products of a parameter and a token in a step that is left to one thread: 19 tokens of a base of 3.4 million
# parameters. 16 rows of it took 1.29 ms on one core and 1.54 on two; one row 0.63 and 0.94. Of a lone request
# the prompt as well: workers that were woken for it would spin through the answer.
_SHARED_PRODUCTS, _LONE_PRODUCTS = 1 << 26, 1 << 28

LateInputs = Callable[[], Mapping[int, LateInput]]  # by id


@dataclass(frozen=True, slots=True)
class Launched:
    """A plan that the device works on, or has done."""

    items: Sequence[PlanItem] = ()
    sampled: Sampled | None = None
    scores: Callable[[], dict[int, tuple[TokenScore, ...]]] = dict  # by id; waits for the device
    is_done: bool = True  # the device has nothing of it left to do; a GPU may

    def result(self) -> StepResult:
        """Wait for the device, and return what came of the plan. Raise what failed there."""
        tokens = {} if self.sampled is None else _by_item(self.items, self.sampled.tokens())
        return StepResult(tokens, self.scores())


class _Chosen(NamedTuple):
    """What a plan's items chose, of which nothing else stays for the next plan."""

    items: Sequence[PlanItem]
    ids: Tensor  # [N], on the device

    def rows(self) -> dict[int, int]:
        """Return where the next token of each item is among `ids`, by its id."""
        ends = accumulate(len(item.sampling) for item in self.items)
        return {item.id: end - 1 for item, end in zip(self.items, ends, strict=True) if item.sampling}


class Runner:
    """One base model and its K/V memory."""

    def __init__(self, backbone: Backbone, cache: KVCache) -> None:
        self._backbone = backbone
        self._cache = cache
        if backbone.device.type == "cpu":
            native_sampler()  # compiled and compared now, not in the first step
        self._chosen: _Chosen | None = None  # by the last plan; None: nothing, or it failed
        self._graphs: DecodeGraphs | None = None

    def record_graphs(self, *, max_rows: int, capture: Capture, progress: Progress) -> None:
        """Record decode steps of up to `max_rows` rows, where they can be; no plan has been run yet."""
        with self._on_device():
            self._graphs = record_decode_steps(
                self._backbone, self._cache, max_rows=max_rows, capture=capture, progress=progress
            )

    def run(self, plan: Plan, late: LateInputs) -> Launched:
        """Copy slots, write given prefixes, run sources and items as packed rows, choose next tokens.

        A CPU has done it all at the return; a GPU works on.

        `late` is called after the forward pass, where items have late inputs; without a mask, a row is late.
        """
        followed, self._chosen = self._followed(plan), None
        with without_workers() if self._is_small(plan) else self._on_device():
            launched = self._run(plan, late, followed)
        if launched.sampled is not None:
            self._chosen = _Chosen(launched.items, launched.sampled.ids)
        return launched

    def _on_device(self) -> AbstractContextManager[object]:
        """Make a GPU current in this thread: events, streams and kernels without tensors go there."""
        device = self._backbone.device
        return torch.cuda.device(device) if device.type == "cuda" else nullcontext()

    def _is_small(self, plan: Plan) -> bool:
        """Return whether one thread of a CPU runs a step as fast as several, or nearly so."""
        if self._backbone.device.type != "cpu" or plan.sources:
            return False
        limit = _LONE_PRODUCTS if len(plan.items) == 1 else _SHARED_PRODUCTS
        return self._backbone.num_parameters * sum(item.kv.num_tokens for item in plan.items) <= limit

    @torch.inference_mode()
    def _run(self, plan: Plan, late: LateInputs, followed: Followed | None) -> Launched:
        for copies in plan.copies:
            self._cache.copy(copies.pool, self._to_device(copies.sources), self._to_device(copies.targets))
        for write in plan.writes:
            slots = tuple(self._to_device(group) for group in write.slots)
            self._backbone.write_prefix(write.prompt, self._cache, slots)
        if not plan.items:
            return Launched()
        if self._graphs is not None and is_decode(plan):
            replayed = self._graphs.replay(plan.items, followed)
            if replayed is not None:
                chosen = _sample_replayed(replayed, plan.items, late)
                return Launched(plan.items, chosen, is_done=self._is_done)
        return self._run_eagerly(plan, late, followed)

    @property
    def _is_done(self) -> bool:
        """Whether the device has done what was launched."""
        return self._backbone.device.type == "cpu"

    def _run_eagerly(self, plan: Plan, late: LateInputs, followed: Followed | None) -> Launched:
        ends = [*accumulate(item.kv.num_tokens for item in plan.items)]
        sampled, scored = _sampled_rows(plan.items, ends), _scored_rows(plan.items, ends)
        # Some architectures take an empty selection for "all rows", so one row is always asked for.
        rows = np.array([*sampled, *scored] or [0], dtype=np.int64)
        sources = [source.kv for source in plan.sources]
        metadata = self._backbone.plan(self._cache, [item.kv for item in plan.items], rows, sources)
        embeds, positions = self._embeds(plan.items, ends, followed), self._positions(plan.items, ends)
        source_embeds = self._source_embeds(plan.sources) if sources else None
        logits = self._backbone.forward(embeds, positions, metadata, source_embeds)
        chosen = _sample(logits[: len(sampled)], plan.items, late) if sampled else None
        scores = _scores(logits[len(sampled) :], plan.items) if scored else dict
        return Launched(plan.items, chosen, scores, self._is_done)

    def _embeds(self, items: Sequence[PlanItem], ends: Sequence[int], followed: Followed | None) -> Tensor:
        """Return input embeddings `[T, d]`: of token ids, or a soft prompt's own rows."""
        embeds = self._backbone.embed(self._token_ids(items, ends, followed))
        for item, end in zip(items, ends, strict=True):
            if item.soft_prompt is not None:
                rows = self._backbone.prompt_embeddings(item.soft_prompt)
                first = item.soft_from
                embeds[end - item.kv.num_tokens : end] = rows[first : first + item.kv.num_tokens]
        return embeds

    def _token_ids(self, items: Sequence[PlanItem], ends: Sequence[int], followed: Followed | None) -> Tensor:
        """Return the ids `[T]`; where there are none, 0, or what the step before chose."""
        ids = [token for item in items for token in item.token_ids or (0,) * item.kv.num_tokens]
        on_device = self._to_device(np.array(ids))
        if followed is not None:
            places = [
                (end - 1, followed.rows[item.id])
                for item, end in zip(items, ends, strict=True)
                if item.follows
            ]
            targets, chosen = np.array(places).T.copy()
            on_device[self._to_device(targets)] = followed.ids[self._to_device(chosen)]
        return on_device

    def _followed(self, plan: Plan) -> Followed | None:
        if not plan.follows:
            return None
        assert self._chosen is not None, "an item follows one that chose a token"
        return Followed(self._chosen.ids, self._chosen.rows())

    def _source_embeds(self, sources: Sequence[SourceItem]) -> Tensor:
        """Return the encoder's input embeddings `[S, d]`: of each source soft prompt rows, then ids."""
        parts = []
        for source in sources:
            if source.soft_prompt is not None:
                parts.append(self._backbone.prompt_embeddings(source.soft_prompt, Embedding.ENCODER))
            ids = self._to_device(np.array(source.token_ids, dtype=np.int64))
            follows = source.soft_prompt is not None
            parts.append(self._backbone.embed_source(ids, follows_soft_prompt=follows))
        return torch.cat(parts)

    def _positions(self, items: Sequence[PlanItem], ends: Sequence[int]) -> Tensor:
        positions = np.array([item.position for item in items])
        if len(items) < ends[-1]:
            counts = np.array([item.kv.num_tokens for item in items])
            positions = np.repeat(positions - ends + counts, counts) + np.arange(ends[-1])
        return self._to_device(positions)

    def _to_device(self, values: np.ndarray[tuple[int], np.dtype[np.int64]]) -> Tensor:
        return to_device(values, self._backbone.device)


def _sampled_rows(items: Sequence[PlanItem], ends: Sequence[int]) -> list[int]:
    """Return the rows of the packed step at which a token is chosen: some of each item's last ones."""
    return [
        row for item, end in zip(items, ends, strict=True) for row in range(end - len(item.sampling), end)
    ]


def _scored_rows(items: Sequence[PlanItem], ends: Sequence[int]) -> list[int]:
    """Return the rows at which the token after them is scored."""
    return [
        end - item.kv.num_tokens + item.score_from + index
        for item, end in zip(items, ends, strict=True)
        if item.score_ids
        for index in range(len(item.score_ids))
    ]


def _sample_replayed(replayed: Replayed, items: Sequence[PlanItem], late: LateInputs) -> Sampled:
    if all(item.sampling[0].is_bare_greedy for item in items):
        return replayed.choose()
    return _sample(replayed.logits, items, late)


def _sample(logits: Tensor, items: Sequence[PlanItem], late: LateInputs) -> Sampled:
    inputs = [row for item in items for row in item.sampling]
    if not any(item.has_late_input for item in items):
        return sample(logits, inputs, {})
    given, nothing = late(), LateInput()
    by_row = [given.get(item.id, nothing) for item in items for _ in item.sampling]
    masks = {row: each.mask for row, each in enumerate(by_row) if each.mask is not None}
    return sample(logits, [*map(_complete, inputs, by_row)], masks)


def _complete(row: SamplingInput, late: LateInput) -> SamplingInput:
    return row._replace(edits=late.edits) if row.has_late_edits else row


def _by_item(
    items: Sequence[PlanItem], tokens: Sequence[SampledToken]
) -> dict[int, tuple[SampledToken, ...]]:
    left = iter(tokens)
    return {item.id: tuple(islice(left, len(item.sampling))) for item in items if item.sampling}


def _scores(logits: Tensor, items: Sequence[PlanItem]) -> Callable[[], dict[int, tuple[TokenScore, ...]]]:
    waiting, begin = {}, 0
    for item in items:
        if item.score_ids:
            rows = logits[begin : begin + len(item.score_ids)]
            waiting[item.id] = score_tokens(rows, item.score_ids, item.num_top)
            begin += len(item.score_ids)
    return lambda: {id_: scores() for id_, scores in waiting.items()}
