"""Steps before an answer, in the terms of OpenAI's routes: whole answers and chunks."""

import json
from collections.abc import Iterator, Sequence
from typing import Any

import pytest
from openai.types.chat import ChatCompletion, ChatCompletionChunk
from openai.types.responses import Response, ResponseStreamEvent
from pydantic import TypeAdapter

from app.api.routes.openai_answers import ChatChunks, CompletionChunks, Head, chat_completion, completion
from app.api.routes.responses_answers import ResponseParts
from app.api.routes.responses_events import ResponseEvents
from app.api.schemas.responses import ResponseRequest
from app.errors import ConstraintFailed, Overloaded
from app.request import FinishReason, RequestTimings
from app.serving.generation_request import (
    Ballot,
    GenerationResult,
    OutputToken,
    Reasoning,
    TextDelta,
    Vote,
)

HEAD = Head("id", "model", "0123456789ab", ())
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
    texts = [("4 + 5 = 9; ", STEPS[0]), ("3 * 9 = 27; ", STEPS[1]), ("", None)]
    steps = [] if whole.reasoning is None else texts
    for (text, step), each in zip(steps, whole.tokens, strict=False):
        yield 0, TextDelta(text=text, token=each, is_reasoning=True, step=step)
    for each in whole.answer_tokens:
        yield 0, TextDelta(text=whole.text, token=each)
    yield 0, TextDelta(text="", result=whole)


def events(chunks: ChatChunks | CompletionChunks, whole: GenerationResult) -> list[dict[str, Any]]:
    written = b"".join(map(chunks, deltas(whole))) + chunks.end()
    *data, done = written.decode().strip().split("\n\n")
    assert done == "data: [DONE]"
    return [json.loads(each.removeprefix("data: ")) for each in data]


def response_events(whole: GenerationResult, **body: Any) -> list[dict[str, Any]]:
    """The same deltas as `/v1/responses` writes them; all are what OpenAI's types say."""
    given = ResponseRequest.model_validate({"model": "model", "input": "a", **body})
    written = b"".join(map(ResponseEvents(ResponseParts(HEAD, given)), deltas(whole)))
    found = [json.loads(each.split("data: ")[1]) for each in written.decode().strip().split("\n\n")]
    for each in found:
        TypeAdapter(ResponseStreamEvent).validate_python(each)
    assert [each["sequence_number"] for each in found] == list(range(len(found)))
    return found


def kinds_of(events: list[dict[str, Any]]) -> list[str]:
    return [each["type"].removeprefix("response.") for each in events]


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


REASONED = """
created in_progress output_item.added content_part.added reasoning_text.delta reasoning_text.delta
reasoning_text.done content_part.done output_item.done output_item.added content_part.added output_text.delta
output_text.done content_part.done output_item.done completed
"""


def test_a_responses_steps_are_an_item_before_its_message() -> None:
    events = response_events(result())
    assert kinds_of(events) == REASONED.split()
    assert joined([each["delta"] for each in events if each["type"].endswith("reasoning_text.delta")]) == TEXT
    response = Response.model_validate(events[-1]["response"])
    assert response.output_text == "27"
    steps, message = response.output
    assert steps.type == "reasoning"
    assert (steps.summary, [each.text for each in steps.content or []]) == ([], [TEXT])
    assert message.type == "message"
    assert [each["item"] for each in events if each["type"].endswith("item.done")] == events[-1]["response"][
        "output"
    ]
    assert {each["output_index"] for each in events if each["type"].endswith("text.delta")} == {0, 1}
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 3


def test_a_summary_is_the_steps_one_by_one() -> None:
    """LangChain reads no other reasoning than summaries."""
    events = response_events(result(), reasoning={"effort": "low", "summary": "auto"})
    told = [each for each in events if "reasoning_summary_text.delta" in each["type"]]
    assert [(each["summary_index"], each["delta"]) for each in told] == [*enumerate(STEPS)]
    response = Response.model_validate(events[-1]["response"])
    assert response.output[0].type == "reasoning"
    assert [each.text for each in response.output[0].summary] == [*STEPS]
    assert response.reasoning is not None
    assert (response.reasoning.effort, response.reasoning.summary) == ("low", "auto")
    done = next(each["item"] for each in events if each["type"].endswith("item.done"))
    assert done == events[-1]["response"]["output"][0]


