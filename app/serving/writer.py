"""Turns the deltas of one request into text and tokens, and says when a stop string ends it."""

from collections.abc import Sequence

from app.request import FinishReason, TokenDelta
from app.serving.answers import OutputToken, TextDelta
from app.serving.detokenizer import DetokenizerTables
from app.serving.stopping import StopWatch


class AnswerWriter:
    """Collects one answer. `take` is called with every token, `finish` once at the end."""

    def __init__(self, tables: DetokenizerTables, context: Sequence[int], stops: Sequence[str]) -> None:
        self._tables = tables
        self._detokenizer = tables.new(context)
        self._watch = StopWatch(stops)
        self._shown: list[str] = []
        self.tokens: list[OutputToken] = []

    @property
    def is_stopped(self) -> bool:
        """Whether a stop string was found; nothing more is to be taken."""
        return self._watch.stopped is not None

    @property
    def text(self) -> str:
        """All that was shown."""
        return "".join(self._shown)

    def take(self, delta: TokenDelta) -> TextDelta:
        """Write one token; what can be shown of its text comes back."""
        assert delta.token_id is not None
        special = delta.token_id in self._tables.special_ids
        text = self._detokenizer.push(delta.token_id)
        if delta.is_last:
            text += self._detokenizer.flush()
        written = self._tables.literal(delta.token_id) if special else text
        token = OutputToken(delta.token_id, written, delta.logprob, special, self._top(delta))
        self.tokens.append(token)
        shown = self._watch.push(text)
        if delta.is_last:
            shown += self._watch.flush()
        self._shown.append(shown)
        return TextDelta(text=shown, token=token)

    def _top(self, delta: TokenDelta) -> tuple[OutputToken, ...]:
        """Tokens that might have come instead, each as it would read alone."""
        return tuple(
            OutputToken(id_, self._tables.text_of(id_), logprob, id_ in self._tables.special_ids)
            for id_, logprob in delta.top
        )

    def finish(self, reported: FinishReason | None, eos_ids: frozenset[int]) -> FinishReason:
        """Why the answer ended: the engine's reason, unless it was a stop of the caller's own."""
        if self.is_stopped or reported is None:
            return FinishReason.STOP
        is_own_stop = reported is FinishReason.EOS and self.tokens[-1].id not in eos_ids
        return FinishReason.STOP if is_own_stop else reported
