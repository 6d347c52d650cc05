"""`promptplex keys`, and the other commands on a server that wants a key."""

import re
import stat
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import pytest

from app.keys.key import hash_of, is_key_text
from app.keys.key_file import read_keys
from tests.cli.conftest import Server

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture
def keys_file(tmp_path: Path) -> Path:
    return tmp_path / "keys.json"


def test_a_key_is_made_listed_and_removed(promptplex: Run, keys_file: Path) -> None:
    file = ("--keys-file", str(keys_file))
    quotas = ("--requests-per-minute", "60", "--tokens-per-minute", "9000")
    status, out, err = promptplex(
        "keys", "add", "web", "--scope", "generate", "--scope", "upload", "--task", "team-*", *quotas, *file
    )
    assert status == 0
    assert is_key_text(out.removesuffix("\n"))  # and nothing else, so that a script can take it
    assert "shown only now" in err
    assert out.strip() not in err + keys_file.read_text()
    assert stat.S_IMODE(keys_file.stat().st_mode) == 0o600
    (key,) = read_keys(keys_file)
    assert key.sha256 == hash_of(out.strip())
    assert (key.tasks, key.requests_per_minute, key.tokens_per_minute) == (("team-*",), 60, 9000)
    assert promptplex("keys", "add", "ops", "--scope", "admin", *file)[0] == 0
    status, out, _ = promptplex("keys", "list", *file)
    lines = out.splitlines()
    assert lines[0].split() == ["name", "scopes", "tasks", "requests/min", "tokens/min", "created"]
    assert lines[1].split()[:5] == ["web", "generate,upload", "team-*", "60", "9000"]
    assert lines[2].split()[:5] == ["ops", "admin", "all", "-", "-"]
    assert promptplex("keys", "remove", "web", *file)[0] == 0
    assert [key.name for key in read_keys(keys_file)] == ["ops"]


