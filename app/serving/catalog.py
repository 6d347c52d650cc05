"""What there is: tasks and their histories, with what the loaded base makes of them."""

from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass

from app.errors import PromptplexError
from app.prompt import TaskVersion
from app.serving.service import GenerationService
from app.store.prompt_store import PromptStore, TaskHistory
from app.store.references import DEFAULT_ALIAS


@dataclass(frozen=True, slots=True, kw_only=True)
class VersionState:
    """A version as this server sees it."""

    version: TaskVersion
    why_not: str | None  # None: it can be served
    resident: bool  # whether its prompt is on the device


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskSummary:
    """One line of the list of tasks."""

    task_id: str
    live: VersionState | None  # None: no live version, or its records are damaged
    why_not: str | None
    requests_served: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TaskDetail:
    """One task in full."""

    history: TaskHistory
    versions: tuple[VersionState, ...]
    requests_served: int


class Catalog:
    """Reads the store; every method may wait for the disk."""

    def __init__(
        self,
        store: PromptStore,
        generation: GenerationService,
        is_shown: Callable[[str], bool] = lambda task_id: True,
    ) -> None:
        """Tasks that aren't shown are in no list and in no count."""
        self._store = store
        self._generation = generation
        self._is_shown = is_shown

    def count(self) -> int:
        """How many tasks there are."""
        return len(self._ids())

    def page(self, after: str | None, limit: int) -> tuple[list[TaskSummary], str | None]:
        """Tasks in order of their ids, and after which id the next page begins (None: it doesn't)."""
        ids = self._ids()
        begin = 0 if after is None else bisect_right(ids, after)
        chosen = ids[begin : begin + limit]
        following = chosen[-1] if chosen and begin + limit < len(ids) else None
        return [self._summary(task_id) for task_id in chosen], following

    def all(self) -> list[TaskSummary]:
        """Every task."""
        return [self._summary(task_id) for task_id in self._ids()]

    def _ids(self) -> list[str]:
        return [task_id for task_id in self._store.list_tasks() if self._is_shown(task_id)]

    def detail(self, task_id: str) -> TaskDetail:
        """Raises NotFound, InvalidRequest, CorruptData."""
        history = self._store.history(task_id)
        return TaskDetail(
            history=history,
            versions=tuple(self._state(version) for version in history.versions),
            requests_served=self._generation.requests_served.get(task_id, 0),
        )

    def _summary(self, task_id: str) -> TaskSummary:
        live, why_not = None, None
        try:
            states = [self._state(version) for version in self._store.meant_by(task_id, DEFAULT_ALIAS)]
            live = states[0]
            why_not = next((state.why_not for state in states if state.why_not is not None), None)
        except PromptplexError as error:  # one damaged task must not hide the others
            why_not = error.message
        served = self._generation.requests_served.get(task_id, 0)
        return TaskSummary(task_id=task_id, live=live, why_not=why_not, requests_served=served)

    def _state(self, version: TaskVersion) -> VersionState:
        resident = self._generation.engine.stats().resident_digests
        return VersionState(
            version=version,
            why_not=self._generation.servability(version),
            resident=version.prompt_digest is not None and version.prompt_digest in resident,
        )
