"""The Dockerfile's instructions in a clean Debian, and the service from its final root."""

import os
import shutil
import signal
import subprocess
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from tests.docker import clean_root
from tests.store.redis_server import free_port

pytestmark = [
    pytest.mark.soak,
    pytest.mark.skipif(
        os.geteuid() != 0 or not all(map(shutil.which, ("debootstrap", "unshare", "chroot", "setpriv"))),
        reason="needs root, debootstrap and unshare",
    ),
]


@pytest.fixture(scope="module")
def built(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    directory = tmp_path_factory.mktemp("roots")
    try:
        clean_root.make_base(directory)
        clean_root.build(directory, {"TORCH_INDEX_URL": ""})
        yield directory
    finally:
        shutil.rmtree(directory)  # gigabytes, and nothing is mounted there: the namespaces are gone


def inside(built: Path, *command: str) -> "subprocess.CompletedProcess[str]":
    """What a container's user gets to see."""
    return subprocess.run(
        clean_root.run_command(built, list(command)), capture_output=True, text=True, check=False, timeout=120
    )


def test_the_root_holds_what_serving_needs_and_nothing_to_build_with(built: Path) -> None:
    assert inside(built, "id", "-u").stdout.strip() == "10001"
    assert inside(built, "touch", "/srv/promptplex/x").returncode != 0
    assert "Read-only file system" in inside(built, "touch", "/var/tmp/x").stderr
    assert inside(built, "touch", "/store/x", "/keys/x", "/cache/x", "/tmp/x").returncode == 0
    for tool in ("pip", "gcc", "g++", "make", "git"):
        assert inside(built, "which", tool).returncode != 0, tool
    find = "import app.models.cpu.building as b; print(len(b.SOURCES) > 0)"
    assert inside(built, "python3", "-c", find).stdout.strip() == "True"


def test_it_serves_as_nobody_from_a_read_only_root_and_drains(built: Path) -> None:
    port = free_port()
    command = clean_root.run_command(
        built,
        clean_root.entrypoint(),
        extra={
            "PROMPTPLEX_HOST": "127.0.0.1",  # no network namespace is in between here
            "PROMPTPLEX_PORT": str(port),
            "METRICS_KEY_FILE": "/metrics-key/key",
        },
    )
    url = f"http://127.0.0.1:{port}"
    with subprocess.Popen(command) as process:
        try:
            wait_until_ready(f"{url}/health/ready", process)
            assert inside_check(built, port) == 0
            headers = {"authorization": f"Bearer {(built / 'volumes/keys/admin.key').read_text().strip()}"}
            ask = {"task_id": "date-iso", "inputs": "the 22nd of November 1963"}
            assert httpx2.post(f"{url}/generate", json=ask, trust_env=False).status_code == 401
            answer = httpx2.post(f"{url}/generate", json=ask, headers=headers, trust_env=False, timeout=60)
            assert answer.json()["generated_text"] == "1963-11-22"
            status = Path(f"/proc/{process.pid}/status").read_text()
            assert "Uid:\t10001\t10001\t10001\t10001" in status
            assert "CapEff:\t0000000000000000" in status
            process.send_signal(signal.SIGTERM)
            assert process.wait(60) == 0
        finally:
            process.kill()
    assert (built / "volumes/metrics-key/key").stat().st_mode & 0o777 == 0o640


def inside_check(built: Path, port: int) -> int:
    """The image's own health check."""
    stage = clean_root.settled("serve")
    command = clean_root.run_command(built, stage.healthcheck, extra={"PROMPTPLEX_PORT": str(port)})
    return subprocess.run(command, check=False, timeout=60).returncode


def test_keys_that_are_mounted_read_only_do(built: Path) -> None:
    command = clean_root.run_command(
        built, clean_root.entrypoint("--port", "no number"), readonly_volumes=("/keys",)
    )
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=120)
    assert "--port or PROMPTPLEX_PORT" in done.stderr, done.stderr
    assert "Traceback" not in done.stderr


def wait_until_ready(url: str, process: "subprocess.Popen[bytes]") -> None:
    pause = threading.Event()
    for _ in range(600):
        assert process.poll() is None, "the server ended"
        try:
            if httpx2.get(url, trust_env=False).status_code == 200:
                return
        except httpx2.TransportError:
            pass
        pause.wait(0.2)
    raise AssertionError("the server doesn't get ready")
