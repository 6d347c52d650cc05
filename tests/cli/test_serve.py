"""`promptplex serve` as an operator sees it: start, refuse, drain, exit status."""

import contextlib
import os
import re
import shutil
import signal
import socket
import stat
import threading
from collections.abc import Callable
from pathlib import Path

import httpx2
import pytest

from tests.cli.conftest import INTERPRETER, Server, wait_for_status
from tests.waiting import PATIENCE, wait_until

Serve = Callable[..., Server]
Run = Callable[..., tuple[int, str, str]]


def _flags(base: Path, store: Path) -> tuple[str, ...]:
    return ("--model", str(base), "--store", str(store), "--dtype", "float32")


def _get(url: str) -> httpx2.Response:
    return httpx2.get(url, trust_env=False, timeout=PATIENCE)


def _post(url: str, body: dict[str, object]) -> httpx2.Response:
    return httpx2.post(f"{url}/generate", json=body, trust_env=False, timeout=PATIENCE)


def test_the_port_answers_from_the_start_of_loading_to_the_end_of_a_drain(
    serve: Serve, base: Path, tmp_path: Path
) -> None:
    server = serve(*_flags(base, tmp_path), through=INTERPRETER)
    url = server.wait_for_port()
    assert _get(f"{url}/health/live").status_code == 200
    assert _get(f"{url}/health/ready").status_code == 503
    early = _post(url, {"inputs": "the film"})
    assert early.status_code == 503
    assert "retry-after" in early.headers
    server.wait_for("0 tasks can be served")
    wait_for_status(f"{url}/health/ready", 200)
    assert _post(url, {"inputs": "the film", "parameters": {"max_new_tokens": 3}}).status_code == 200
    assert "loopback" in server.log or "only this machine" in server.log
    assert "loading" in server.log  # progress is visible
    check_that_ctrl_c_lets_running_requests_finish(server, url)


def check_that_ctrl_c_lets_running_requests_finish(server: Server, url: str) -> None:
    answers: list[httpx2.Response] = []
    body: dict[str, object] = {"inputs": "the film", "parameters": {"max_new_tokens": 1500}}
    client = threading.Thread(target=lambda: answers.append(_post(url, body)))
    client.start()
    _wait_until_running(url)
    server.process.send_signal(signal.SIGINT)
    wait_for_status(f"{url}/health/ready", 503)
    refused = _post(url, {"inputs": "more"})
    assert refused.status_code == 503
    client.join(PATIENCE)
    assert answers[0].status_code == 200, answers[0].text
    assert server.wait() == 0


def _wait_until_running(url: str, at_least: int = 1) -> None:
    def is_running() -> bool:
        running = re.search(
            r"^promptplex_num_requests_running (\S+)$", _get(f"{url}/metrics").text, re.MULTILINE
        )
        return running is not None and float(running[1]) >= at_least

    wait_until(is_running, "the request never ran")


def test_a_signal_while_loading_ends_at_once(serve: Serve, base: Path, tmp_path: Path) -> None:
    server = serve(*_flags(base, tmp_path), through=INTERPRETER)  # whose end must not abort
    server.wait_for_port()
    assert server.end(signal.SIGTERM) == 0


def test_a_panic_of_native_code_while_loading_ends_the_process(
    serve: Serve, base: Path, tmp_path: Path
) -> None:
    fault = """
import app.main
class Panic(BaseException): pass
def fail(*_, **__): raise Panic("a panic")
app.main.Grammars = fail
"""
    server = serve(*_flags(base, tmp_path), fault=fault)
    assert server.wait() == 1
    assert "can't serve" in server.log
    assert "a panic" in server.log


def test_a_second_signal_cuts_the_drain_short(serve: Serve, base: Path, tmp_path: Path) -> None:
    server = serve(*_flags(base, tmp_path))
    url = server.wait_until_ready()
    body: dict[str, object] = {"inputs": "the film", "parameters": {"max_new_tokens": 2000}}

    def ask() -> None:
        with contextlib.suppress(httpx2.TransportError):
            _post(url, body)

    client = threading.Thread(target=ask)
    client.start()
    _wait_until_running(url)
    server.process.send_signal(signal.SIGINT)
    wait_for_status(f"{url}/health/ready", 503)
    assert server.end() == 1
    client.join(PATIENCE)


def test_other_addresses_are_refused(promptplex: Run, base: Path, tmp_path: Path) -> None:
    status, _, err = promptplex("serve", *_flags(base, tmp_path), "--host", "0.0.0.0")
    assert status == 1
    assert "error: host (--host or PROMPTPLEX_HOST): 0.0.0.0 can be reached" in err


def test_a_port_in_use(serve: Serve, base: Path, tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        server = serve(*_flags(base, tmp_path), "--port", str(taken.getsockname()[1]))
        assert server.wait() == 1
    assert "address already in use" in server.log


def test_a_base_that_is_not_there(serve: Serve, tmp_path: Path) -> None:
    server = serve(*_flags(tmp_path / "nothing", tmp_path))
    assert server.wait() == 1
    assert "can't serve" in server.log
    assert "Traceback" not in server.log


def test_the_demo_is_never_asked_of_a_hub(
    promptplex: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    status, _, err = promptplex("serve", "--port", "0")
    assert status == 1
    assert "no demo/demo-causal here" in err


def without_rights_of_root() -> list[str]:
    """A command that runs another one, for which files' modes count even where root runs the tests."""
    return ["setpriv", "--bounding-set=-dac_override", "--inh-caps=-all", "--"] if os.geteuid() == 0 else []


@pytest.mark.skipif(os.geteuid() == 0 and shutil.which("setpriv") is None, reason="root needs setpriv for it")
def test_a_store_that_can_not_be_written(serve: Serve, base: Path, tmp_path: Path) -> None:
    store = tmp_path / "store"
    store.mkdir()
    store.chmod(stat.S_IRUSR | stat.S_IXUSR)
    server = serve(*_flags(base, store), through=without_rights_of_root())
    url = server.wait_until_ready()
    assert _post(url, {"inputs": "x", "parameters": {"max_new_tokens": 1}}).status_code == 200
    files = {"task": (None, '{"template": "{x}"}')}
    refused = httpx2.post(f"{url}/tasks/new/versions", files=files, trust_env=False, timeout=PATIENCE)
    assert refused.status_code in (503, 507), refused.text
    assert server.end() == 0
