"""What the longest texts cost everybody else: the stall of the event loop, and memory."""

import asyncio
import gc
import re
import time
from collections.abc import Iterator
from functools import partial
from pathlib import Path

import pytest

from app.errors import RequestTooLong
from app.serving.generation_request import GenerationRequest
from app.serving.parameters import Layer
from app.text.chat import ChatTemplate
from app.text.message import Message
from tests.serving.stack import Stack, running_stack, upload_of
from tests.text.chat_templates import SOURCES, with_template

soak = partial(pytest.param, marks=pytest.mark.soak)
MOST = 4_000_000  # characters
ASKS = 64
ONE = {"max_new_tokens": 1}
LAST = {"max_new_tokens": 1, "truncate": 1}


@pytest.fixture(scope="module")
def roomy(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Stack]:
    """A base of 128k positions, which texts of a megabyte may fit."""
    with running_stack(tmp_path_factory.mktemp("store"), positions=131_072, max_rows=64) as stack:
        gc.collect()
        gc.freeze()  # as the server does
        yield stack
        gc.unfreeze()


def peak() -> int:
    """The most resident memory since `forget`, in bytes."""
    found = re.search(r"VmHWM:\s+(\d+) kB", Path("/proc/self/status").read_text())
    assert found
    return int(found[1]) * 1024


def forget() -> int:
    """Begin to measure anew; what is resident now."""
    Path("/proc/self/clear_refs").write_text("5")
    return peak()


async def longest_pause(until: asyncio.Future[object]) -> float:
    worst = 0.0
    while not until.done():
        begin = time.monotonic()
        await asyncio.sleep(0.005)
        worst = max(worst, time.monotonic() - begin)
    return worst


def filled(text: str) -> str:
    return (text * (MOST // len(text) + 1))[:MOST]


TEXTS = {
    "words": "the film was cold, ",
    "one letter": "a",
    "digits": "1 ",
    "no spaces": "\u6f22",
    "special tokens": "<s>",
    "special words": "<s> a",
    "white space": " \n",
    "emoji": "\U0001f642",
}


QUICK = ("one letter", "no spaces", "special tokens")


@pytest.mark.parametrize("parameters", [ONE, LAST], ids=["whole", "truncated"])
@pytest.mark.parametrize("name", [name if name in QUICK else soak(name) for name in TEXTS])
def test_64_of_the_longest_texts_hold_nobody_up(roomy: Stack, name: str, parameters: Layer) -> None:
    text = filled(TEXTS[name])
    ask = GenerationRequest(inputs=text, parameters=parameters)

    async def all_at_once() -> tuple[float, list[object]]:
        asks = [roomy.generation.generate(ask) for _ in range(ASKS)]
        asking = asyncio.gather(*asks, return_exceptions=True)
        pause = asyncio.ensure_future(longest_pause(asking))
        await roomy.generation.generate(GenerationRequest(inputs="film", parameters=ONE))
        return await pause, list(await asking)

    before = forget()
    pause, outcomes = asyncio.run(all_at_once())
    assert peak() - before < 300 << 20
    assert pause < 0.25
    assert len({type(outcome) for outcome in outcomes}) == 1
    if parameters is ONE:
        assert isinstance(outcomes[0], RequestTooLong)


def test_a_chat_of_long_messages_is_bounded_like_a_text() -> None:
    messages = tuple(Message("user", filled("the film ")) for _ in range(2))
    chat = ChatTemplate(with_template(SOURCES["chatml"]))
    with pytest.raises(RequestTooLong, match="more than 4000000 characters"):
        chat.render(messages)


def test_a_template_is_measured_before_it_is_tried(stack: Stack) -> None:
    source = "{a}" + "the film was {a} " * 60 + "cold, " * 10_000
    begin = time.process_time()
    with pytest.raises(RequestTooLong, match=r"own text has|more tokens than the base"):
        asyncio.run(stack.publishing.upload("long", upload_of(task={"template": source})))
    assert time.process_time() - begin < 2
