"""PromptStore against a plain dictionary model: three instances on one directory; restarts and crashes."""

import shutil
import tempfile
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.errors import Conflict, NotFound
from app.prompt import TaskVersion, VersionDraft
from app.store.files import DurableFiles
from app.store.prompt_store import PromptStore, open_store
from app.store.traffic_split import AliasTarget, EnsembleTarget, choose, versions_of
from tests.store.builders import prefix, soft
from tests.store.faulty_disks import CrashedError, crashing_disk

PROMPTS = (None, soft(seed=1), soft(seed=2), prefix(seed=3))
tasks = st.sampled_from(["a", "b.c", "d-1"])
aliases = st.sampled_from(["live", "canary"])
USERS = ("anna", "ben", "cleo")
settings_of_draft = st.tuples(st.integers(0, len(PROMPTS) - 1), st.sampled_from(["", "x", "y"]))
instances = st.integers(0, 2)


@dataclass
class Model:
    """What a task is, in the plainest terms."""

    versions: list[tuple[int, str]] = field(default_factory=list)
    releases: list[dict[str, AliasTarget]] = field(default_factory=list)
    past_targets: dict[str, list[AliasTarget]] = field(default_factory=dict)
    retired: bool = False

    @property
    def aliases(self) -> dict[str, AliasTarget]:
        return self.releases[-1] if self.releases else {}

    def release(self, alias: str, target: AliasTarget) -> None:
        self.releases.append(self.aliases | {alias: target})

    def move(self, alias: str, target: AliasTarget) -> None:
        if self.aliases.get(alias) != target:
            self.release(alias, target)
            self.past_targets.setdefault(alias, []).append(target)


