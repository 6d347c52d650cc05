"""The container's entrypoint, run as it is, with the real commands and a real server behind it."""

import contextlib
import json
import os
import shutil
import signal
import stat
import subprocess
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.bases import save_tiny_llama
from tests.cli.conftest import wait_for_status
from tests.store.redis_server import free_port
from tests.waiting import PATIENCE, wait_until

ROOT = Path(__file__).parents[2]
COMMAND = [sys.executable, str(ROOT / "docker" / "entrypoint.py")]


class Container:
    """An entrypoint's process, in a directory that stands for the image, with volumes beside it."""

    def __init__(self, place: Path) -> None:
        self.image, self.store = place / "image", place / "store"
        self.keys, self.metrics_key = place / "keys" / "keys.json", place / "metrics-key" / "key"
        for directory in (self.image / "demo", self.store, self.keys.parent, self.metrics_key.parent):
            directory.mkdir(parents=True)
        (self.image / "demo" / "demo-causal").symlink_to(ROOT / "demo" / "demo-causal")
        (self.image / "prompts_store").symlink_to(ROOT / "prompts_store")
        self.environment = {name: value for name, value in os.environ.items() if "PROMPTPLEX" not in name}
        self.environment |= {
            "PATH": f"{Path(sys.executable).parent}:{os.environ['PATH']}",
            "METRICS_KEY_FILE": str(self.metrics_key),
            "PROMPTPLEX_KEYS_FILE": str(self.keys),
            "PROMPTPLEX_STORE": str(self.store),
            "PROMPTPLEX_HOST": "127.0.0.1",
            "PROMPTPLEX_PORT": str(free_port()),
            "PROMPTPLEX_LOG_FORMAT": "json",
            "PROMPTPLEX_DTYPE": "float32",
        }
        self.process: subprocess.Popen[str] | None = None

    def run(self, *arguments: str) -> subprocess.CompletedProcess[str]:
        """To its end."""
        return subprocess.run(
            [*COMMAND, *arguments],
            cwd=self.image,
            env=self.environment,
            capture_output=True,
            text=True,
            check=False,
            timeout=PATIENCE,
        )

    def serve(self, *arguments: str) -> str:
        """Until it is ready; the URL."""
        with open(self.image.parent / "log", "w") as log:
            self.process = subprocess.Popen(
                [*COMMAND, *arguments], cwd=self.image, env=self.environment, stderr=log, text=True
            )
        url = f"http://127.0.0.1:{self.environment['PROMPTPLEX_PORT']}"
        _wait_until_ready(f"{url}/health/ready", self.process)
        return url

    @property
    def log(self) -> str:
        return (self.image.parent / "log").read_text()


def _wait_until_ready(url: str, process: "subprocess.Popen[str]") -> None:
    def is_ready() -> bool:
        assert process.poll() is None, "the server ended"
        with contextlib.suppress(httpx2.TransportError):
            return httpx2.get(url, trust_env=False).status_code == 200
        return False

    wait_until(is_ready, "the server doesn't get ready")


@pytest.fixture
def container(tmp_path: Path) -> Iterator[Container]:
    made = Container(tmp_path)
    yield made
    if made.process is not None and made.process.poll() is None:
        made.process.kill()
        made.process.wait()


def bearer(path: Path) -> dict[str, str]:
    return {"authorization": f"Bearer {path.read_text().strip()}"}


def mode(path: Path) -> int:
    return stat.S_IMODE(path.stat().st_mode)


def test_an_empty_container_serves_the_demo_behind_keys(container: Container) -> None:
    assert not is_healthy(container)
    url = container.serve()
    assert is_healthy(container)
    admin_key = container.keys.with_name("admin.key")
    ask = {"task_id": "date-iso", "inputs": "the 22nd of November 1963"}
    assert httpx2.post(f"{url}/generate", json=ask, trust_env=False).status_code == 401
    answer = httpx2.post(f"{url}/generate", json=ask, headers=bearer(admin_key), trust_env=False)
    assert answer.json()["generated_text"] == "1963-11-22"
    # Prometheus' key reads metrics and nothing else.
    for path, status in (("/metrics", 200), ("/tasks", 403)):
        found = httpx2.get(url + path, headers=bearer(container.metrics_key), trust_env=False)
        assert found.status_code == status
    assert (mode(container.keys), mode(admin_key), mode(container.metrics_key)) == (0o600, 0o600, 0o640)
    assert str(admin_key) in container.log
    assert "ppx_" not in container.log  # no key is in the log
    assert sorted(path.name for path in container.keys.parent.iterdir()) == [
        ".making-keys",
        "admin.key",
        "keys.json",
    ]
    assert not list(container.store.glob(".samples-*"))


