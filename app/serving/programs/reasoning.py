"""Reasoning: the answer stands behind a marker, and steps before it; thinking may have a budget.

A sequence goes on past a marker that the model writes. Where something changes, the answer goes on in
another sequence, the prompt of which is all that was read and written so far: at the budget, where the marker
is put in, and behind the marker, where a grammar holds the answer. What the engine generated meanwhile is
dropped, so that the place of the change doesn't depend on when it was noticed. The other sequence is a
request that clients can send too: its draws, its penalties of generated tokens and its grammar begin anew.

A marker that is put in is not generated: it has no log-probability, and max_new_tokens doesn't count it. Stop
strings end the answer and are text before it; EOS and stop ids end all.
"""

from collections.abc import AsyncGenerator, Mapping, Sequence
from dataclasses import replace
from typing import get_args

from app.request import FinishReason, Request, SamplingParams, TokenDelta
from app.serving.admitted import Admitted
from app.serving.generation_request import TextDelta
from app.serving.parameters import GenerationParameters
from app.serving.program_settings import Effort, ReasoningSettings
from app.serving.programs.split_output import SplitOutput
from app.serving.session import Session
from app.text.detokenizer import Detokenizer
from app.text.marked_text import MarkedText, Piece

_EFFORTS: tuple[Effort, ...] = get_args(Effort)
_TAIL = 16  # characters before a marker that is put in, which decide about its first token


def reasoned(
    session: Session, admitted: Admitted, settings: ReasoningSettings
) -> AsyncGenerator[TextDelta, None]:
    """Yield steps and answer; the result has the steps apart. Raise what `Session.generate` raises."""
    output = ReasonedOutput(session, admitted, settings)
    return session.generate(admitted, output, output.first)


def budget_of(settings: ReasoningSettings, parameters: GenerationParameters) -> int | None:
    """Return how many tokens may come before the marker is put in; None: no bound."""
    budget, effort = parameters.thinking_token_budget, parameters.reasoning_effort
    if budget is None and effort is not None:
        return budget_by_effort(settings.effort, effort)
    return None if budget == -1 else budget


def budget_by_effort(budgets: Mapping[Effort, int], effort: Effort) -> int | None:
    """Return the effort's budget, else that of the next lower one, else of the next higher; None: no bound.

    No effort at all is a budget of 0, unless there is another one for it, and is next to no other effort.
    """
    if effort == "none":
        return budgets.get(effort, 0)
    known = [each for each in _EFFORTS[1:] if each in budgets]
    lower = [each for each in known if _EFFORTS.index(each) <= _EFFORTS.index(effort)]
    nearest = lower[-1:] or known[:1]
    return budgets[nearest[0]] if nearest else None


