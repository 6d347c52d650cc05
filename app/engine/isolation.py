"""A failed step: its parts run again, in halves, until each failure stands alone.

Every slot is written before it is read, and choosing a token changes nothing, so a part that runs
twice comes to the same. Where no part can be told from the others (the device is gone, or the model
fails with any input), the error is raised as it was, and ends the engine.
"""

import logging
from collections.abc import Callable, Collection, Iterable, Sequence
from dataclasses import dataclass, field

import numpy as np

from app.engine.memory.exhaustion import forget_step, is_out_of_memory
from app.engine.plan import Plan, PlanItem, StepResult
from app.engine.prefixes import Key, Prefix
from app.engine.sampling.inputs import SamplingInput
from app.engine.sequence import Sequence as Row
from app.errors import PromptplexError, RequestFailed
from app.models.attention.kv_cache import PADDING_SLOT
from app.models.attention.metadata import PackedItem
from app.request import SamplingParams

REFUSAL_SECONDS = 30.0  # a prefix that failed isn't tried again for so long

Run = Callable[[Plan], StepResult]

_log = logging.getLogger("promptplex.engine")


def run_apart(run: Run, plan: Plan, error: Exception) -> tuple[StepResult, dict[int, Exception]]:
    """Run a plan that failed with `error` in parts; return what came of them, and the failures by id.

    Rows that stand on a prefix that failed don't run, and are not named. Raise `error` where the model
    doesn't work for anything else either.
    """
    parts = _Parts(run, plan)
    _log.error("a step failed; its parts are run one by one to find out why", exc_info=error)
    parts.blame(parts.ids(), error)
    if parts.failures and not works(run, plan, parts.failures.keys()):
        raise error
    return parts.result, parts.failures


@dataclass(slots=True)
class _Parts:
    """The parts of a plan that ran, and the ids that failed alone."""

    run: Run
    plan: Plan
    result: StepResult = field(default_factory=StepResult)
    failures: dict[int, Exception] = field(default_factory=dict)

    def ids(self) -> list[int]:
        """Return all ids: prefixes come before what stands on them."""
        items = sorted(self.plan.items, key=lambda item: len(item.stands_on))
        return list(dict.fromkeys([*(write.id for write in self.plan.writes), *(item.id for item in items)]))

    def blame(self, ids: Sequence[int], error: Exception) -> None:
        """Find out which of `ids` failed; they did so together."""
        forget_step(error)
        if len(ids) == 1:
            self.failures[ids[0]] = error
            return
        middle = len(ids) // 2
        self._try(ids[:middle])
        self._try(ids[middle:])

    def _try(self, ids: Sequence[int]) -> None:
        lost = {item.id for item in self.plan.items if not self.failures.keys().isdisjoint(item.stands_on)}
        ids = [id_ for id_ in ids if id_ not in lost]
        try:
            result = self.run(self.plan.part(set(ids)))
        except Exception as error:
            self.blame(ids, error)
        else:
            self.result.tokens.update(result.tokens)
            self.result.scores.update(result.scores)


class Refusals:
    """Prefixes that failed lately: one that fails must not cost all others a failed step each time."""

    def __init__(self) -> None:
        self._failed: dict[Key, tuple[float, PromptplexError]] = {}  # until when (time.monotonic)

    def add(self, key: Key, error: PromptplexError, now: float) -> None:
        """Refuse what stands on the prefix for `REFUSAL_SECONDS`."""
        self._failed = {key: entry for key, entry in self._failed.items() if now < entry[0]}
        self._failed[key] = (now + REFUSAL_SECONDS, error)

    def get(self, keys: Iterable[Key], now: float) -> PromptplexError | None:
        """Return why what stands on these prefixes is refused now, if it is."""
        found = (self._failed[key] for key in keys if key in self._failed)
        return next((error for until, error in found if now < until), None)


def works(run: Run, plan: Plan, failed: Collection[int] | None = None) -> bool:
    """Return whether the model still takes a token, in the place of one that failed or could not be tried.

    `failed` are ids of the plan; None: all. Where only prefixes failed that no token of the plan needs, the
    next step shows it.
    """
    tried = (
        item for item in plan.items if failed is None or not {item.id, *item.stands_on}.isdisjoint(failed)
    )
    item = next(tried, None)
    if item is None:
        return True
    # Its last slot: the first ones may be a prefix's that others share.
    slots = [group[-1:] for group in item.kv.slots]
    for source in plan.sources:
        if source.id == item.reads:  # and what its slots hold is anything
            num_own = len(slots) - len(source.kv.cross_slots)
            slots[num_own:] = [np.array([PADDING_SLOT])] * len(source.kv.cross_slots)
    sampling = SamplingInput(SamplingParams(), 0)
    token = PlanItem(0, PackedItem(0, 1, tuple(slots)), position=0, token_ids=(0,), sampling=(sampling,))
    try:
        return run(Plan(writes=(), items=(token,))).tokens[0][0].is_finite
    except Exception:
        _log.exception("the model does not take a single token any more")
        return False


def request_error(owner: Row | Prefix, error: Exception) -> PromptplexError:
    """Return what the callers of a sequence or prefix at fault may see of an error, and log it all."""
    _log.error("at fault: %s (%s)", _name(owner), type(error).__name__)
    if isinstance(error, PromptplexError):
        return error
    if is_out_of_memory(error):
        return RequestFailed(_memory_in_words(owner))
    if isinstance(owner, Prefix) and owner.is_kept:
        return RequestFailed(
            "the model can't run this task's prompt or leading text; requests that need it are refused for "
            f"{REFUSAL_SECONDS:.0f} seconds: roll the task back, or see the server's log"
        )
    return RequestFailed(
        "the model can't run this request; others are not affected: change its input or parameters, or see "
        "the server's log"
    )


def _memory_in_words(owner: Row | Prefix) -> str:
    operator = "the server's operator can make room with a lower --token-budget or --kv-cache-bytes"
    if isinstance(owner, Prefix) and owner.is_kept:
        return (
            "the server's memory doesn't hold a step with this task's prompt or leading text; requests that "
            f"need it are refused for {REFUSAL_SECONDS:.0f} seconds: try again then; {operator}"
        )
    return (
        "the server's memory doesn't hold a step with this request, even alone; others are not affected: "
        f"send less text, or ask for fewer scores or beams; {operator}"
    )


def _name(owner: Row | Prefix) -> str:
    if isinstance(owner, Prefix):
        return f"the resident prefix of prompt {owner.segment.prompt_digest or 'none'}"
    return f"request {owner.request.id} of task {owner.request.task or 'none (the base model)'}"
