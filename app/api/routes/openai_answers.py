"""Answers in the shapes of the OpenAI API: whole ones, and the chunks of streams."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.api.routes.generate_answers import ballot_answer, vote_answer
from app.api.schemas.openai_answers import (
    AnswerMessage,
    ChatChoice,
    ChatCompletion,
    ChatLogprobs,
    Completion,
    CompletionChoice,
    CompletionLogprobs,
    FinishReason,
    OpenAiHead,
    StopReason,
    TokenLogprob,
    TopLogprob,
    Usage,
)
from app.api.sse import data_event, json_bytes
from app.prompt import TaskVersion
from app.request import FinishReason as Finish
from app.serving.generation_request import GenerationResult, OutputToken, TextDelta

DONE = data_event(b"[DONE]")
_LEAST = -9999.0  # OpenAI's value for a token of probability 0
_BOUNDS = (Finish.LENGTH, Finish.MAX_STEPS)
_WITHOUT_ANSWER: Mapping[Finish, StopReason] = {
    Finish.NO_ANSWER: "no_answer",
    Finish.LOOP: "loop",
    Finish.MAX_STEPS: "max_steps",
}


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer begins with."""

    id: str
    model: str
    fingerprint: str  # of the base
    versions: Sequence[TaskVersion]  # that answer, several of an ensemble; none: the base
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self) -> OpenAiHead:
        """Return the object without its kind and its choices."""
        return {
            "id": self.id,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    @property
    def system_fingerprint(self) -> str:
        """Base model and versions of the task, which an answer depends on."""
        base = f"base-{self.fingerprint[:12]}"
        numbers = "+".join(str(each) for each in sorted(version.version for version in self.versions))
        return f"{base}-{self.versions[0].task_id}@{numbers}" if self.versions else base


def finish_reason(reason: Finish) -> FinishReason:
    """Return OpenAI's word: whether a bound ended the answer, or the model did."""
    return "length" if reason in _BOUNDS else "stop"


def stop_reason(reason: Finish) -> StopReason | None:
    """Return why there is no answer, where OpenAI has no word for it."""
    return _WITHOUT_ANSWER.get(reason)


def completion(
    head: Head, results: Sequence[GenerationResult], num_prompts: int, *, logprobs: bool, echo: bool
) -> Completion:
    """Return the answer of `/v1/completions`."""
    return {
        **head.object(),
        "object": "text_completion",
        "choices": [_completion_choice(number, each, logprobs, echo) for number, each in enumerate(results)],
        "usage": _usage_of(results, num_prompts),
    }


def chat_completion(head: Head, results: Sequence[GenerationResult], *, logprobs: bool) -> ChatCompletion:
    """Return the answer of `/v1/chat/completions`."""
    return {
        **head.object(),
        "object": "chat.completion",
        "choices": [_chat_choice(number, each, logprobs) for number, each in enumerate(results)],
        "usage": _usage_of(results, 1),
    }


def _usage_of(results: Sequence[GenerationResult], num_prompts: int) -> Usage:
    """Count each prompt once, and all answers; the answers of a prompt stand side by side."""
    per_prompt = len(results) // num_prompts
    usage = _usage(
        sum(result.num_read for result in results[::per_prompt]),
        sum(result.num_generated for result in results),
    )
    reasoning = [result.num_reasoning for result in results if result.num_reasoning is not None]
    if reasoning:
        usage["completion_tokens_details"] = {"reasoning_tokens": sum(reasoning)}
    return usage


def _usage(prompt: int, completion: int) -> Usage:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def _completion_choice(index: int, result: GenerationResult, logprobs: bool, echo: bool) -> CompletionChoice:
    choice: CompletionChoice = {
        "index": index,
        "text": result.prompt_text + result.text if echo else result.text,
        "logprobs": (
            _completion_logprobs((*result.prompt_scores, *result.answer_tokens)) if logprobs else None
        ),
        "finish_reason": finish_reason(result.finish),
    }
    if result.reasoning is not None and result.reasoning.text:
        choice["reasoning"] = result.reasoning.text
    _add_end(choice, result)
    return choice


def _add_end(choice: CompletionChoice | ChatChoice | dict[str, Any], result: GenerationResult) -> None:
    """Add what few answers have."""
    why = stop_reason(result.finish)
    if why is not None:
        choice["stop_reason"] = why
    if result.score is not None:
        choice["score"] = result.score
    if result.vote is not None:
        choice["vote"] = vote_answer(result.text, result.vote)


def _completion_logprobs(tokens: Sequence[OutputToken], offset: int = 0) -> CompletionLogprobs:
    offsets = []
    for token in tokens:
        offsets.append(offset)
        offset += 0 if token.special else len(token.text)
    return {
        "tokens": [token.text for token in tokens],
        "token_logprobs": [_logprob(token) for token in tokens],
        "top_logprobs": [_alternatives(token) for token in tokens],
        "text_offset": offsets,
    }


def _alternatives(token: OutputToken) -> dict[str, float | None] | None:
    """Map texts to log-probabilities; of tokens with the same text the most probable one counts."""
    if math.isnan(token.logprob):
        return None
    return {other.text: _logprob(other) for other in reversed(token.top)}


def _chat_choice(index: int, result: GenerationResult, logprobs: bool) -> ChatChoice:
    message: AnswerMessage = {"role": "assistant", "content": result.text, "refusal": None}
    if result.reasoning is not None and result.reasoning.text:
        message["reasoning"] = message["reasoning_content"] = result.reasoning.text
    choice: ChatChoice = {
        "index": index,
        "message": message,
        "logprobs": _chat_logprobs(result.answer_tokens) if logprobs else None,
        "finish_reason": finish_reason(result.finish),
    }
    _add_end(choice, result)
    return choice


def _chat_logprobs(tokens: Sequence[OutputToken]) -> ChatLogprobs:
    return {"content": token_logprobs(tokens), "refusal": None}


def token_logprobs(tokens: Sequence[OutputToken]) -> list[TokenLogprob]:
    """Return tokens with the most probable ones in their places."""
    return [
        {**_top_logprob(token), "top_logprobs": [_top_logprob(other) for other in token.top]}
        for token in tokens
    ]


def _top_logprob(token: OutputToken) -> TopLogprob:
    return {
        "token": token.text,
        "logprob": _logprob(token),
        "bytes": list(token.text.encode("utf-8", "replace")),
    }


def _logprob(token: OutputToken) -> float | None:
    if math.isnan(token.logprob):  # the first token of a prompt
        return None
    return token.logprob if math.isfinite(token.logprob) else _LEAST


class _Chunks(ABC):
    """Write the deltas of several answers as chunks, then the usage if the client wants it, then [DONE]."""

    kind: str

    def __init__(
        self,
        head: Head,
        *,
        prompt_tokens: Sequence[int],
        num_prompts: int,
        logprobs: bool,
        usage: bool,
        usage_so_far: bool = False,
    ) -> None:
        """`prompt_tokens` of each answer; with `usage_so_far` every chunk has its answer's usage."""
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._num_prompts = num_prompts
        self._logprobs = logprobs
        self._usage = usage
        self._usage_so_far = usage_so_far
        self._counts = [0] * len(prompt_tokens)
        self._so_far: Usage | None = None
        self._results: list[GenerationResult | None] = [None] * len(prompt_tokens)

    def __call__(self, item: tuple[int, TextDelta]) -> bytes:
        """Return the chunks of one delta, as events."""
        index, piece = item
        if self._usage_so_far:
            self._counts[index] += _num_generated(piece)
            self._so_far = _usage(self._prompt_tokens[index], self._counts[index])
        if piece.result is not None:
            self._results[index] = piece.result
        return self._write(index, piece)

    def end(self) -> bytes:
        """Return what follows the last delta."""
        if not self._usage:
            return DONE
        results = [result for result in self._results if result is not None]
        return self._chunk([], _usage_of(results, self._num_prompts)) + DONE

    @abstractmethod
    def _write(self, index: int, piece: TextDelta) -> bytes:
        """Return the chunks of a delta of answer `index`."""

    def _chunk(self, choices: list[Mapping[str, Any]], used: Usage | None = None) -> bytes:
        chunk = {**self._head.object(), "object": self.kind, "choices": choices}
        return data_event(json_bytes(chunk | {"usage": used or self._so_far} if self._usage else chunk))

    def _end(self, piece: TextDelta) -> dict[str, Any]:
        """Return the fields of a choice that say how it ended, or what came in of a vote."""
        if piece.ballot is not None:
            return {"finish_reason": None, "ballot": ballot_answer(piece.ballot)}
        if piece.result is None:
            return {"finish_reason": None}
        ended: dict[str, Any] = {"finish_reason": finish_reason(piece.result.finish)}
        _add_end(ended, piece.result)
        return ended


class CompletionChunks(_Chunks):
    """The chunks of `/v1/completions`; with `echo` each answer begins with its prompt."""

    kind = "text_completion"

    def __init__(self, head: Head, *, prompts: Sequence[str | None], **options: Any) -> None:
        """`prompts`: the text to echo before each answer, or None."""
        super().__init__(head, **options)
        self._offsets = [0] * len(prompts)
        self._echo = list(prompts)

    def _write(self, index: int, piece: TextDelta) -> bytes:
        text = self._echoed(index, piece) + ("" if piece.is_reasoning else piece.text)
        logprobs, tokens = None, [*piece.prompt_scores, *answered_tokens(piece)]
        if self._logprobs and tokens:
            logprobs = _completion_logprobs(tokens, self._offsets[index])
        self._offsets[index] += len(text)
        thought = {"reasoning": piece.text} if piece.is_reasoning and piece.text else {}
        return self._chunk(
            [{"index": index, "text": text, **thought, "logprobs": logprobs, **self._end(piece)}]
        )

    def _echoed(self, index: int, piece: TextDelta) -> str:
        """Return the prompt before an answer's first chunk; of an ensemble, the winner's."""
        if piece.ballot is not None:
            return ""
        echo, self._echo[index] = self._echo[index], None
        if echo is None:
            return ""
        return echo if piece.result is None else piece.result.prompt_text


class ChatChunks(_Chunks):
    """The chunks of `/v1/chat/completions`: an answer's first one has the role, the last one the reason."""

    kind = "chat.completion.chunk"

    def __init__(self, head: Head, **options: Any) -> None:
        super().__init__(head, **options)
        self._begun: set[int] = set()

    def _write(self, index: int, piece: TextDelta) -> bytes:
        written = b""
        if index not in self._begun:
            self._begun.add(index)
            written = self._choice(index, {"role": "assistant", "content": ""})
        tokens = answered_tokens(piece) if self._logprobs else []
        if piece.text or tokens:
            logprobs = _chat_logprobs(tokens) if tokens else None
            written += self._choice(index, _said(piece), logprobs)
        if piece.result is not None or piece.ballot is not None:
            written += self._choice(index, {}, **self._end(piece))
        return written

    def _choice(self, index: int, delta: Mapping[str, Any], logprobs: Any = None, **end: Any) -> bytes:
        choice = {"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": None}
        return self._chunk([choice | end])


def _said(piece: TextDelta) -> dict[str, str]:
    if piece.is_reasoning:
        return {"reasoning": piece.text, "reasoning_content": piece.text}
    return {"content": piece.text}


def _num_generated(piece: TextDelta) -> int:
    if piece.ballot is not None:
        return piece.ballot.result.num_generated
    return int(piece.token is not None)


def answered_tokens(piece: TextDelta) -> list[OutputToken]:
    """Return the tokens of the answer that the delta has; a vote's last one has all of the winner's."""
    if piece.token is None and piece.result is not None and piece.result.vote is not None:
        return list(piece.result.answer_tokens)
    return [] if piece.token is None or piece.is_reasoning else [piece.token]
