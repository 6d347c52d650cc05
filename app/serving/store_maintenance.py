"""Maintenance of a store while it is served: scrubbing, healing, and garbage collection."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import islice

from app.errors import PromptplexError
from app.prompt import TaskVersion
from app.store.gc import collect_garbage
from app.store.heads import mark_newest
from app.store.prompt_store import CHANGES, PromptStore
from app.store.references import DEFAULT_ALIAS
from app.store.scrub import scrub

_log = logging.getLogger(__name__)
_MAX_NAMED = 100  # tasks that can't be served, in the log
_PERIOD = 6 * 3600.0  # seconds between two rounds; the first one begins with the server


class StoreMaintenance:
    """Rounds through the store, on a thread of its own, until the server stops."""

    def __init__(
        self,
        store: PromptStore,
        fetch: Callable[[str], bytes],
        why_not: Callable[[TaskVersion], str | None] = lambda version: None,
    ) -> None:
        """`fetch` gets a prompt's bytes from the other tiers, or raises PromptplexError.

        `why_not` returns why the loaded base can't serve a version (None: it can).
        """
        self._store = store
        self._fetch = fetch
        self._why_not = why_not
        self._stopping = threading.Event()
        self.num_damaged = 0  # found by the last round, and not healed

    def start(self) -> None:
        """Begin the first round. A round under way doesn't keep the process from ending."""
        threading.Thread(target=self._run, name="store-maintenance", daemon=True).start()

    def stop(self) -> None:
        """Let no further round begin."""
        self._stopping.set()

    def round(self) -> None:
        """Read everything once; collect garbage where nothing is damaged."""
        with _logged("the store was not looked after", logging.INFO):
            num_damaged = 0
            for finding in scrub(self._store, self._fetch):
                num_damaged += not finding.healed
                _log.error("%s%s", finding.message, " (healed)" if finding.healed else "")
            self.num_damaged = num_damaged
            if not num_damaged:
                self._mark_newest()
                swept = collect_garbage(self._store)
                if swept.leftovers or swept.blobs:
                    _log.info("removed %d unfinished files, %d unused prompts", swept.leftovers, swept.blobs)

    def _mark_newest(self) -> None:
        """Make what older stores lack: the folder that listings look at, and marks."""
        if self._store.files.stamp(CHANGES) is None:
            self._store.files.touch_directory(CHANGES)
        for task_id in self._store.list_tasks():
            mark_newest(self._store.files, self._store.history(task_id))

    def _report(self) -> None:
        """Log which tasks can't be served and why; the server runs all the same."""
        reasons = {task_id: self._reason(task_id) for task_id in self._store.list_tasks()}
        unservable = {task_id: reason for task_id, reason in reasons.items() if reason is not None}
        for task_id, reason in islice(unservable.items(), _MAX_NAMED):
            _log.warning("task %s can't be served: %s", task_id, reason)
        if len(unservable) > _MAX_NAMED:
            _log.warning("%d more tasks can't be served; GET /tasks says why", len(unservable) - _MAX_NAMED)
        _log.info("%d tasks can be served", len(reasons) - len(unservable))

    def _reason(self, task_id: str) -> str | None:
        try:
            reasons = map(self._why_not, self._store.alias_versions(task_id, DEFAULT_ALIAS))
            return next((reason for reason in reasons if reason is not None), None)
        except PromptplexError as error:
            return error.message

    def _run(self) -> None:
        with _logged("the tasks can't be listed", logging.WARNING):
            self._report()
        while not self._stopping.is_set():
            self.round()
            self._stopping.wait(_PERIOD)


@contextmanager
def _logged(what: str, level: int) -> Iterator[None]:
    """Log failures and go on: the next round may succeed."""
    try:
        yield
    except PromptplexError as error:  # a store that can't be read, or only be read
        _log.log(level, "%s: %s", what, error)
    except Exception:
        _log.exception("%s", what)
