"""Clients as strangers install them: in environments of their own, made once, never in the project's.

They lie in `.clients/`, or where PROMPTPLEX_CLIENTS says.
"""

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
import sysconfig
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

HERE = Path(__file__).parent
PROGRAMS = HERE / "programs"
CACHE = Path(os.environ.get("PROMPTPLEX_CLIENTS", HERE.parents[1] / ".clients")).resolve()
INSTALL_SECONDS = 900
RUN_SECONDS = 240


def python_program(environment: str, program: str, *arguments: str) -> list[str]:
    """The command that runs a program of ours in an environment; skips where that can't be made."""
    return [str(_python_of(environment)), str(PROGRAMS / f"{program}.py"), *arguments]


def command_of(environment: str, script: str) -> str:
    """A command that a client brings."""
    return str(_python_of(environment).with_name(script))


def node_program(program: str, *arguments: str) -> list[str]:
    """The same for Node."""
    for tool in ("node", "npm"):
        if shutil.which(tool) is None:
            pytest.skip(f"{tool} is not installed")
    with _environment("node", HERE / "requirements" / "package.json") as (folder, is_new):
        if is_new:
            shutil.copy(HERE / "requirements" / "package.json", folder)
            _install(["npm", "install", "--no-audit", "--no-fund", "--prefix", str(folder)])
    shutil.copy(PROGRAMS / program, folder)  # packages are looked for beside it
    return ["node", str(folder / program), *arguments]


def java_program(program: str, *arguments: str) -> list[str]:
    """One source file, compiled in memory."""
    if shutil.which("javac") is None:
        pytest.skip("no JDK is installed")
    return ["java", str(PROGRAMS / program), *arguments]


def run(command: list[str]) -> subprocess.CompletedProcess[str]:
    """Run a client, with neither proxies nor a hub."""
    environment = {
        **os.environ,
        "NO_PROXY": "*",
    }
    environment.pop("HF_HUB_OFFLINE", None)  # its client then refuses every address, this machine's too
    return subprocess.run(
        command, env=environment, capture_output=True, text=True, timeout=RUN_SECONDS, check=False
    )


def _python_of(name: str) -> Path:
    requirements = HERE / "requirements" / f"{name}.txt"
    with _environment(name, requirements) as (folder, is_new):
        python = folder / "bin" / "python"
        if is_new:
            _install([sys.executable, "-m", "venv", str(folder)])
            beside = requirements.read_text().startswith("#")
            if beside:
                (site,) = folder.glob("lib/python*/site-packages")
                (site / "project.pth").write_text(sysconfig.get_paths()["purelib"] + "\n")
            install = [str(python), "-m", "pip", "install", "--quiet", "--disable-pip-version-check"]
            _install([*install, *(["--no-deps"] if beside else []), "-r", str(requirements)])
    return python


@contextmanager
def _environment(name: str, pinned: Path) -> Iterator[tuple[Path, bool]]:
    """Its folder, and whether it is still to be filled; one process at a time."""
    digest = hashlib.sha256(f"{pinned.read_text()}{sys.version}{sys.prefix}".encode()).hexdigest()[:12]
    folder = CACHE / f"{name}-{digest}"
    folder.mkdir(parents=True, exist_ok=True)
    done = folder / "installed"
    with (folder / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield folder, not done.exists()
        done.touch()


def _install(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=INSTALL_SECONDS, check=False)
    except subprocess.TimeoutExpired:
        pytest.skip(f"{command[0]} took more than {INSTALL_SECONDS} s")
    if done.returncode:
        said = (done.stderr.strip() or done.stdout.strip()).splitlines()
        pytest.skip(f"the client can't be installed here: {said[-1] if said else command}")
