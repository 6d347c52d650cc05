"""Steps before an answer, in the terms of OpenAI's routes: whole answers and chunks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk

from app.api.routes.openai_answers import ChatChunks, CompletionChunks, Head, chat_completion, completion
from app.request import FinishReason, RequestTimings
from app.serving.generation_request import (
    Ballot,
    GenerationResult,
    OutputToken,
    Reasoning,
    TextDelta,
    Vote,
)

HEAD = Head("id", "model", "0123456789ab", None)
STEPS = ("4 + 5 = 9", "3 * 9 = 27")
TEXT = "4 + 5 = 9; 3 * 9 = 27; "


def token(text: str) -> OutputToken:
    return OutputToken(len(text), text, -0.5, False)


def result(
    answer: str = "27", reasoning: str | None = TEXT, finish: FinishReason = FinishReason.EOS, **more: Any
) -> GenerationResult:
    """Three tokens of steps, then those of the answer."""
    thought = None if reasoning is None else Reasoning(text=reasoning, steps=STEPS, num_tokens=3)
    tokens = [] if thought is None else [token("4 + 5 = 9;"), token(" 3 * 9 = 27;"), token(" answer:")]
    return GenerationResult(
        text=answer,
        prompt_text="3 * (4 + 5) = ",
        return_full_text=False,
        version=None,
        finish=finish,
        tokens=(*tokens, *([token(f" {answer}")] if answer else [])),
        prompt_tokens=5,
        virtual_tokens=0,
        seed=1,
        timings=RequestTimings(queue=0, prefill=0, decode=0),
        reasoning=thought,
        **more,
    )


def deltas(whole: GenerationResult) -> Iterator[tuple[int, TextDelta]]:
    """A token at a time, as a program yields them."""
    texts = [("4 + 5 = 9; ", True), ("3 * 9 = 27; ", True), ("", True), (whole.text, False)]
    for (text, is_reasoning), each in zip(texts, whole.tokens, strict=False):
        yield 0, TextDelta(text=text, token=each, is_reasoning=is_reasoning)
    yield 0, TextDelta(text="", result=whole)


def events(chunks: ChatChunks | CompletionChunks, whole: GenerationResult) -> list[dict[str, Any]]:
    written = b"".join(map(chunks, deltas(whole))) + chunks.end()
    *data, done = written.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in data]


def joined(texts: Sequence[str | None]) -> str:
    return "".join(text or "" for text in texts)


def test_a_chats_message_has_the_steps_under_both_names() -> None:
    answer = chat_completion(HEAD, [result()], logprobs=True)
    (choice,) = answer["choices"]
    assert choice["message"] == {
        "role": "assistant",
        "content": "27",
        "refusal": None,
        "reasoning": TEXT,
        "reasoning_content": TEXT,
    }
    assert choice["logprobs"] is not None
    assert [each["token"] for each in choice["logprobs"]["content"]] == [" 27"], "the answer's only"
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 4,
        "total_tokens": 9,
        "completion_tokens_details": {"reasoning_tokens": 3},
    }
    parsed = ChatCompletion.model_validate(answer)
    assert parsed.usage is not None
    assert parsed.usage.completion_tokens_details is not None
    assert parsed.usage.completion_tokens_details.reasoning_tokens == 3


def test_a_completion_has_the_steps_beside_its_text() -> None:
    answer = completion(HEAD, [result()], 1, logprobs=True, echo=False)
    (choice,) = answer["choices"]
    assert (choice["text"], choice["reasoning"]) == ("27", TEXT)
    assert choice["logprobs"] is not None
    assert choice["logprobs"]["tokens"] == [" 27"]
    assert "stop_reason" not in choice


def test_answers_without_steps_are_as_ever() -> None:
    answer = chat_completion(HEAD, [result(reasoning=None)], logprobs=False)
    assert answer["choices"][0]["message"] == {"role": "assistant", "content": "27", "refusal": None}
    assert answer["usage"] == {"prompt_tokens": 5, "completion_tokens": 1, "total_tokens": 6}


def test_steps_that_the_client_doesnt_want_are_counted_all_the_same() -> None:
    answer = chat_completion(HEAD, [result(reasoning="")], logprobs=False)
    assert "reasoning" not in answer["choices"][0]["message"]
    assert answer["usage"]["completion_tokens_details"] == {"reasoning_tokens": 3}


@pytest.mark.parametrize(
    ("finish", "word", "why"),
    [
        (FinishReason.EOS, "stop", None),
        (FinishReason.STOP, "stop", None),
        (FinishReason.LENGTH, "length", None),
        (FinishReason.NO_ANSWER, "stop", "no_answer"),
        (FinishReason.LOOP, "stop", "loop"),
        (FinishReason.MAX_STEPS, "length", "max_steps"),
    ],
)
def test_why_an_answer_ended(finish: FinishReason, word: str, why: str | None) -> None:
    """Whole answers and streams say the same, and OpenAI's types take it."""
    whole = result(answer="", finish=finish)
    for choices in (
        chat_completion(HEAD, [whole], logprobs=False)["choices"],
        completion(HEAD, [whole], 1, logprobs=False, echo=False)["choices"],
    ):
        assert [(each["finish_reason"], each.get("stop_reason")) for each in choices] == [(word, why)]
    options: dict[str, Any] = {"prompt_tokens": [5], "num_prompts": 1, "logprobs": False, "usage": False}
    for chunks in (ChatChunks(HEAD, **options), CompletionChunks(HEAD, prompts=[None], **options)):
        (last,) = events(chunks, whole)[-1]["choices"]
        assert (last["finish_reason"], last.get("stop_reason")) == (word, why)


def test_a_chats_chunks_joined_are_its_message() -> None:
    chunks = ChatChunks(HEAD, prompt_tokens=[5], num_prompts=1, logprobs=True, usage=True)
    *found, last = [ChatCompletionChunk.model_validate(each) for each in events(chunks, result())]
    given = [each.choices[0].delta for each in found]
    assert joined([each.content for each in given]) == "27"
    for name in ("reasoning", "reasoning_content"):
        assert joined([(each.model_extra or {}).get(name) for each in given]) == TEXT
    scored = [each.choices[0].logprobs for each in found]
    assert [part.token for each in scored if each for part in each.content or []] == [" 27"]
    assert last.usage is not None
    assert last.usage.completion_tokens_details is not None
    assert last.usage.completion_tokens_details.reasoning_tokens == 3


def test_a_completions_chunks_joined_are_its_choice() -> None:
    options: dict[str, Any] = {"prompt_tokens": [5], "num_prompts": 1, "logprobs": True, "usage": False}
    found = [
        each["choices"][0] for each in events(CompletionChunks(HEAD, prompts=["3 = "], **options), result())
    ]
    assert joined([each["text"] for each in found]) == "3 = 27"
    assert joined([each.get("reasoning") for each in found]) == TEXT
    (scored,) = [each["logprobs"] for each in found if each["logprobs"]]
    assert (scored["tokens"], scored["text_offset"]) == ([" 27"], [4])


def test_the_usage_of_a_vote_is_that_of_all_ballots() -> None:
    ballots = tuple(Ballot(result=result(answer)) for answer in ("27", "28", "27"))
    answer = chat_completion(HEAD, [result(vote=Vote(share=2 / 3, ballots=ballots))], logprobs=False)
    assert answer["usage"] == {
        "prompt_tokens": 5,
        "completion_tokens": 12,
        "total_tokens": 17,
        "completion_tokens_details": {"reasoning_tokens": 9},
    }
