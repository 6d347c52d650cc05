"""The output processor: from the deltas of one sequence to text and tokens, up to a stop string."""

import math
from collections.abc import Sequence

from app.request import FinishReason, TokenDelta, TokenScore
from app.serving.admitted import TextStyle
from app.serving.generation_request import OutputToken, TextDelta
from app.text.detokenizer import DetokenizerTables
from app.text.stop_strings import StopStringMatcher


class OutputProcessor:
    """Collects one answer. `take` is called with every token, `finish` once at the end."""

    def __init__(self, tables: DetokenizerTables, prompt_ids: Sequence[int], style: TextStyle) -> None:
        self._tables = tables
        self._prompt_ids = prompt_ids
        self._detokenizer = tables.new(prompt_ids)
        self._style = style
        self._stop_strings = StopStringMatcher(style.stops, is_shown=style.shows_stop)
        self._shown: list[str] = []
        self.tokens: list[OutputToken] = []
        self.prompt_scores: tuple[OutputToken, ...] = ()

    @property
    def is_stopped(self) -> bool:
        """Return whether a stop string was found; nothing more may be taken."""
        return self._stop_strings.stopped is not None

    @property
    def text(self) -> str:
        """Return the text so far, as far as it may be shown."""
        return "".join(self._shown)

    def take(self, delta: TokenDelta) -> TextDelta:
        """Take one token, or none where only scores come; return what may be shown of its text."""
        if self._style.shows_prompt_tokens and not self.tokens:
            self.prompt_scores = scored_tokens(self._tables, self._prompt_ids, delta.scores)
        is_first = not self.tokens
        token, text = None, ""
        if delta.token_id is not None:
            text = self._text_of(delta.token_id, delta.finish)
            token = self._token(delta.token_id, text, delta)
            self.tokens.append(token)
        shown = self._stop_strings.push(text, may_stop=len(self.tokens) > self._style.min_tokens)
        if delta.is_last:
            shown += self._stop_strings.flush()
        self._shown.append(shown)
        return TextDelta(text=shown, token=token, prompt_scores=self.prompt_scores if is_first else ())

    def _text_of(self, token_id: int, finish: FinishReason | None) -> str:
        """Return what the token completes: nothing for an id that ends the answer, unless that is shown."""
        text = ""
        if self._style.shows_stop or finish is not FinishReason.EOS:
            is_literal = self._style.shows_special and token_id in self._tables.special_ids
            push = self._detokenizer.push_literal if is_literal else self._detokenizer.push
            text = push(token_id)
        return text if finish is None else text + self._detokenizer.flush()

    def _token(self, token_id: int, text: str, delta: TokenDelta) -> OutputToken:
        special = token_id in self._tables.special_ids
        written = self._tables.text_of(token_id) if special or delta.finish is FinishReason.EOS else text
        return OutputToken(token_id, written, delta.logprob, special, _top(self._tables, delta.top))

    def finish(self, reported: FinishReason | None, eos_ids: frozenset[int]) -> FinishReason:
        """Return why the answer ended: the engine's reason, unless it was a stop of the request's own."""
        if self.is_stopped or reported is None:
            return FinishReason.STOP
        is_own_stop = reported is FinishReason.EOS and self.tokens[-1].id not in eos_ids
        return FinishReason.STOP if is_own_stop else reported


def scored_tokens(
    tables: DetokenizerTables, ids: Sequence[int], scores: Sequence[TokenScore]
) -> tuple[OutputToken, ...]:
    """Return the tokens of a prompt; the last of them have scores, those before have NaN."""
    detokenizer = tables.new()
    texts = [detokenizer.push(id_) for id_ in ids]
    texts[-1] += detokenizer.flush()
    unscored = len(ids) - len(scores)
    tokens = [
        OutputToken(id_, _written(tables, id_, text), math.nan, id_ in tables.special_ids)
        for id_, text in zip(ids[:unscored], texts, strict=False)
    ]
    for score, text in zip(scores, texts[unscored:], strict=True):
        special = score.token_id in tables.special_ids
        written = _written(tables, score.token_id, text)
        tokens.append(OutputToken(score.token_id, written, score.logprob, special, _top(tables, score.top)))
    return tuple(tokens)


def _written(tables: DetokenizerTables, token_id: int, text: str) -> str:
    return tables.literal(token_id) if token_id in tables.special_ids else text


def _top(tables: DetokenizerTables, top: Sequence[tuple[int, float]]) -> tuple[OutputToken, ...]:
    return tuple(
        OutputToken(id_, tables.text_of(id_), logprob, id_ in tables.special_ids) for id_, logprob in top
    )
