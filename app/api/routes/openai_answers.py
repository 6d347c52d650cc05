"""Answers in OpenAI's shapes: whole ones, and the chunks of streams."""

import math
import time
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from app.api.sse import data_event, json_bytes
from app.prompt import TaskVersion
from app.request import FinishReason
from app.serving.generation_request import GenerationResult, OutputToken, TextDelta

DONE = data_event(b"[DONE]")
_LEAST = -9999.0  # OpenAI's own word for a token without any chance


@dataclass(frozen=True, slots=True)
class Head:
    """What every object of one answer begins with."""

    kind: str  # "chat.completion", "text_completion"
    id: str
    model: str
    fingerprint: str  # of the base
    version: TaskVersion | None  # that answers; None: the base
    created: int = field(default_factory=lambda: int(time.time()))

    def object(self, *, is_chunk: bool = False) -> dict[str, Any]:
        """The object without its choices."""
        return {
            "id": self.id,
            "object": f"{self.kind}.chunk" if is_chunk and self.kind.startswith("chat") else self.kind,
            "created": self.created,
            "model": self.model,
            "system_fingerprint": self.system_fingerprint,
        }

    @property
    def system_fingerprint(self) -> str:
        """Base and task version: what an answer depends on."""
        base, version = f"base-{self.fingerprint[:12]}", self.version
        return base if version is None else f"{base}-{version.task_id}@{version.version}"


def finish_reason(reason: FinishReason) -> str:
    """OpenAI knows one word for EOS and stop strings."""
    return "length" if reason is FinishReason.LENGTH else "stop"


def usage(results: Sequence[GenerationResult], num_prompts: int) -> dict[str, int]:
    """Tokens of each prompt once, and of all answers; the answers of a prompt stand side by side."""
    per_prompt = len(results) // num_prompts
    prompt = sum(result.prompt_tokens for result in results[::per_prompt])
    completion = sum(len(result.tokens) for result in results)
    return _usage(prompt, completion)


def _usage(prompt: int, completion: int) -> dict[str, int]:
    return {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion}


def completion_choice(index: int, result: GenerationResult, *, logprobs: bool, echo: bool) -> dict[str, Any]:
    """A choice of `/v1/completions`."""
    return {
        "index": index,
        "text": result.prompt_text + result.text if echo else result.text,
        "logprobs": completion_logprobs((*result.prompt_scores, *result.tokens)) if logprobs else None,
        "finish_reason": finish_reason(result.finish),
    }


def completion_logprobs(tokens: Sequence[OutputToken], offset: int = 0) -> dict[str, Any]:
    """Parallel lists; offsets count characters of the answer."""
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
    """By text, which tokens with parts of characters may share: the most probable one counts."""
    if math.isnan(token.logprob):
        return None
    return {other.text: _logprob(other) for other in reversed(token.top)}


def chat_choice(index: int, result: GenerationResult, *, logprobs: bool) -> dict[str, Any]:
    """A choice of `/v1/chat/completions`."""
    return {
        "index": index,
        "message": {"role": "assistant", "content": result.text, "refusal": None},
        "logprobs": chat_logprobs(result.tokens) if logprobs else None,
        "finish_reason": finish_reason(result.finish),
    }


def chat_logprobs(tokens: Sequence[OutputToken]) -> dict[str, Any]:
    """A list of tokens, each with those that might have come instead."""
    return {
        "content": [
            _scored(token) | {"top_logprobs": [_scored(other) for other in token.top]} for token in tokens
        ],
        "refusal": None,
    }


def _scored(token: OutputToken) -> dict[str, Any]:
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
    """Writes the pieces of several answers as chunks, then the usage if it was asked for, then [DONE]."""

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
        """`prompt_tokens` of each answer; `usage_so_far`: every chunk tells its answer's usage."""
        self._head = head
        self._prompt_tokens = prompt_tokens
        self._num_prompts = num_prompts
        self._logprobs = logprobs
        self._usage = usage
        self._usage_so_far = usage_so_far
        self._counts = [0] * len(prompt_tokens)
        self._so_far: Mapping[str, int] | None = None
        self._results: list[GenerationResult | None] = [None] * len(prompt_tokens)

    def __call__(self, item: tuple[int, TextDelta]) -> bytes:
        """The chunks of one piece."""
        index, piece = item
        if self._usage_so_far:
            self._counts[index] += piece.token is not None
            self._so_far = _usage(self._prompt_tokens[index], self._counts[index])
        if piece.result is not None:
            self._results[index] = piece.result
        return self._write(index, piece)

    def end(self) -> bytes:
        """What follows the last piece."""
        if not self._usage:
            return DONE
        results = [result for result in self._results if result is not None]
        return self._chunk([], usage(results, self._num_prompts)) + DONE

    @abstractmethod
    def _write(self, index: int, piece: TextDelta) -> bytes:
        """The chunks of a piece of answer `index`."""

    def _chunk(self, choices: list[Mapping[str, Any]], used: Mapping[str, int] | None = None) -> bytes:
        chunk = self._head.object(is_chunk=True) | {"choices": choices}
        return data_event(json_bytes(chunk | {"usage": used or self._so_far} if self._usage else chunk))

    def _finish(self, piece: TextDelta) -> str | None:
        return None if piece.result is None else finish_reason(piece.result.finish)


class CompletionChunks(_Chunks):
    """Of `/v1/completions`; with `echo` each answer begins with its prompt."""

    def __init__(self, head: Head, *, prompts: Sequence[str | None], **options: Any) -> None:
        """`prompts`: what is echoed before each answer, or None."""
        super().__init__(head, **options)
        self._offsets = [0] * len(prompts)
        self._echo = list(prompts)

    def _write(self, index: int, piece: TextDelta) -> bytes:
        text = (self._echo[index] or "") + piece.text
        self._echo[index] = None
        logprobs = None
        tokens = [*piece.prompt_scores, *([] if piece.token is None else [piece.token])]
        if self._logprobs and tokens:
            logprobs = completion_logprobs(tokens, self._offsets[index])
        self._offsets[index] += len(text)
        choice = {"index": index, "text": text, "logprobs": logprobs, "finish_reason": self._finish(piece)}
        return self._chunk([choice])


class ChatChunks(_Chunks):
    """Of `/v1/chat/completions`: the first chunk of an answer names the role, the last one the reason."""

    def __init__(self, head: Head, **options: Any) -> None:
        super().__init__(head, **options)
        self._begun: set[int] = set()

    def _write(self, index: int, piece: TextDelta) -> bytes:
        written = b""
        if index not in self._begun:
            self._begun.add(index)
            written = self._choice(index, {"role": "assistant", "content": ""})
        tokens = [] if piece.token is None or not self._logprobs else [piece.token]
        if piece.text or tokens:
            written += self._choice(index, {"content": piece.text}, chat_logprobs(tokens) if tokens else None)
        if piece.result is not None:
            written += self._choice(index, {}, reason=self._finish(piece))
        return written

    def _choice(
        self, index: int, delta: Mapping[str, Any], logprobs: Any = None, reason: str | None = None
    ) -> bytes:
        return self._chunk([{"index": index, "delta": delta, "logprobs": logprobs, "finish_reason": reason}])
