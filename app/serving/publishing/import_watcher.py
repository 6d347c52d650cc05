"""A folder that is watched: a PEFT directory dropped into it becomes a version of the task of its name.

A directory is taken when two looks in a row find it unchanged, so that a copy under way isn't. A directory
that was imported before is the same version again, so a restart publishes nothing twice, and several
replicas may watch one folder. A refusal is logged once, and tried again when the directory has changed.
Looking takes at most a twentieth of the time, and reads are bounded, however much lies there.
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
from app.serving.publishing.publisher import PublishingService, UploadResult
from app.store.references import check_task_id

_log = logging.getLogger(__name__)
_SECONDS = 1.0  # between two looks, at least
_PAUSE = 20.0  # times as long as a look took, at least
MAX_DIRECTORIES = 10_000  # that are looked at
MAX_FILES = 256  # of a directory that is taken
_Look = tuple[tuple[str, int, int], ...]  # name, size and time of change of each file


class ImportWatcher:
    """Publishes directories that appear in a folder."""

    def __init__(self, folder: Path, publishing: PublishingService) -> None:
        self._folder = folder
        self._publishing = publishing
        self._seen: dict[str, _Look] = {}
        self._done: dict[str, _Look] = {}  # imported or refused, as it looked then
        self._look_seconds = 0.0  # that the last look took
        self._said: dict[str, str] = {}  # temporary failures that were logged, by directory; "": the folder

    async def watch(self) -> None:
        """Look again and again, until cancelled."""
        _log.info("watching %s for prompts to import", self._folder)
        while True:
            await self.look()
            await asyncio.sleep(max(_SECONDS, _PAUSE * self._look_seconds))

    def _say(self, about: str, what: str) -> None:
        """Log it once, as long as it stays the same."""
        if self._said.get(about) != what:
            self._said[about] = what
            _log.warning("%s", what)

    async def look(self) -> None:
        """Import every directory that is new or changed, and is as it was at the look before."""
        begin = time.monotonic()
        try:
            found = await asyncio.to_thread(_look_into, self._folder)
        except OSError as error:
            self._say("", f"the folder to import from can't be read: {error.strerror}")
            return
        self._look_seconds = time.monotonic() - begin
        if len(found) < MAX_DIRECTORIES:
            self._said.pop("", None)
        else:
            self._say("", f"only {MAX_DIRECTORIES} directories of the folder to import from are looked at")
        self._done = {name: look for name, look in self._done.items() if name in found}
        for name, look in found.items():
            if self._seen.get(name) == look and self._done.get(name) != look:
                self._done[name] = look
                await self._import(self._folder / name, look)
        self._seen = found

    async def _import(self, directory: Path, look: _Look) -> None:
        try:
            bundle = await asyncio.to_thread(_read_still, directory, look)
            result = await self._publish(directory.name, bundle)
        except (Unavailable, StoreFull, OSError) as error:  # no fault of the directory
            self._say(directory.name, f"{directory.name} was not imported yet, and is tried again: {error}")
            self._done.pop(directory.name)
            return
        except (PromptplexError, ValueError) as error:
            _log.warning("%s was not imported: %s", directory.name, error)
            return
        except Exception:
            _log.exception("%s was not imported", directory.name)
            return
        self._said.pop(directory.name, None)
        version = result.version
        for warning in result.warnings:
            _log.warning("%s: %s", directory.name, warning)
        state = "imported as" if result.created else "is already"
        _log.info("%s %s %s@%d", directory.name, state, version.task_id, version.version)

    async def _publish(self, name: str, bundle: Bundle) -> UploadResult:
        check_task_id(name)
        async with self._publishing.slot:
            return await self._publishing.upload(name, replace(bundle, who="import-dir"))


def _read_still(directory: Path, look: _Look) -> Bundle:
    """Read it. Raise ValueError where it can't be read, Unavailable where it has changed since."""
    if len(look) > MAX_FILES:
        raise ValueError(f"it holds more than {MAX_FILES} files; leave in it what is to be imported")
    bundle = read_bundle(directory)
    if _look_at(directory) != look:
        raise Unavailable("it is being written")
    return bundle


def _look_into(folder: Path) -> dict[str, _Look]:
    """How each directory with something in it looks now; links are not followed."""
    with os.scandir(folder) as entries:
        names = (
            entry.name
            for entry in entries
            if not entry.name.startswith(".") and entry.is_dir(follow_symlinks=False)
        )
        looks = {name: _look_at(folder / name) for name in islice(names, MAX_DIRECTORIES)}
    return {name: look for name, look in looks.items() if look}


def _look_at(directory: Path) -> _Look:
    """The look of a directory, by at most MAX_FILES + 1 files."""
    try:
        with os.scandir(directory) as entries:
            plain = (entry for entry in entries if entry.is_file())
            files = [(entry.name, entry.stat()) for entry in islice(plain, MAX_FILES + 1)]
    except OSError:  # it changes under our eyes: the next look will tell
        return ()
    return tuple(sorted((name, found.st_size, found.st_mtime_ns) for name, found in files))
