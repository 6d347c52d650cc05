"""The output processor: detokenizes the deltas of one answer, up to a stop string."""

import math
from collections.abc import Sequence

from app.request import FinishReason, Request, TokenDelta, TokenScore
from app.serving.generation_request import OutputToken, Reasoning, TextDelta
from app.serving.parameters import GenerationParameters
from app.text.detokenizer import Detokenizer, DetokenizerTables
from app.text.stop_strings import StopStringMatcher


class OutputProcessor:
    """Collects one answer. `take` is called with every token, `finish` once at the end."""

    def __init__(
        self, tables: DetokenizerTables, prompt_ids: Sequence[int], parameters: GenerationParameters
    ) -> None:
        """`prompt_ids`: those that the answer goes on after; of an encoder-decoder, the decoder's own."""
        self._tables = tables
        self._prompt_ids = prompt_ids
        self._detokenizer = Detokenizer(tables, prompt_ids)
        self._parameters = parameters
        self._stop_strings = StopStringMatcher(
            parameters.stop, is_shown=parameters.include_stop_str_in_output
        )
        self._shown: list[str] = []
        self.tokens: list[OutputToken] = []
        self.prompt_scores: tuple[OutputToken, ...] = ()

    @property
    def is_stopped(self) -> bool:
        """Return whether a stop string was found; nothing more of this sequence may be taken."""
        return self._stop_strings.stopped is not None

    @property
    def may_end_early(self) -> bool:
        """Return whether its text may end the answer before the engine does, so that each token counts."""
        return bool(self._parameters.stop)

    @property
    def reasoning(self) -> Reasoning | None:
        """Return what came before the answer; None: it is all answer."""
        return None

    def go_on(self) -> Request | None:
        """Return the sequence that the answer goes on in where the last one has ended; None: in no other."""
        return None

    @property
    def text(self) -> str:
        """Return the text so far, as far as it may be shown."""
        return "".join(self._shown)

    def take(self, delta: TokenDelta) -> Sequence[TextDelta]:
        """Take one token, or none where only scores come; return what may be shown of its text.

        There is at least one delta, and the first one has the token.
        """
        prompt_scores: tuple[OutputToken, ...] = ()
        if self._parameters.decoder_input_details and not self.tokens:
            self.prompt_scores = scored_tokens(self._tables, self._prompt_ids, delta.scores)
            prompt_scores = self.prompt_scores
        token, text = None, ""
        if delta.token_id is not None:
            text = self._text_of(delta.token_id, delta.finish)
            token = self._token(delta.token_id, text, delta)
            self.tokens.append(token)
        return self._show(TextDelta(text=text, token=token, prompt_scores=prompt_scores), delta.is_last)

    @property
    def _may_stop(self) -> bool:
        return len(self.tokens) > (self._parameters.min_new_tokens or 0)

    def _show(self, taken: TextDelta, is_last: bool) -> Sequence[TextDelta]:
        """Return what may be shown of the text that a token completes, at the end with what is held back."""
        shown = self._up_to_stop(taken.text, is_last)
        return (taken if shown is taken.text else taken._replace(text=shown),)

    def _up_to_stop(self, text: str, is_last: bool) -> str:
        shown = text
        if self._stop_strings.is_any:
            shown = self._stop_strings.push(text, may_stop=self._may_stop)
            if is_last:
                shown += self._stop_strings.flush()
        self._shown.append(shown)
        return shown

    def _text_of(self, token_id: int, finish: FinishReason | None) -> str:
        """Return what the token completes: nothing for an id that ends the answer, unless that is shown."""
        text = ""
        if self._parameters.include_stop_str_in_output or finish is not FinishReason.EOS:
            is_literal = token_id in self._tables.special_ids and self._is_literal(token_id)
            push = self._detokenizer.push_literal if is_literal else self._detokenizer.push
            text = push(token_id)
        return text if finish is None else text + self._detokenizer.flush()

    def _is_literal(self, special_id: int) -> bool:
        """Return whether the special token is written out."""
        return not self._parameters.skip_special_tokens

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
    detokenizer = Detokenizer(tables)
    texts = [detokenizer.push(id_) for id_ in ids]
    texts[-1] += detokenizer.flush()
    unscored = [TokenScore(id_, math.nan) for id_ in ids[: len(ids) - len(scores)]]
    return tuple(
        _scored(tables, score, text) for score, text in zip([*unscored, *scores], texts, strict=True)
    )


def _scored(tables: DetokenizerTables, score: TokenScore, text: str) -> OutputToken:
    special = score.token_id in tables.special_ids
    written = tables.literal(score.token_id) if special else text
    return OutputToken(score.token_id, written, score.logprob, special, _top(tables, score.top))


def _top(tables: DetokenizerTables, top: Sequence[tuple[int, float]]) -> tuple[OutputToken, ...]:
    return (
        ()
        if not top
        else tuple(
            OutputToken(id_, tables.text_of(id_), logprob, id_ in tables.special_ids) for id_, logprob in top
        )
    )
