"""`promptplex serve` as a process of its own, and what it says of itself."""

import os
import re
import subprocess
import sys
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import httpx2
import psutil

from app.settings import ENV_PREFIX

_START_SECONDS = 120.0
_STOP_SECONDS = 60.0
_LISTENING = re.compile(r"running on (http://\S+)")
_PROMPT_CACHE = re.compile(r'^promptplex_prompt_cache_(hits|misses)_total\{tier="(\w+)"\} ([0-9.e+]+)$', re.M)


class Served(NamedTuple):
    """A running server."""

    url: str
    process: psutil.Process


@contextmanager
def serving(log: Path, settings: Mapping[str, object], checkout: Path | None = None) -> Iterator[Served]:
    """A server that is ready, on a port that it chose; it ends with the block.

    `checkout`: whose code and demo it serves; None: those of the working directory. Settings of the
    environment don't count. Raises RuntimeError where it doesn't come up.
    """
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in settings.items()]
    environment = {name: value for name, value in os.environ.items() if not name.startswith(ENV_PREFIX)}
    command = [sys.executable, "-m", "app.cli", "serve", "--port=0", *flags]
    if checkout is not None:
        environment["PYTHONPATH"] = str(checkout)
    with log.open("wb") as output:
        process = subprocess.Popen(command, stdout=output, stderr=output, env=environment, cwd=checkout)
    try:
        yield Served(_url_when_ready(process, log), psutil.Process(process.pid))
    finally:
        process.terminate()
        process.wait(_STOP_SECONDS)


def _url_when_ready(process: "subprocess.Popen[bytes]", log: Path) -> str:
    end = time.monotonic() + _START_SECONDS
    while process.poll() is None and time.monotonic() < end:
        found = _LISTENING.search(log.read_text())
        if found and httpx2.get(f"{found[1]}/health/ready", trust_env=False).is_success:
            return found[1]
        time.sleep(0.1)
    raise RuntimeError(f"the server didn't come up:\n{log.read_text()}")


async def prompt_cache_counts(client: httpx2.AsyncClient, url: str) -> dict[str, int]:
    """Such as {"host_hits": 5, "host_misses": 2}, since the server's start."""
    text = (await client.get(f"{url}/metrics")).text
    return {f"{tier}_{kind}": int(float(number)) for kind, tier, number in _PROMPT_CACHE.findall(text)}
