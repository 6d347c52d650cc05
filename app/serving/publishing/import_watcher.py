"""Watch a folder: a PEFT directory dropped into it becomes a version of the task of its name.

A directory is taken when two scans in a row find it unchanged, so that a copy under way isn't. A directory
that was imported before is the same version again, so a restart publishes nothing twice, and several
replicas may watch one folder. A refusal is logged once, and tried again when the directory has changed.
Scanning takes at most a twentieth of the time, and reads are bounded, however much lies there.
"""

import asyncio
import logging
import os
import time
from dataclasses import replace
from itertools import islice
from pathlib import Path

from app.errors import PromptplexError, StoreFull, Unavailable
from app.serving.publishing.bundle import Bundle, read_bundle
from app.serving.publishing.publisher import PublishingService

_log = logging.getLogger(__name__)
_SECONDS = 1.0  # between two scans, at least
_PAUSE = 20.0  # times as long as a scan took, at least
MAX_DIRECTORIES = 10_000  # of a scan
MAX_FILES = 256  # of a directory that is taken
_Snapshot = tuple[tuple[str, int, int], ...]  # name, size and time of change of each file


class ImportWatcher:
    """Publishes directories that appear in a folder."""

    def __init__(self, folder: Path, publishing: PublishingService) -> None:
        self._folder = folder
        self._publishing = publishing
        self._seen: dict[str, _Snapshot] = {}
        self._done: dict[str, _Snapshot] = {}  # imported or refused, as it was then
        self._scan_seconds = 0.0  # that the last scan took
        self._warned: dict[str, str] = {}  # temporary failures that were logged, by directory; "": the folder

    async def watch(self) -> None:
        """Scan again and again, until cancelled."""
        _log.info("watching %s for prompts to import", self._folder)
        while True:
            await self.scan()
            await asyncio.sleep(max(_SECONDS, _PAUSE * self._scan_seconds))

    def _warn_once(self, about: str, what: str) -> None:
        """Log a warning once, as long as it stays the same."""
        if self._warned.get(about) != what:
            self._warned[about] = what
            _log.warning("%s", what)

    async def scan(self) -> None:
        """Import every directory that is new or changed, and unchanged since the scan before."""
        begin = time.monotonic()
        try:
            found = await asyncio.to_thread(_scan, self._folder)
        except OSError as error:
            self._warn_once("", f"the folder to import from can't be read: {error.strerror}")
            return
        self._scan_seconds = time.monotonic() - begin
        if len(found) < MAX_DIRECTORIES:
            self._warned.pop("", None)
        else:
            limit = f"only {MAX_DIRECTORIES} directories of the folder to import from are looked at"
            self._warn_once("", limit)
        self._done = {name: snapshot for name, snapshot in self._done.items() if name in found}
        for name, snapshot in found.items():
            if self._seen.get(name) == snapshot and self._done.get(name) != snapshot:
                self._done[name] = snapshot
                await self._import(self._folder / name, snapshot)
        self._seen = found

    async def _import(self, directory: Path, snapshot: _Snapshot) -> None:
        try:
            bundle = await asyncio.to_thread(_read_unchanged, directory, snapshot)
            async with self._publishing.slot:
                result = await self._publishing.upload(directory.name, replace(bundle, who="import-dir"))
        except (Unavailable, StoreFull, OSError) as error:  # no fault of the directory
            failure = f"{directory.name} was not imported yet, and is tried again: {error}"
            self._warn_once(directory.name, failure)
            self._done.pop(directory.name)
            return
        except (PromptplexError, ValueError) as error:
            _log.warning("%s was not imported: %s", directory.name, error)
            return
        except Exception:
            _log.exception("%s was not imported", directory.name)
            return
        self._warned.pop(directory.name, None)
        version = result.version
        for warning in result.warnings:
            _log.warning("%s: %s", directory.name, warning)
        state = "imported as" if result.created else "is already"
        _log.info("%s %s %s@%d", directory.name, state, version.task_id, version.version)


def _read_unchanged(directory: Path, snapshot: _Snapshot) -> Bundle:
    """Read a directory. Raise ValueError where it can't be read, Unavailable where it has changed since."""
    if len(snapshot) > MAX_FILES:
        raise ValueError(f"it holds more than {MAX_FILES} files; leave in it what is to be imported")
    bundle = read_bundle(directory)
    if _snapshot_of(directory) != snapshot:
        raise Unavailable("it is being written")
    return bundle


def _scan(folder: Path) -> dict[str, _Snapshot]:
    """Return a snapshot of each directory that isn't empty; links are not followed."""
    with os.scandir(folder) as entries:
        names = (
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        )
        snapshots = {name: _snapshot_of(folder / name) for name in islice(names, MAX_DIRECTORIES)}
    return {name: snapshot for name, snapshot in snapshots.items() if snapshot}


def _snapshot_of(directory: Path) -> _Snapshot:
    """Return the state of at most MAX_FILES + 1 files of a directory."""
    try:
        with os.scandir(directory) as entries:
            plain = (entry for entry in entries if entry.is_file())
            files = [(entry.name, entry.stat()) for entry in islice(plain, MAX_FILES + 1)]
    except OSError:  # it is changing: the next scan sees what became of it
        return ()
    return tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in files))
