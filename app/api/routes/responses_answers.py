"""Answers of `/v1/responses`: whole ones, whose parts are those of streams as well."""

import time
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from app.api.routes.generate_answers import vote_answer
from app.api.routes.openai_answers import Head, finish_reason, stop_reason, token_logprobs
from app.api.schemas.responses import ResponseRequest
from app.api.schemas.responses_answers import (
    MessageOutput,
    ModelResponse,
    OutputText,
    ReasoningOutput,
    ResponseUsage,
    Status,
)
from app.serving.generation_request import GenerationResult, OutputToken


@dataclass(frozen=True, slots=True)
class ResponseParts:
    """The objects that a response is made of, all with ids from one."""

    head: Head  # its id is what the ids of all items end with
    body: ResponseRequest

    def begun(self) -> ModelResponse:
        """Return the response before there is anything of its output."""
        body, given = self.body, self.body.reasoning
        return {
            "id": f"resp_{self.head.id}",
            "object": "response",
            "created_at": self.head.created,
            "completed_at": None,
            "status": "in_progress",
            "error": None,
            "incomplete_details": None,
            "model": self.head.model,
            "output": [],
            "usage": None,
            "instructions": body.instructions,
            "max_output_tokens": body.max_output_tokens,
            "metadata": body.metadata or {},
            "parallel_tool_calls": body.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {
                "effort": body.generation().get("reasoning_effort"),
                "summary": None if given is None else given.summary or given.generate_summary,
            },
            "store": False,
            "temperature": body.given().get("temperature"),
            "text": {"format": self._format()},
            "tool_choice": body.tool_choice or "auto",
            "tools": [],
            "top_logprobs": body.top_logprobs,
            "top_p": body.given().get("top_p"),
            "truncation": "disabled",
            "user": body.user,
            "system_fingerprint": self.head.system_fingerprint,
        }

    def ended(self, result: GenerationResult) -> ModelResponse:
        """Return the whole response."""
        response = self.begun()
        response["completed_at"] = int(time.time())
        response["status"] = status_of(result)
        if response["status"] == "incomplete":
            response["incomplete_details"] = {"reason": "max_output_tokens"}
        response["output"] = self._output(result)
        response["usage"] = _usage(result)
        why = stop_reason(result.finish)
        if why is not None:
            response["stop_reason"] = why
        if result.vote is not None:
            response["vote"] = vote_answer(result.text, result.vote)
        return response

    def reasoning(self, text: str, steps: Sequence[str], status: Status) -> ReasoningOutput:
        """Return the item of the steps."""
        return {
            "id": f"rs_{self.head.id}",
            "type": "reasoning",
            "summary": [
                {"type": "summary_text", "text": step} for step in (steps if self.body.wants_summary else ())
            ],
            "content": [{"type": "reasoning_text", "text": text}] if text else [],
            "status": status,
        }

    def message(self, parts: list[OutputText], status: Status) -> MessageOutput:
        """Return the item of the answer."""
        return {
            "id": f"msg_{self.head.id}",
            "type": "message",
            "role": "assistant",
            "content": parts,
            "status": status,
        }

    def text(self, text: str, tokens: Sequence[OutputToken]) -> OutputText:
        """Return the answer itself, with what is wanted of its tokens."""
        logprobs = token_logprobs(tokens) if self.body.wants_logprobs else []
        return {"type": "output_text", "text": text, "annotations": [], "logprobs": logprobs}

    def _output(self, result: GenerationResult) -> list[ReasoningOutput | MessageOutput]:
        status, output = status_of(result), list[ReasoningOutput | MessageOutput]()
        steps = result.reasoning
        if steps is not None and steps.text:
            reached = "completed" if result.text else status
            output.append(self.reasoning(steps.text, steps.steps, reached))
        if steps is None or result.text:
            output.append(self.message([self.text(result.text, result.answer_tokens)], status))
        return output

    def _format(self) -> dict[str, Any]:
        given = self.body.format
        return {"type": "text"} if given is None else given.model_dump(by_alias=True, exclude_none=True)


def status_of(result: GenerationResult) -> Status:
    """Return whether a bound ended the answer."""
    return "incomplete" if finish_reason(result.finish) == "length" else "completed"


def _usage(result: GenerationResult) -> ResponseUsage:
    return {
        "input_tokens": result.num_read,
        "input_tokens_details": {"cached_tokens": 0, "cache_write_tokens": 0},
        "output_tokens": result.num_generated,
        "output_tokens_details": {"reasoning_tokens": result.num_reasoning or 0},
        "total_tokens": result.num_read + result.num_generated,
    }
