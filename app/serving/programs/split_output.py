"""An output processor for answers that stand behind a marker, with steps before it."""

from collections.abc import Sequence
from dataclasses import replace

from app.request import FinishReason
from app.serving.admitted import Admitted
from app.serving.generation_request import Reasoning, TextDelta
from app.serving.output_processor import OutputProcessor
from app.serving.session import Session
from app.text.marked_text import MarkedText, Piece


class SplitOutput(OutputProcessor):
    """Collects steps and an answer. Strings in `stop` end both; the answer's own are those of the text."""

    def __init__(
        self,
        session: Session,
        admitted: Admitted,
        marked: MarkedText,
        *,
        literal_ids: frozenset[int],
        stop: tuple[str, ...] = (),
    ) -> None:
        """`literal_ids`: of the texts that are looked for; special tokens among them are read as text."""
        parameters = replace(admitted.parameters, stop=stop, include_stop_str_in_output=False)
        super().__init__(session.tables, admitted.decoder_ids, parameters)
        self._marked = marked
        self._literal_ids = literal_ids
        self._num_before = 0  # tokens up to the answer

    @property
    def is_stopped(self) -> bool:
        """Return whether a stop string was found; nothing more of this sequence may be taken."""
        return super().is_stopped or self._marked.is_stopped

    @property
    def may_end_early(self) -> bool:
        """Return True: a marker may end its sequence."""
        return True

    @property
    def text(self) -> str:
        """Return the answer so far, as far as it may be shown."""
        return self._marked.answer

    @property
    def raw_text(self) -> str:
        """Return all text so far, up to a stop string."""
        return super().text

    @property
    def reasoning(self) -> Reasoning:
        """Return what came before the answer."""
        if not self._parameters.include_reasoning:
            return Reasoning(text="", steps=(), num_tokens=self._num_before, is_shown=False)
        return Reasoning(text=self._marked.reasoning, steps=self._marked.steps, num_tokens=self._num_before)

    def finish(self, reported: FinishReason | None, eos_ids: frozenset[int]) -> FinishReason:
        """Return why the answer ended: without the marker there is none."""
        if self._marked.is_found:
            return super().finish(reported, eos_ids)
        return FinishReason.LENGTH if reported is FinishReason.LENGTH else FinishReason.NO_ANSWER

    def _is_literal(self, special_id: int) -> bool:
        is_sought = special_id in self._literal_ids and not self._marked.is_found
        return is_sought or super()._is_literal(special_id)

    def _show(self, taken: TextDelta, is_last: bool) -> Sequence[TextDelta]:
        """Return a delta for each piece; the first one has the token, and says where that belongs."""
        is_reasoning = not self._marked.is_found
        if is_reasoning:
            self._num_before = len(self.tokens)
        pieces = self._split(self._up_to_stop(taken.text, is_last), is_last or super().is_stopped)
        if not pieces or pieces[0].is_reasoning != is_reasoning:
            pieces = [Piece("", is_reasoning), *pieces]
        first, *others = (_delta(piece, self._parameters.include_reasoning) for piece in pieces)
        return [first._replace(token=taken.token, prompt_scores=taken.prompt_scores), *others]

    def _split(self, text: str, is_last: bool) -> list[Piece]:
        """Return the pieces of more text."""
        marked = self._marked
        if marked.is_found:
            pieces = marked.push_answer(text, may_stop=self._may_stop)
        else:
            pieces = marked.push(text)
            if marked.is_found:
                pieces += marked.push_answer(marked.rest, may_stop=self._may_stop)
        return pieces + marked.flush() if is_last and not marked.is_stopped else pieces


def _delta(piece: Piece, shows_reasoning: bool) -> TextDelta:
    if piece.is_reasoning and not shows_reasoning:
        return TextDelta(text="", is_reasoning=True)
    return TextDelta(text=piece.text, is_reasoning=piece.is_reasoning, step=piece.step)