def test_the_file_is_found_by_variable_or_default(
    promptplex: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    assert promptplex("keys", "add", "a", "--scope", "generate")[0] == 0
    monkeypatch.setenv("PROMPTPLEX_KEYS_FILE", str(tmp_path / "other.json"))
    assert promptplex("keys", "add", "b", "--scope", "generate")[0] == 0
    names = {path.name: [key.name for key in read_keys(path)] for path in tmp_path.glob("*.json")}
    assert names == {"keys.json": ["a"], "other.json": ["b"]}


@pytest.mark.parametrize(
    ("arguments", "status", "says"),
    [
        (("add", "web", "--scope", "generate"), 1, "there is a key web"),
        (("add", "new"), 2, "--scope"),
        (("add", "new", "--scope", "root"), 2, "generate"),
        (("add", "a b", "--scope", "generate"), 1, "can't be a key's name"),
        (("add", "new", "--scope", "generate", "--task", "a b"), 1, "no pattern"),
        (("add", "new", "--scope", "generate", "--task", "sentiment@3"), 1, "without version"),
        (("add", "new", "--scope", "metrics", "--task", "a"), 1, "make two keys"),
        (("add", "new", "--scope", "generate", "--requests-per-minute", "0"), 2, "1"),
        (("remove", "new"), 1, "which holds web"),
    ],
)
def test_what_is_refused_changes_nothing(
    promptplex: Run, keys_file: Path, arguments: tuple[str, ...], status: int, says: str
) -> None:
    promptplex("keys", "add", "web", "--scope", "generate", "--keys-file", str(keys_file))
    before = keys_file.read_bytes()
    ended, out, err = promptplex("keys", *arguments, "--keys-file", str(keys_file))
    assert (ended, out) == (status, "")
    assert says in err
    assert keys_file.read_bytes() == before


def test_listing_a_file_that_is_not_there(promptplex: Run, keys_file: Path) -> None:
    status, _, err = promptplex("keys", "list", "--keys-file", str(keys_file))
    assert (status, "No such file" in err) == (1, True)


# -- a server with keys --------------------------------------------------------------------------


class Keyed:
    """A server with a key file on all addresses, reached by loopback."""

    def __init__(self, url: str, file: Path, promptplex: Run) -> None:
        self.url = url
        self.file = file
        self._promptplex = promptplex

    def key(self, name: str, *flags: str) -> str:
        return self._promptplex("keys", "add", name, *flags, "--keys-file", str(self.file))[1].strip()


@pytest.fixture(scope="module")
def keyed_server(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[tuple[str, Path]]:
    root = tmp_path_factory.mktemp("keyed")
    file = root / "keys.json"
    file.write_text('{"format": 1, "keys": []}')
    flags = ("--model", str(base), "--store", str(root / "store"), "--dtype", "float32")
    with Server.running(*flags, "--keys-file", str(file), "--host", "0.0.0.0") as server:
        port = server.wait_until_ready().rsplit(":", 1)[1]
        assert "0 keys in" in server.log
        yield f"http://127.0.0.1:{port}", file


@pytest.fixture
def keyed(keyed_server: tuple[str, Path], promptplex: Run) -> Keyed:
    return Keyed(*keyed_server, promptplex)


def test_commands_send_the_key(keyed: Keyed, promptplex: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    server = ("--server", keyed.url)
    status, _, err = promptplex("list", *server)
    assert (status, "wants a key: set PROMPTPLEX_KEY" in err) == (1, True)
    all_scopes = ("--scope", "generate", "--scope", "upload", "--scope", "admin")
    monkeypatch.setenv("PROMPTPLEX_KEY", keyed.key("all", *all_scopes))
    for template in ("one {x}", "two {x}"):
        assert promptplex("push", "--task", "keyed", "--template", template, *server)[0] == 0
    assert "keyed" in promptplex("list", *server)[1]
    assert promptplex("alias", "keyed", "canary", "1", *server)[0] == 0
    assert promptplex("rollback", "keyed", *server)[0] == 0
    assert promptplex("retire", "keyed", *server)[0] == 0
    assert promptplex("restore", "keyed", *server)[0] == 0
    shown = promptplex("show", "keyed", *server)[1]
    assert re.findall(r"by (\S+) at", shown) == ["all"] * 6
    data = keyed.file.parent / "data.jsonl"
    data.write_text('{"inputs": "film", "expected": "film"}\n')
    evaluated = promptplex("eval", "--task", "keyed", "--data", str(data), "--max-new-tokens", "2", *server)
    assert evaluated[0] == 0, evaluated[2]


def test_a_key_that_is_not_enough_is_told_of(keyed: Keyed, promptplex: Run) -> None:
    generates = keyed.key("generates", "--scope", "generate")
    push = ("push", "--task", "keyed", "--template", "three {x}", "--server", keyed.url)
    status, _, err = promptplex(*push, "--key", generates)
    assert (status, "needs a key with the scope upload; this one has generate" in err) == (1, True)
    promptplex("keys", "remove", "generates", "--keys-file", str(keyed.file))
    status, _, err = promptplex("list", "--server", keyed.url, "--key", generates)
    assert (status, "doesn't know this key" in err) == (1, True)
    assert generates not in err
    status, _, err = promptplex("list", "--server", keyed.url, "--key", "ppx_a b")
    assert (status, "cut in two" in err) == (1, True)


def test_any_name_reaches_a_server_with_keys(keyed: Keyed) -> None:
    key = keyed.key("named", "--scope", "generate")
    headers = {"host": "prompts.example", "authorization": f"Bearer {key}"}
    assert httpx2.get(f"{keyed.url}/version", headers=headers, trust_env=False).status_code == 200
    del headers["authorization"]
    assert httpx2.get(f"{keyed.url}/version", headers=headers, trust_env=False).status_code == 401


def test_tokens_of_answers_are_charged(keyed: Keyed) -> None:
    key = keyed.key("frugal", "--scope", "generate", "--tokens-per-minute", "10")
    body = {"inputs": "the film", "parameters": {"max_new_tokens": 60}}

    def ask() -> httpx2.Response:
        headers = {"authorization": f"Bearer {key}"}
        return httpx2.post(f"{keyed.url}/generate", json=body, headers=headers, trust_env=False, timeout=60)

    first = ask()
    assert first.status_code == 200, first.text
    details = first.json()["details"]
    used = details["prompt_tokens"] + details["generated_tokens"]
    second = ask()
    assert second.status_code == 429, second.text
    assert "10 tokens a minute" in second.json()["error"]["message"]
    # A token comes back every six seconds; a little time has passed.
    assert 0 <= (used - 9) * 6 - int(second.headers["retry-after"]) <= 60


def test_tokens_of_what_a_grammar_ended_are_charged(keyed: Keyed) -> None:
    """Otherwise a schema that leads nowhere makes every prompt free."""
    key = keyed.key("nowhere", "--scope", "generate", "--tokens-per-minute", "10")
    grammar = {"type": "regex", "value": "[b-f]{30}a{4000000000}"}
    body = {"inputs": "the film " * 10, "parameters": {"max_new_tokens": 60, "grammar": grammar}}
    headers = {"authorization": f"Bearer {key}"}
    answers = [
        httpx2.post(f"{keyed.url}/generate", json=body, headers=headers, trust_env=False, timeout=60)
        for _ in range(2)
    ]
    assert [answer.status_code for answer in answers] == [422, 429]
    assert answers[0].json()["error"]["code"] == "constraint_failed"


@pytest.mark.parametrize(
    ("content", "says"), [(None, "promptplex keys add"), ("{", "can't be used"), ("{}", "can't be used")]
)
def test_a_server_ends_without_good_keys(
    promptplex: Run, base: Path, keys_file: Path, content: str | None, says: str
) -> None:
    if content is not None:
        keys_file.write_text(content)
    status, _, err = promptplex("serve", "--model", str(base), "--keys-file", str(keys_file), "--port", "0")
    assert status == 1
    assert "error: " in err
    assert says in err
    assert "Traceback" not in err