def test_sigterm_lets_running_requests_finish(container: Container, tmp_path: Path) -> None:
    base = save_tiny_llama(tmp_path / "tiny")  # random weights: it doesn't stop by itself
    url = container.serve("--model", str(base))
    key = bearer(container.keys.with_name("admin.key"))
    ask = {"inputs": "the film", "parameters": {"max_new_tokens": 1500}}
    answers: list[httpx2.Response] = []

    def generate() -> None:
        answers.append(
            httpx2.post(f"{url}/generate", json=ask, headers=key, trust_env=False, timeout=PATIENCE)
        )

    client = threading.Thread(target=generate)
    client.start()
    _wait_until_running(url, key)
    assert container.process is not None
    container.process.send_signal(signal.SIGTERM)  # to the process that was started: it is the server
    wait_for_status(f"{url}/health/ready", 503)
    client.join(PATIENCE)
    assert answers[0].status_code == 200
    assert container.process.wait(PATIENCE) == 0


def _wait_until_running(url: str, headers: dict[str, str]) -> None:
    for _ in range(500):
        text = httpx2.get(f"{url}/metrics", headers=headers, trust_env=False).text
        if "promptplex_num_requests_running 1.0" in text:
            return
    raise AssertionError("the request never ran")


def is_healthy(container: Container) -> bool:
    """What the image's health check says, whatever proxy the container has."""
    check = [sys.executable, str(ROOT / "docker" / "healthcheck.py")]
    environment = container.environment | {"http_proxy": "http://127.0.0.1:1"}
    return not subprocess.run(check, env=environment, capture_output=True, check=False).returncode


def test_keys_that_are_there_are_left_alone(container: Container) -> None:
    made = container.run("keys", "add", "mine", "--scope", "generate")
    assert made.stdout.startswith("ppx_")
    before = container.keys.read_bytes()
    done = container.run("serve", "--port", "no number")  # prepares, then `serve` says what is wrong
    assert done.returncode == 1
    assert "--port or PROMPTPLEX_PORT" in done.stderr
    assert container.keys.read_bytes() == before
    assert not container.keys.with_name("admin.key").exists()
    assert f"Prometheus finds no key in {container.metrics_key}" in done.stderr


def test_grafanas_password_is_made_once(container: Container) -> None:
    container.run("--port", "no number")
    folder = container.metrics_key.parent
    assert [path.name for path in folder.iterdir()] == ["key"]  # nobody asked for one
    file = folder / "grafana-password"
    container.environment["GRAFANA_PASSWORD_FILE"] = str(file)
    first = container.run("--port", "no number")
    password = file.read_text().strip()
    assert (len(password) >= 32, mode(file), str(file) in first.stderr) == (True, 0o640, True)
    assert password not in first.stderr
    assert sorted(path.name for path in folder.iterdir()) == ["grafana-password", "key"]
    container.run("--port", "no number")
    assert file.read_text().strip() == password


def test_a_missing_directory_for_keys_is_said(container: Container) -> None:
    shutil.rmtree(container.keys.parent)
    done = container.run()
    assert done.returncode == 1
    assert str(container.keys.parent) in done.stderr
    assert "docs/deployment.md" in done.stderr
    assert "Traceback" not in done.stderr


def test_what_was_cut_short_begins_anew(container: Container) -> None:
    container.keys.with_name("keys.json.new").write_text("half")
    container.keys.with_name("admin.key").write_text("of a start that ended too early")
    container.run("--port", "no number")
    names = [key["name"] for key in json.loads(container.keys.read_text())["keys"]]
    assert sorted(names) == ["admin", "prometheus"]
    assert container.keys.with_name("admin.key").read_text().startswith("ppx_")


def test_samples_come_only_with_the_demo_and_into_an_empty_store(container: Container) -> None:
    container.run("--model", "somewhere/else", "--port", "no number")
    assert not list(container.store.iterdir())
    (container.store / "tasks").mkdir()
    (container.store / "lost+found").mkdir()  # of a new file system
    container.run("--port", "no number")
    shipped = {path.name for path in (ROOT / "prompts_store" / "tasks").iterdir()}
    assert {path.name for path in (container.store / "tasks").iterdir()} == shipped
    for task in shipped - {"sentiment"}:
        shutil.rmtree(container.store / "tasks" / task)
    container.run("--port", "no number")
    assert [path.name for path in (container.store / "tasks").iterdir()] == ["sentiment"]


def test_arguments_reach_the_command_as_they_are(container: Container, tmp_path: Path) -> None:
    flag = f"$(touch {tmp_path}/oops)`touch {tmp_path}/oops`; touch {tmp_path}/oops"
    done = container.run("--served-name", flag, "--port", flag)
    assert done.returncode == 1
    assert not (tmp_path / "oops").exists()
    assert container.run("--version").returncode != 0  # flags alone are those of serve
    assert container.run("keys", "list").stdout.startswith("name")
