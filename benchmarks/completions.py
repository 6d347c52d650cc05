"""Requests from synchronous code: one future each, over an event loop on a thread of its own."""

import asyncio
import threading
from collections.abc import Iterator, Sequence
from concurrent.futures import Future
from contextlib import aclosing
from dataclasses import dataclass
from functools import cache

from app.engine.client import EngineClient
from app.request import FinishReason, Hypothesis, Request, RequestTimings, TokenDelta, TokenScore


@dataclass(frozen=True, slots=True, kw_only=True)
class Completion:
    """A finished request."""

    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...]
    finish: FinishReason
    timings: RequestTimings
    hypotheses: tuple[Hypothesis, ...] = ()  # of beam search
    scores: tuple[TokenScore, ...] = ()  # of the prompt


def submit(engine: EngineClient, request: Request) -> "Future[Completion]":
    """Send a request; return the future of its Completion, or of its error. Raise what refuses it."""
    return submit_all(engine, [request])[0]


def submit_all(engine: EngineClient, requests: Sequence[Request]) -> "list[Future[Completion]]":
    """Send requests at once, as `submit` does; in a refusal, those before it have been sent."""
    return asyncio.run_coroutine_threadsafe(_begin(engine, requests), _event_loop()).result()


@cache
def _event_loop() -> asyncio.AbstractEventLoop:
    loop = asyncio.new_event_loop()
    threading.Thread(target=loop.run_forever, name="completions", daemon=True).start()
    return loop


async def _begin(engine: EngineClient, requests: Sequence[Request]) -> "list[Future[Completion]]":
    tasks = [asyncio.ensure_future(_complete(engine, request)) for request in requests]
    await asyncio.sleep(0)  # up to their first wait, for which the engine has to admit them
    for task in tasks:
        if task.done():
            task.result()
    return [_future_of(task) for task in tasks]


def _future_of(task: "asyncio.Task[Completion]") -> "Future[Completion]":
    future: Future[Completion] = Future()
    future.set_running_or_notify_cancel()  # a request is cancelled through its engine
    task.add_done_callback(lambda _: _settle(task, future))
    return future


def _settle(task: "asyncio.Task[Completion]", future: "Future[Completion]") -> None:
    error = task.exception()
    if error is None:
        future.set_result(task.result())
    else:
        future.set_exception(error)


async def _complete(engine: EngineClient, request: Request) -> Completion:
    async with aclosing(engine.generate(request)) as generated:
        deltas = [delta async for delta in generated]
    last = deltas[-1]
    assert last.finish is not None
    assert last.timings is not None
    tokens = list(_tokens(deltas))
    return Completion(
        token_ids=tuple(token.token_id for token in tokens),
        logprobs=tuple(token.logprob for token in tokens),
        finish=last.finish,
        timings=last.timings,
        hypotheses=last.hypotheses,
        scores=deltas[0].scores,
    )


def _tokens(deltas: Sequence[TokenDelta]) -> Iterator[TokenScore]:
    """Yield the tokens of an answer, the best one where beam search has several."""
    if hypotheses := deltas[-1].hypotheses:
        yield from hypotheses[0].tokens
    for delta in deltas:
        if delta.token_id is not None:
            yield TokenScore(delta.token_id, delta.logprob)
