"""A running server, over HTTP, for the commands that need one."""

from collections.abc import Mapping
from typing import Annotated, Any
from urllib.parse import urlsplit

import httpx2
import typer

from app.errors import PromptplexError
from app.settings import is_loopback

DEFAULT_SERVER = "http://127.0.0.1:8000"
ServerOption = Annotated[str, typer.Option("--server", envvar="PROMPTPLEX_SERVER", help="URL of the server")]

KeyOption = Annotated[
    str | None,
    typer.Option(
        "--key", envvar="PROMPTPLEX_KEY", help="API key; the variable keeps it out of process lists"
    ),
]

_TIMEOUT = httpx2.Timeout(10.0, read=300.0, write=300.0)  # an upload ends with a trial generation

Row = Mapping[str, Any]


class CommandFailed(PromptplexError):
    """What was asked can't be done; the message is for the user."""


class NoAnswer(CommandFailed):
    """Nothing answers at the server's address."""


class ServerClient:
    """Calls one server and explains what goes wrong. May be shared by threads; ends with its block."""

    def __init__(self, url: str, key: str | None = None) -> None:
        self._url = url.rstrip("/")
        self._has_key = bool(key)
        # A proxy of the environment must not stand between this machine and itself.
        is_local = is_loopback(urlsplit(self._url).hostname or "")
        self._client = httpx2.Client(timeout=_TIMEOUT, trust_env=not is_local, headers=_headers(key))

    def __enter__(self) -> "ServerClient":
        return self

    def __exit__(self, *_: object) -> None:
        self._client.close()

    def call(self, method: str, path: str, **options: Any) -> Row:
        """The JSON of an answer.

        Raises:
            NoAnswer: nothing listens there, or the connection broke.
            CommandFailed: the server refused, with its message.
        """
        try:
            response = self._client.request(method, self._url + path, **options)
        except httpx2.TransportError as error:
            raise NoAnswer(
                f"no answer from {self._url} ({error}); start a server with `promptplex serve`, or name "
                "another with --server URL"
            ) from None
        if response.is_error:
            raise CommandFailed(self._refusal(response))
        answer: Row = response.json()
        return answer

    def _refusal(self, response: httpx2.Response) -> str:
        if response.status_code != 401:
            return _error_message(response)
        if self._has_key:
            return f"{self._url} doesn't know this key (--key or PROMPTPLEX_KEY): was it removed?"
        return f"{self._url} wants a key: set PROMPTPLEX_KEY, or give --key"


def _headers(key: str | None) -> dict[str, str]:
    if not key:
        return {}
    if not key.isascii() or not key.isprintable() or " " in key:
        raise ValueError(
            "the key (--key or PROMPTPLEX_KEY) holds spaces or odd characters; was it cut in two?"
        )
    return {"authorization": f"Bearer {key}"}


def _error_message(response: httpx2.Response) -> str:
    try:
        return str(response.json()["error"]["message"])
    except (ValueError, KeyError, TypeError):
        return f"{response.url} answered {response.status_code}, which is not an answer of Promptplex"
