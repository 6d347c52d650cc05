"""The events of `/v1/responses` as a stream: what begins, grows and ends, each with its number."""

import json
from collections.abc import Mapping
from typing import Any, Literal

from app.api.errors import error_response
from app.api.routes.generate_answers import ballot_answer
from app.api.routes.openai_answers import answered_tokens, token_logprobs
from app.api.routes.responses_answers import ResponseParts, status_of
from app.api.schemas.responses_answers import (
    MessageOutput,
    ReasoningOutput,
    ReasoningText,
    ResponseError,
    Status,
)
from app.api.sse import data_event, json_bytes
from app.serving.generation_request import GenerationResult, OutputToken, TextDelta

_CODES: Mapping[str, Literal["rate_limit_exceeded", "server_error"]] = {
    "rate_limit_error": "rate_limit_exceeded",
    "server_error": "server_error",
}


class ResponseEvents:
    """Write the deltas of one answer as OpenAI does: an item of steps, then one of the answer."""

    def __init__(self, parts: ResponseParts) -> None:
        self._parts = parts
        self._number = 0  # of the next event
        self._place: dict[str, Any] = {}  # of the item that is open: its id and index
        self._thought: str | None = None  # None: no steps were shown yet
        self._steps: list[str] = []
        self._said: str | None = None  # None: the answer has not begun
        self._unsent: list[OutputToken] = []

    def __call__(self, item: tuple[int, TextDelta]) -> bytes:
        """Return the events of a delta."""
        _, piece = item
        written = b"" if self._number else self._begin()
        if piece.ballot is not None:
            written += self._event("vote.ballot", ballot=ballot_answer(piece.ballot))
        written += self._think(piece) if piece.is_reasoning else self._say(piece)
        return written if piece.result is None else written + self._end(piece.result)

    def fail(self, error: Exception) -> bytes:
        """Return the event of an error that ends the stream."""
        response = self._parts.begun()
        response["status"], response["error"] = "failed", _error(error)
        return (b"" if self._number else self._begin()) + self._event("failed", response=response)

    def _begin(self) -> bytes:
        response = self._parts.begun()
        return self._event("created", response=response) + self._event("in_progress", response=response)

    def _think(self, piece: TextDelta) -> bytes:
        written = b""
        if piece.text:
            if self._thought is None:
                self._thought = ""
                written += self._open(self._parts.reasoning("", (), "in_progress"), _thoughts(""))
            self._thought += piece.text
            written += self._event("reasoning_text.delta", **self._part_place, delta=piece.text)
        if piece.step is not None and self._thought is not None:
            written += self._summarise(piece.step)
        return written

    def _say(self, piece: TextDelta) -> bytes:
        if self._parts.body.wants_logprobs:
            self._unsent += answered_tokens(piece)
        if not piece.text and (self._said is None or not self._unsent):
            return b""
        written = self._begin_answer(piece.result)
        self._said = (self._said or "") + piece.text
        logprobs, self._unsent = token_logprobs(self._unsent), []
        return written + self._event(
            "output_text.delta", **self._part_place, delta=piece.text, logprobs=logprobs
        )

    def _end(self, result: GenerationResult) -> bytes:
        response, status = self._parts.ended(result), status_of(result)
        if self._said is not None or result.reasoning is None or result.text:
            written = self._begin_answer(result) + self._end_answer(result, status)
        else:
            written = self._end_steps(status, result)
        return written + self._event(
            "incomplete" if status == "incomplete" else "completed", response=response
        )

    def _begin_answer(self, result: GenerationResult | None) -> bytes:
        """End the steps and open the answer's item, if it isn't open."""
        if self._said is not None:
            return b""
        self._said = ""
        written = self._end_steps("completed", result)
        return written + self._open(self._parts.message([], "in_progress"), self._parts.text("", ()))

    def _end_answer(self, result: GenerationResult, status: Status) -> bytes:
        part = self._parts.text(result.text, result.answer_tokens)
        return self._event(
            "output_text.done", **self._part_place, text=result.text, logprobs=part["logprobs"]
        ) + self._close(self._parts.message([part], status), part)

    def _end_steps(self, status: Status, result: GenerationResult | None) -> bytes:
        """End the item of steps, if there is one; those of a vote's winner are known only now."""
        if self._thought is None:
            return b""
        known = () if result is None or result.reasoning is None else result.reasoning.steps
        written = b"".join(map(self._summarise, known[len(self._steps) :]))
        written += self._event("reasoning_text.done", **self._part_place, text=self._thought)
        item = self._parts.reasoning(self._thought, self._steps, status)
        return written + self._close(item, _thoughts(self._thought))

    def _summarise(self, step: str) -> bytes:
        place = {**self._place, "summary_index": len(self._steps)}
        self._steps.append(step)
        if not self._parts.body.wants_summary:
            return b""
        part = {"type": "summary_text", "text": step}
        return b"".join(
            [
                self._event("reasoning_summary_part.added", **place, part=part | {"text": ""}),
                self._event("reasoning_summary_text.delta", **place, delta=step),
                self._event("reasoning_summary_text.done", **place, text=step),
                self._event("reasoning_summary_part.done", **place, part=part),
            ]
        )

    @property
    def _part_place(self) -> dict[str, Any]:
        return {**self._place, "content_index": 0}

    def _open(self, item: ReasoningOutput | MessageOutput, part: Mapping[str, Any]) -> bytes:
        self._place = {"item_id": item["id"], "output_index": self._place.get("output_index", -1) + 1}
        added = self._event("output_item.added", output_index=self._place["output_index"], item=item)
        return added + self._event("content_part.added", **self._part_place, part=part)

    def _close(self, item: ReasoningOutput | MessageOutput, part: Mapping[str, Any]) -> bytes:
        done = self._event("content_part.done", **self._part_place, part=part)
        return done + self._event("output_item.done", output_index=self._place["output_index"], item=item)

    def _event(self, kind: str, **fields: Any) -> bytes:
        kind, number = f"response.{kind}", self._number
        self._number += 1
        return b"event: %b\n" % kind.encode() + data_event(
            json_bytes({"type": kind, "sequence_number": number, **fields})
        )


def _thoughts(text: str) -> ReasoningText:
    return {"type": "reasoning_text", "text": text}


def _error(error: Exception) -> ResponseError:
    """Restate an error's envelope in the words of a response."""
    found = json.loads(bytes(error_response(error).body))["error"]
    return {
        "code": _CODES.get(found["type"], "invalid_prompt"),
        "message": found["message"],
        "type": found["type"],
        "param": found["param"],
    }