class StoreMachine(RuleBasedStateMachine):
    def __init__(self) -> None:
        super().__init__()
        self.root = Path(tempfile.mkdtemp(prefix="store-"))
        self.stores = [open_store(self.root) for _ in range(3)]
        self.models: dict[str, Model] = {}

    def teardown(self) -> None:
        shutil.rmtree(self.root)

    @rule(instance=instances, task=tasks, draft=settings_of_draft)
    def publish(self, instance: int, task: str, draft: tuple[int, str]) -> None:
        model = self.models.get(task, Model())
        if model.retired:
            self.refuses(Conflict, lambda: publish(self.stores[instance], task, draft))
            return
        version, created = publish(self.stores[instance], task, draft)
        self.models[task] = model
        assert created == (draft not in model.versions)
        if created:
            model.versions.append(draft)
        prompt = PROMPTS[draft[0]]
        assert version.version == model.versions.index(draft) + 1
        assert version.prompt_digest == (prompt.digest if prompt else None)

    @rule(task=tasks, draft=settings_of_draft, point=st.integers(1, 40))
    def crash_while_publishing(self, task: str, draft: tuple[int, str], point: int) -> None:
        """Wherever it happened: the version is there whole, or not at all; and the next start goes on."""
        model = self.models.get(task, Model())
        if model.retired:
            return
        with suppress(CrashedError):
            publish(PromptStore(DurableFiles(self.root, crashing_disk(point))), task, draft)
        versions = open_store(self.root).histories.refresh(task).versions
        if len(versions) == len(model.versions) + 1 and draft not in model.versions:
            model.versions.append(draft)
            self.models[task] = model
        assert [version.notes for version in versions] == [notes for _, notes in model.versions]

    @rule(task=tasks, alias=aliases, version=st.integers(1, 5), point=st.integers(1, 20))
    def crash_while_moving(self, task: str, alias: str, version: int, point: int) -> None:
        model = self.models.get(task, Model())
        if model.retired or version > len(model.versions):
            return
        with suppress(CrashedError):
            PromptStore(DurableFiles(self.root, crashing_disk(point))).move_alias(task, alias, version)
        releases = open_store(self.root).history(task).releases
        if len(releases) == len(model.releases) + 1:
            model.move(alias, version)
        assert [release.aliases for release in releases] == model.releases

    @rule(
        instance=instances,
        task=tasks,
        alias=aliases,
        wanted=st.one_of(
            st.integers(0, 5),
            st.dictionaries(st.integers(1, 5), st.integers(1, 9), min_size=2, max_size=3),
            st.dictionaries(st.integers(1, 5), st.integers(1, 9), min_size=2, max_size=3).map(EnsembleTarget),
        ),
        expected=st.integers(-1, 6),
    )
    def move(self, instance: int, task: str, alias: str, wanted: AliasTarget, expected: int) -> None:
        def call() -> Any:
            expectation = None if expected < 0 else expected
            return self.stores[instance].move_alias(task, alias, wanted, expected_release=expectation)

        model = self.models.get(task)
        if model is None:
            self.refuses(NotFound, call)
        elif model.retired or (expected >= 0 and expected != len(model.releases)):
            self.refuses(Conflict, call)
        elif not all(1 <= version <= len(model.versions) for version in versions_of(wanted)):
            self.refuses(NotFound, call)
        else:
            model.move(alias, wanted)
            assert call().aliases == model.aliases

    @rule(instance=instances, task=tasks)
    def retire(self, instance: int, task: str) -> None:
        model = self.models.get(task)
        if model is None:
            self.refuses(NotFound, lambda: self.stores[instance].retire(task))
            return
        if not model.retired:
            model.releases.append(dict(model.aliases))
            model.retired = True
        assert self.stores[instance].retire(task).retired

    @rule(instance=instances, task=tasks)
    def restore(self, instance: int, task: str) -> None:
        model = self.models.get(task)
        if model is None or not model.retired:
            return
        model.releases.append(dict(model.aliases))
        model.retired = False
        assert not self.stores[instance].restore(task).retired

    @rule(instance=instances, task=tasks, alias=aliases)
    def rollback(self, instance: int, task: str, alias: str) -> None:
        model = self.models.get(task, Model())
        stack = model.past_targets.get(alias, [])
        if model.retired or len(stack) < 2:
            self.refuses(
                Conflict if stack or model.retired else NotFound,
                lambda: self.stores[instance].rollback(task, alias),
            )
            return
        stack.pop()
        model.release(alias, stack[-1])
        assert self.stores[instance].rollback(task, alias).aliases == model.aliases

    @rule(instance=instances)
    def restart(self, instance: int) -> None:
        self.stores[instance] = open_store(self.root)

    @precondition(lambda self: self.models)
    @rule(instance=instances, task=tasks, number=st.integers(1, 6))
    def resolve_number(self, instance: int, task: str, number: int) -> None:
        model = self.models.get(task, Model())
        if model.retired or number > len(model.versions):
            self.refuses(NotFound, lambda: self.stores[instance].resolve(f"{task}@{number}"))
            return
        version = self.stores[instance].resolve(f"{task}@{number}")
        assert version.notes == model.versions[number - 1][1]
        assert self.stores[instance].resolve(f"{task}@sha256:{version.digest}") == version

    @invariant()
    def everyone_agrees(self) -> None:
        for store in self.stores:
            assert store.list_tasks() == sorted(self.models)
            for task, model in self.models.items():
                for alias in ("live", "canary"):
                    if alias in model.aliases and not model.retired:
                        for user in USERS:
                            wanted = choose(model.aliases[alias], task, user)
                            assert store.resolve(f"{task}@{alias}", user).version == wanted
                    else:
                        self.refuses(NotFound, lambda s=store, r=f"{task}@{alias}": s.resolve(r))

    @invariant()
    def history_is_the_models(self) -> None:
        for task, model in self.models.items():
            history = self.stores[0].history(task)
            assert [version.notes for version in history.versions] == [notes for _, notes in model.versions]
            assert [release.aliases for release in history.releases] == model.releases

    def refuses(self, error: type[Exception], call: Callable[[], Any]) -> None:
        with pytest.raises(error):
            call()


def publish(store: PromptStore, task: str, draft: tuple[int, str]) -> tuple[TaskVersion, bool]:
    return store.publish(task, VersionDraft(prompt=PROMPTS[draft[0]], notes=draft[1]))


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStore = StoreMachine.TestCase
