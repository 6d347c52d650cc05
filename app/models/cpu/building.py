"""From native/*.cpp to a shared library: compiled once for this processor, kept in the user's cache."""

import contextlib
import fcntl
import hashlib
import logging
import os
import platform
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from app.models.cpu.openmp import loaded_runtime
from app.models.user_cache import cache_directory

log = logging.getLogger("promptplex.models")

_FOLDER = Path(__file__).with_name("native")
SOURCES = sorted(_FOLDER.glob("*.cpp"))
_HEADERS = sorted(_FOLDER.glob("*.h"))
_FLAGS = ("-std=c++17", "-O3", "-march=native", "-ffp-contract=fast", "-fno-math-errno", "-fPIC")
_COMPILERS = ("g++", "c++", "clang++")
_SECONDS = 120.0


class NotBuilt(Exception):
    """There is no library; the message gives the reason."""


def build() -> Path:
    """Return the library of this source, compiler and processor, after compiling it if there is none.

    Raise NotBuilt: there is no compiler, or it fails.
    """
    compiler = next((path for name in _COMPILERS if (path := shutil.which(name))), None)
    if compiler is None:
        raise NotBuilt(f"no C++ compiler found ({', '.join(_COMPILERS)})")
    openmp = loaded_runtime()  # a second runtime would fight it for the cores
    if openmp is None:
        raise NotBuilt("this torch doesn't use GNU OpenMP")
    target = _cache() / f"kernels-{_key(compiler, openmp)}.so"
    if not target.is_file():
        with _alone_in(target.parent):
            if not target.is_file():  # another process may have compiled it meanwhile
                _compile(compiler, openmp, target)
    return target


@contextlib.contextmanager
def _alone_in(directory: Path) -> Iterator[None]:
    """Wait for other processes that compile into a directory, where its file system has locks."""
    descriptor = os.open(directory, os.O_RDONLY)
    try:
        with contextlib.suppress(OSError):
            fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


def _cache() -> Path:
    """Return a directory of the user's own, since what lies in it is loaded and run."""
    try:
        directory = cache_directory()
        if _is_private(directory):
            return directory
        reason = f"{directory} must be writable by this user alone; remove it, or `chmod 700` it"
    except OSError as error:
        reason = f"the cache directory can't be used ({error}); name another one with XDG_CACHE_HOME"
    log.warning("the CPU kernels are compiled at every start: %s", reason)
    return Path(tempfile.mkdtemp(prefix="promptplex-kernels-"))


def _is_private(directory: Path) -> bool:
    about = directory.stat()
    return about.st_uid == os.getuid() and not about.st_mode & 0o022 and os.access(directory, os.W_OK)


def _key(compiler: str, openmp: str) -> str:
    version = subprocess.run([compiler, "--version"], capture_output=True, check=False).stdout
    sources = [path.read_bytes() for path in (*SOURCES, *_HEADERS)]
    parts = [*sources, version, openmp.encode(), " ".join(_FLAGS).encode(), _processor()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()[:24]


def _processor() -> bytes:
    """Return what -march=native depends on."""
    cpuinfo = Path("/proc/cpuinfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.is_file() else []
    named = (line for line in lines if line.startswith(("flags", "Features", "model name")))
    return "\n".join([platform.machine(), *sorted(set(named))]).encode()


def _compile(compiler: str, openmp: str, target: Path) -> None:
    """Compile under a temporary name first: a process may be killed, or there are no locks."""
    with tempfile.TemporaryDirectory(dir=target.parent, prefix="building-") as folder:
        objects = {source: str(Path(folder) / f"{source.stem}.o") for source in SOURCES}
        with ThreadPoolExecutor() as pool:
            commands = ([compiler, *_FLAGS, "-fopenmp", "-c", str(s), "-o", o] for s, o in objects.items())
            list(pool.map(_run, commands))
        linked = Path(folder) / "kernels.so"
        # Linked without -fopenmp, which would bring the compiler's own OpenMP runtime.
        _run([compiler, "-shared", *objects.values(), openmp, "-o", str(linked)])
        linked.replace(target)


def _run(command: list[str]) -> None:
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=_SECONDS, check=False)
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotBuilt(f"{command[0]} failed: {error}") from error
    if done.returncode:
        raise NotBuilt(f"{command[0]} failed: {done.stderr.strip()[:500]}")
