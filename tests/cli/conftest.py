"""A real server in its own process, a tiny base, and prompts that PEFT just saved."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any

import httpx2
import pytest
import torch
from peft import PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForCausalLM

from app.cli import main
from tests.api.server import hosted
from tests.bases import save_tiny_llama
from tests.processes import Forked
from tests.waiting import PATIENCE, wait_until

INTERPRETER: Sequence[str] = ()  # starts a server through nothing but Python itself


class Server:
    """`promptplex serve` on a free port; its log lines can be waited for."""

    def __init__(self, *flags: str, fault: str = "", through: Sequence[str] | None = None) -> None:
        """Start one. `fault` is Python that runs first, to break something.

        `through` is a command to start an interpreter with, instead of a fork.
        """
        environment = {name: value for name, value in os.environ.items() if "PROMPTPLEX" not in name}
        arguments = ["serve", "--port", "0", *flags]
        self.process: Forked | subprocess.Popen[str]
        if through is None:
            self.process = Forked(arguments, environment, fault)
        else:
            code = f"{fault}\nfrom app.cli import main\nmain()"
            command = [*through, sys.executable, "-c", code, *arguments]
            self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, env=environment)
        self._lines: list[str] = []
        self._news = threading.Condition()
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    @classmethod
    @contextlib.contextmanager
    def running(
        cls, *flags: str, fault: str = "", through: Sequence[str] | None = None
    ) -> "Iterator[Server]":
        """A server that ends with the block."""
        server = cls(*flags, fault=fault, through=through)
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.process.kill()
            server.wait()

    def _read(self) -> None:
        assert self.process.stderr is not None
        with self.process.stderr:
            for line in self.process.stderr:
                with self._news:
                    self._lines.append(line.rstrip())
                    self._news.notify_all()
        with self._news:
            self._lines.append("<end>")
            self._news.notify_all()

    @property
    def log(self) -> str:
        return "\n".join(self._lines)

    def wait_for(self, text: str) -> str:
        """The first line of the log that holds `text`."""

        def found() -> str | None:
            return next((line for line in self._lines if text in line or line == "<end>"), None)

        with self._news:
            line = self._news.wait_for(found, PATIENCE)
        assert line is not None, f"no {text!r} in time:\n{self.log}"
        assert text in line, f"ended without {text!r}:\n{self.log}"
        return line

    def wait_for_port(self) -> str:
        """The URL, as soon as the port is open."""
        line = self.wait_for("running on http://")
        return line.split("running on ")[1].split()[0]

    def wait_until_ready(self) -> str:
        """The URL, as soon as requests are served."""
        url = self.wait_for_port()
        self.wait_for("ready: ")
        return url

    def end(self, number: int = signal.SIGINT) -> int:
        """Send a signal; the exit status."""
        self.process.send_signal(number)
        return self.wait()

    def wait(self) -> int:
        """The exit status, once it ends by itself."""
        status = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return status


@pytest.fixture
def serve() -> Iterator[Callable[..., Server]]:
    """Start servers that end with the test."""
    with contextlib.ExitStack() as stack:
        yield lambda *flags, **how: stack.enter_context(Server.running(*flags, **how))


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny random llama called `tiny`."""
    return save_tiny_llama(tmp_path_factory.mktemp("base") / "tiny")


@pytest.fixture(scope="module")
def server_url(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """One server for the module, on an empty store."""
    with hosted(model=str(base), store=tmp_path_factory.mktemp("store"), dtype="float32") as url:
        yield url


@pytest.fixture(scope="session")
def save_peft(base: Path) -> Callable[..., Path]:
    """Save a random PEFT prompt for the base into a directory."""

    def save(directory: Path, *, kind: str = "soft", tokens: int = 5, seed: int = 0) -> Path:
        torch.manual_seed(seed)
        model = AutoModelForCausalLM.from_pretrained(base)
        configs: dict[str, Any] = {"soft": PromptTuningConfig, "prefix": PrefixTuningConfig}
        config = configs[kind](task_type="CAUSAL_LM", num_virtual_tokens=tokens)
        get_peft_model(model, config).save_pretrained(directory)
        return directory

    return save


@pytest.fixture
def unused_port() -> int:
    """A port that nothing listens on."""
    with socket.create_server(("127.0.0.1", 0)) as probe:
        port: int = probe.getsockname()[1]
    return port


@pytest.fixture
def promptplex(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> Callable[..., tuple[int, str, str]]:
    """Run a command in this process: exit status, stdout, stderr."""

    def run(*arguments: str) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["promptplex", *arguments])
        capsys.readouterr()
        with pytest.raises(SystemExit) as ended:
            main()
        out, err = capsys.readouterr()
        return int(ended.value.code or 0), out, err

    return run


def wait_for_status(url: str, status: int) -> None:
    """Until a GET answers with `status`."""
    wait_until(
        lambda: httpx2.get(url, trust_env=False, timeout=PATIENCE).status_code == status,
        f"{url} never answers {status}",
    )
