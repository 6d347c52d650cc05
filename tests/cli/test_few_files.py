"""A server that may open few files: its connections fit, probes are answered, and the log stays short."""

import contextlib
import resource
import socket
import time
from collections.abc import Callable
from pathlib import Path
from urllib.parse import urlsplit

import httpx2
import pytest

from app.server.connection_limits import limits_for
from tests.cli.conftest import Server

FILES = 256
FEW_FILES = f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({FILES}, {FILES}))"


@pytest.mark.parametrize("files", [64, 256, 1024, 4096, 65_536, 1 << 20])
def test_the_bound_of_connections_fits_that_of_files(files: int) -> None:
    limits = limits_for(files, 8192)
    assert 1 <= limits.connections <= 8192
    assert (
        limits.connections + min(64, limits.connections) + 3 * limits.at_once + min(256, files // 2) <= files
    )
    if files >= 16_384:
        assert limits.connections == 8192


def test_idle_connections_keep_no_probe_out(serve: Callable[..., Server], base: Path, tmp_path: Path) -> None:
    server = serve("--model", str(base), "--store", str(tmp_path), "--dtype", "float32", fault=FEW_FILES)
    url = server.wait_until_ready()
    here = resource.getrlimit(resource.RLIMIT_NOFILE)
    assert here[0] > 1024, "this test needs some files itself"
    port = urlsplit(url).port or 0
    with contextlib.ExitStack() as stack:
        for _ in range(600):
            stack.enter_context(socket.create_connection(("127.0.0.1", port), timeout=60))
        answered, until = 0, time.monotonic() + 60
        while answered < 20:
            assert time.monotonic() < until, server.log
            with contextlib.suppress(httpx2.TransportError):
                answered += httpx2.get(f"{url}/health/live", trust_env=False, timeout=30).status_code == 200
    assert len(server.log.splitlines()) < 60, server.log
    assert "too many connections" in server.log
    assert "Traceback" not in server.log
    assert httpx2.get(f"{url}/health/ready", trust_env=False, timeout=30).status_code == 200
    assert server.end() == 0
