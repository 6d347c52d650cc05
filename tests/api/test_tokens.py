"""What tokenizers work at: never on the event loop, and never longer than a request may be."""

import threading
from collections.abc import Callable
from typing import Any

import httpx
import pytest

from tests.api.test_generate import error_of
from tests.serving.stack import BASE_NAME, POSITIONS, Stack

MANY = [1] * 100_000


@pytest.fixture
def work(stack: Stack, monkeypatch: pytest.MonkeyPatch) -> list[tuple[str, int]]:
    """What the tokenizer does from now on: the thread, and the length of what it is given."""
    tokenizer, noted = stack.generation.request_builder.prompts.tokenizer, list[tuple[str, int]]()

    def noting(real: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def note(given: Any) -> Any:
            noted.append((threading.current_thread().name, len(given)))
            return real(given)

        return note

    for name in ("plain_ids", "text_of"):
        monkeypatch.setattr(tokenizer, name, noting(getattr(tokenizer, name)))
    return noted


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/detokenize", {"ids": [1] * POSITIONS}),
        ("/generate", {"inputs": "a", "parameters": {"choices": ["good food", "cold food"]}}),
        ("/v1/completions", {"model": BASE_NAME, "prompt": [5, 6], "max_tokens": 1, "n": 2}),
    ],
)
def test_it_works_on_threads_of_its_own(
    client: httpx.Client, work: list[tuple[str, int]], path: str, body: dict[str, Any]
) -> None:
    assert client.post(path, json=body).status_code == 200
    assert work
    assert all(thread.startswith("admission") for thread, _ in work)


@pytest.mark.parametrize(
    ("path", "body", "status", "code"),
    [
        ("/detokenize", {"ids": MANY}, 422, "request_too_long"),
        (
            "/v1/completions",
            {"model": BASE_NAME, "prompt": MANY, "n": 16, "max_tokens": 1},
            400,
            "context_length_exceeded",
        ),
        (
            "/v1/completions",
            {"model": BASE_NAME, "prompt": [1] * (POSITIONS + 1), "echo": True},
            400,
            "context_length_exceeded",
        ),
    ],
)
def test_more_ids_than_fit_are_refused_unread(
    client: httpx.Client,
    work: list[tuple[str, int]],
    path: str,
    body: dict[str, Any],
    status: int,
    code: str,
) -> None:
    error = error_of(client.post(path, json=body), status)
    assert error["code"] == code
    assert str(POSITIONS) in error["message"]
    assert not work


@pytest.mark.parametrize("strange", [10**9, 10**30])
def test_ids_are_of_the_vocabulary(client: httpx.Client, strange: int) -> None:
    for path, body in (
        ("/detokenize", {"ids": [strange]}),
        ("/v1/completions", {"model": BASE_NAME, "prompt": [strange]}),
    ):
        assert "token ids must be from 0 to" in error_of(client.post(path, json=body), 422)["message"]
