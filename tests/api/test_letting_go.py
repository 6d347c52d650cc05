"""A refused body is gone with its answer: nothing of it waits for the garbage collector."""

import gc
import json
from typing import Any

import httpx
import pytest

from tests.serving.stack import BASE_NAME
from tests.waiting import wait_until

MANY = 50_000


@pytest.mark.parametrize(
    ("path", "body"),
    [
        ("/v1/completions", {"prompt": "a", "structured_outputs": {"json": {"enum": []}}}),
        ("/v1/completions", {"prompt": "a", "stream": True, "structured_outputs": {"json": {"enum": []}}}),
        ("/v1/completions", {"prompt": "a", "stop": []}),
    ],
)
def test_what_a_refused_body_held_is_free_at_once(
    client: httpx.Client, path: str, body: dict[str, Any]
) -> None:
    written = json.dumps({"model": BASE_NAME} | body)
    strings = ", ".join(f'"{number:06} of a refused body"' for number in range(MANY))
    large = written.replace("[]", f"[{strings}]").encode()
    gc.collect()
    gc.disable()
    try:
        headers = {"content-type": "application/json"}
        assert client.post(path, content=large, headers=headers).status_code == 422
        wait_until(lambda: not is_held(), "the body is still held")
    finally:
        gc.enable()


def is_held() -> bool:
    return any(type(each) is list and len(each) == MANY for each in gc.get_objects())