@pytest.mark.parametrize(
    ("finish", "status", "why"),
    [
        (FinishReason.LENGTH, "incomplete", None),
        (FinishReason.NO_ANSWER, "completed", "no_answer"),
        (FinishReason.LOOP, "completed", "loop"),
        (FinishReason.MAX_STEPS, "incomplete", "max_steps"),
    ],
)
def test_a_response_without_an_answer_has_steps_only(
    finish: FinishReason, status: str, why: str | None
) -> None:
    events = response_events(result(answer="", finish=finish))
    response = Response.model_validate(events[-1]["response"])
    assert (events[-1]["type"], response.status) == (f"response.{status}", status)
    assert [each.type for each in response.output] == ["reasoning"]
    assert response.output_text == ""
    assert (response.incomplete_details is not None) == (status == "incomplete")
    assert (response.model_extra or {}).get("stop_reason") == why
    assert "output_text.delta" not in kinds_of(events)


def test_an_empty_answer_without_steps_is_a_message() -> None:
    events = response_events(result(answer="", reasoning=None))
    items = "output_item.added content_part.added output_text.done content_part.done output_item.done"
    assert kinds_of(events)[2:] == [*items.split(), "completed"]
    assert Response.model_validate(events[-1]["response"]).output[0].type == "message"


def test_steps_that_the_client_doesnt_want_are_no_item() -> None:
    whole = result(reasoning="")
    given = ResponseRequest.model_validate({"model": "m", "input": "a", "include_reasoning": False})
    response = Response.model_validate(ResponseParts(HEAD, given).ended(whole))
    assert [each.type for each in response.output] == ["message"]
    assert response.usage is not None
    assert response.usage.output_tokens_details.reasoning_tokens == 3


def test_a_stream_that_breaks_ends_with_a_failed_response() -> None:
    given = ResponseRequest.model_validate({"model": "m", "input": "a"})
    events = ResponseEvents(ResponseParts(HEAD, given))
    events(next(deltas(result())))
    for error, code in ((Overloaded("Full."), "server_error"), (ConstraintFailed("No."), "invalid_prompt")):
        found = json.loads(events.fail(error).decode().split("data: ")[1])
        response = Response.model_validate(found["response"])
        assert (found["type"], response.status) == ("response.failed", "failed")
        assert response.error is not None
        assert (response.error.code, response.error.message) == (code, str(error))


def test_a_votes_chunks_have_each_ballot_then_the_winner() -> None:
    ballots = tuple(Ballot(result=result(text), index=i) for i, text in enumerate(("27", "28", "27")))
    whole = result(vote=Vote(share=2 / 3, ballots=ballots))
    found = [(0, TextDelta(text="", ballot=each)) for each in ballots]
    found += [(0, TextDelta(text=TEXT, is_reasoning=True)), (0, TextDelta(text="27", result=whole))]
    options: dict[str, Any] = {"prompt_tokens": [5], "num_prompts": 1, "logprobs": False, "usage": False}
    expected = chat_completion(HEAD, [whole], logprobs=False)["choices"][0]
    for chunks in (ChatChunks(HEAD, **options), CompletionChunks(HEAD, prompts=[None], **options)):
        written = b"".join(map(chunks, found)).decode().strip().split("\n\n")
        choices = [json.loads(each.removeprefix("data: "))["choices"][0] for each in written]
        assert [each["ballot"]["answer"] for each in choices if "ballot" in each] == ["27", "28", "27"]
        assert choices[-1]["vote"] == expected["vote"]
    given = ResponseRequest.model_validate({"model": "m", "input": "a", "reasoning": {"summary": "auto"}})
    events = ResponseEvents(ResponseParts(HEAD, given))
    written = b"".join(map(events, found)).decode().strip().split("\n\n")
    told = [json.loads(each.split("data: ")[1]) for each in written]
    assert [each["delta"] for each in told if "summary_text.delta" in each["type"]] == [*STEPS]
    assert told[-1]["response"]["vote"] == expected["vote"]
