"""Whose fault a failed step was: its parts are run again until the failure stands alone.

Every slot is written before it is read, and choosing a token changes nothing, so a part that runs
twice comes to the same. What can't be told apart (the device is gone, or the model fails whatever
it is given) is raised as it was, and ends the engine.
"""

import logging
import traceback
from collections.abc import Collection, Sequence
from dataclasses import dataclass, field

from app.engine.plan import Plan, PlanItem, StepResult
from app.engine.prefixes import Prefix, PrefixKey
from app.engine.runner import Runner
from app.engine.sampling.inputs import SampledToken, SamplingInput
from app.engine.sequence import Sequence as Row
from app.errors import PromptplexError, RequestFailed
from app.models.attention.metadata import PackedItem
from app.request import SamplingParams, TokenScore

REFUSAL_SECONDS = 30.0  # a prefix that failed isn't tried again for so long

Owner = Row | Prefix

_log = logging.getLogger("promptplex.engine")


@dataclass(frozen=True, slots=True)
class Outcome:
    """What came of a step in parts."""

    plan: Plan  # the items that ran
    result: StepResult
    failures: dict[Owner, PromptplexError]  # rows that stand on a failed prefix are not named


def run_apart(runner: Runner, plan: Plan, error: Exception) -> Outcome:
    """Run a plan that failed with `error` in parts, a failing one halved until one owner is left.

    Raises `error` where the model doesn't work for anything else either.
    """
    parts = _Parts(runner, plan)
    _log.error("a step failed; its parts are run one by one to find out why", exc_info=error)
    owners = dict.fromkeys([*(write.prefix for write in plan.writes), *(item.owner for item in plan.items)])
    parts.blame(sorted(owners, key=lambda owner: isinstance(owner, Row)), error)  # prefixes first
    if parts.failures and not _works(runner, plan, next(iter(parts.failures))):
        raise error
    for owner, cause in parts.failures.items():
        _log.error("at fault: %s (%s)", _name(owner), type(cause).__name__)
    return parts.outcome()


@dataclass(slots=True)
class _Parts:
    """The parts of a plan that ran, and the owners that failed alone."""

    runner: Runner
    plan: Plan
    tokens: dict[Owner, SampledToken] = field(default_factory=dict)
    scores: dict[Owner, tuple[TokenScore, ...]] = field(default_factory=dict)
    done: set[Owner] = field(default_factory=set)
    failures: dict[Owner, Exception] = field(default_factory=dict)

    def blame(self, owners: Sequence[Owner], error: Exception) -> None:
        """`owners` failed together: find out which of them did."""
        traceback.clear_frames(error.__traceback__)  # the step's tensors: there may be no room beside them
        if len(owners) == 1:
            self.failures[owners[0]] = error
            return
        middle = len(owners) // 2
        self._try(owners[:middle])
        self._try(owners[middle:])

    def _try(self, owners: Sequence[Owner]) -> None:
        owners = [owner for owner in owners if not (isinstance(owner, Row) and owner.prefix in self.failures)]
        part = _part(self.plan, owners)
        try:
            result = self.runner.run(part)
        except Exception as error:
            self.blame(owners, error)
        else:
            self._keep(owners, part, result)

    def _keep(self, owners: Sequence[Owner], part: Plan, result: StepResult) -> None:
        self.done.update(owners)
        sampling = (item.owner for item in part.items if item.sampling is not None)
        self.tokens.update(zip(sampling, result.tokens, strict=True))
        scoring = (item.owner for item in part.items if item.score_ids)
        self.scores.update(zip(scoring, result.scores, strict=True))

    def outcome(self) -> Outcome:
        """As if only what ran had been planned."""
        ran = _part(self.plan, self.done)
        tokens = tuple(self.tokens[item.owner] for item in ran.items if item.sampling is not None)
        scores = tuple(self.scores[item.owner] for item in ran.items if item.score_ids)
        failures = {owner: _typed(owner, error) for owner, error in self.failures.items()}
        return Outcome(ran, StepResult(tokens, scores), failures)


class Refusals:
    """Prefixes that failed lately: one that fails must not cost everybody a failed step each time."""

    def __init__(self) -> None:
        self._failed: dict[PrefixKey, tuple[float, PromptplexError]] = {}  # until when (time.monotonic)

    def add(self, key: PrefixKey, error: PromptplexError, now: float) -> None:
        """Refuse what stands on the prefix for `REFUSAL_SECONDS`."""
        self._failed = {key: entry for key, entry in self._failed.items() if now < entry[0]}
        self._failed[key] = (now + REFUSAL_SECONDS, error)

    def get(self, key: PrefixKey | None, now: float) -> PromptplexError | None:
        """Why what stands on the prefix is refused now, if it is."""
        until, error = self._failed.get(key, (now, None)) if key is not None else (now, None)
        return error if now < until else None


def _part(plan: Plan, owners: Collection[Owner]) -> Plan:
    """The plan's part that belongs to `owners`, in its order."""
    kept = set(owners)
    return Plan(
        writes=tuple(write for write in plan.writes if write.prefix in kept),
        items=tuple(item for item in plan.items if item.owner in kept),
    )


def _works(runner: Runner, plan: Plan, owner: Owner) -> bool:
    """Whether the model still takes a token, in the place of what failed."""
    part = _part(plan, [owner])
    slots = part.items[0].kv.slots if part.items else part.writes[0].slots
    own_slot = tuple(group[-1:] for group in slots)  # the first ones may be a prefix's that others share
    sampling = SamplingInput(SamplingParams(), 0)
    item = PlanItem(owner, PackedItem(0, 1, own_slot), position=0, token_ids=(0,), sampling=sampling)
    try:
        return runner.run(Plan(writes=(), items=(item,))).tokens[0].is_finite
    except Exception:
        _log.exception("the model does not take a single token any more")
        return False


def _typed(owner: Owner, error: Exception) -> PromptplexError:
    """What the caller may see of an error."""
    if isinstance(error, PromptplexError):
        return error
    if isinstance(owner, Prefix):
        return RequestFailed(
            "the model can't run this task's prompt or leading text; requests that need it are refused for "
            f"{REFUSAL_SECONDS:.0f} seconds: roll the task back, or see the server's log"
        )
    return RequestFailed(
        "the model can't run this request; others are not affected: change its input or parameters, or see "
        "the server's log"
    )


def _name(owner: Owner) -> str:
    if isinstance(owner, Prefix):
        return f"the resident prefix of prompt {owner.key.prompt_digest or 'none'}"
    return f"request {owner.request.id} of task {owner.request.task or 'none (the base model)'}"