class ReasonedOutput(SplitOutput):
    """Reads steps and an answer, in one sequence or in two; `first` is the one that it begins in."""

    def __init__(self, session: Session, admitted: Admitted, settings: ReasoningSettings) -> None:
        parameters = admitted.parameters
        marked = MarkedText(
            settings.answer_after,
            settings.steps_end,
            parameters.stop,
            shows_stop=parameters.include_stop_str_in_output,
        )
        literal_ids = session.ids_after("", settings.answer_after + (settings.steps_end or ""))
        super().__init__(session, admitted, marked, literal_ids=frozenset(literal_ids))
        self._session = session
        self._settings = settings
        self._request = admitted.request
        self._budget = budget_of(settings, parameters)
        self._put_in = ""  # text that the model didn't write, up to the marker's end
        self._turns = False  # whether another sequence is to go on
        self._is_full = False  # there is no room for it
        if self._budget == 0:
            self._put_marker_in()
        self.first = self.go_on() or self._reasoning_sequence()

    def _reasoning_sequence(self) -> Request:
        may_turn = self._budget is not None or self._request.grammar is not None
        return replace(self._request, grammar=None, is_held=True) if may_turn else self._request

    @property
    def is_stopped(self) -> bool:
        """Return whether nothing more of this sequence may be taken."""
        return self._turns or super().is_stopped

    def take(self, delta: TokenDelta) -> Sequence[TextDelta]:
        """Take one token; scores are those of the prompt alone, without a marker that was put in."""
        num_scored = self._request.num_scored
        if len(delta.scores) > num_scored:
            delta = delta._replace(scores=delta.scores[:num_scored])
        return super().take(delta)

    def _split(self, text: str, is_last: bool) -> list[Piece]:
        marked, is_held = self._marked, self._request.grammar is not None
        if marked.is_found:
            return super()._split(text, is_last)
        pieces = marked.push(text) if is_held else super()._split(text, is_last)
        if is_last:
            return pieces + marked.flush() if is_held else pieces
        if marked.is_found:
            self._turns = is_held
        elif self._budget is not None and len(self.tokens) >= self._budget:
            pieces += self._put_marker_in()
        return pieces

    def _put_marker_in(self) -> list[Piece]:
        """End the steps here; return what was held back of them."""
        cut_off = self._up_to_stop(self._detokenizer.flush(), is_last=False)  # of a character
        pieces = self._marked.push(cut_off) + self._marked.mark()
        self._put_in = _marker_after(self.raw_text, self._settings)
        self._turns = True
        return pieces

    def go_on(self) -> Request | None:
        """Return the sequence with the answer; None: there is no other, or no room for a token of it."""
        if not self._turns:
            return None
        self._turns = False
        request, count, ids = self._request, len(self.tokens), self._ids_up_to_answer()
        following = replace(
            request,
            id=f"{request.id}-answer",
            token_ids=(*request.token_ids, *ids),
            num_scored=0 if count or not request.num_scored else request.num_scored + len(ids),
            continues=request.id if count else None,
        )
        left = self._num_left(following, len(ids) - count)
        self._is_full = left < 1
        if self._is_full:
            return None
        self._detokenizer = Detokenizer(self._tables, following.prompt_ids)
        sampling = sampling_after(request.sampling, count, left)
        return replace(following, max_new_tokens=left, sampling=sampling)

    def _num_left(self, following: Request, num_put_in: int) -> int:
        """Return how many tokens there is room for behind the prompt, of which `num_put_in` were put in."""
        left = min(self._request.max_new_tokens - len(self.tokens), self._session.num_left(following))
        has_room = left < 1 or self._session.has_room(replace(following, max_new_tokens=left))
        return left if has_room else left - num_put_in  # K/V memory holds at least what was asked for first

    def _ids_up_to_answer(self) -> tuple[int, ...]:
        """Return the ids between prompt and answer: what was generated, and what is put in behind it."""
        ids = tuple(token.id for token in self.tokens)
        before, put_in = self.raw_text, self._put_in
        if not put_in and self._marked.rest.strip():  # the last token has more than the marker's end
            ids, last = ids[:-1], self.tokens[-1].text
            before, put_in = before.removesuffix(last), last.removesuffix(self._marked.rest)
        rules = self._request.sampling.rules
        if not ids and rules is not None and rules.forced_first is not None and len(self._prompt_ids) == 1:
            ids = (rules.forced_first,)
        return (*ids, *(self._session.ids_after(before[-_TAIL:], put_in) if put_in else ()))

    def finish(self, reported: FinishReason | None, eos_ids: frozenset[int]) -> FinishReason:
        """Return why the answer ended, or why there is none."""
        return FinishReason.LENGTH if self._is_full else super().finish(reported, eos_ids)


def _marker_after(text: str, settings: ReasoningSettings) -> str:
    """Return the marker, with what ends a step before it where one has begun, and a space before a word."""
    marker, end = settings.answer_after, settings.steps_end
    if not text.strip():
        return marker
    begun = text if end is None else text.rpartition(end)[2]
    ended = end if end is not None and begun.strip() else ""
    is_apart = (text + ended)[-1].isspace() or not marker[0].isalnum()
    return f"{ended}{marker}" if is_apart else f"{ended} {marker}"


def sampling_after(sampling: SamplingParams, count: int, left: int) -> SamplingParams:
    """Return how a sequence goes on after `count` tokens of its answer, for `left` more at most."""
    rules = sampling.rules
    if rules is None:
        return sampling
    decay = rules.length_decay
    changed = replace(
        rules,
        min_new_tokens=max(0, rules.min_new_tokens - count),
        max_new_tokens=left,
        suppressed_first=() if count else rules.suppressed_first,
        length_decay=None if decay is None else (decay[0] - count, decay[1]),
    )
    return replace(sampling, rules=changed)
