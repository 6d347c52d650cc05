"""PromptStore against a plain dictionary model: three instances on one directory, restarts between."""

import shutil
import tempfile
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, invariant, precondition, rule

from app.errors import Conflict, NotFound
from app.prompt import VersionDraft
from app.store.prompt_store import open_store
from tests.store.builders import prefix, soft

PROMPTS = (None, soft(seed=1), soft(seed=2), prefix(seed=3))
tasks = st.sampled_from(["a", "b.c", "d-1"])
aliases = st.sampled_from(["live", "canary"])
settings_of_draft = st.tuples(st.integers(0, len(PROMPTS) - 1), st.sampled_from(["", "x", "y"]))
instances = st.integers(0, 2)


@dataclass
class Model:
    """What a task is, in the plainest terms."""

    versions: list[tuple[int, str]] = field(default_factory=list)
    releases: list[dict[str, int]] = field(default_factory=list)
    meanings: dict[str, list[int]] = field(default_factory=dict)

    @property
    def aliases(self) -> dict[str, int]:
        return self.releases[-1] if self.releases else {}

    def release(self, alias: str, version: int) -> None:
        self.releases.append(self.aliases | {alias: version})


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
        prompt = PROMPTS[draft[0]]
        version, created = self.stores[instance].publish(task, VersionDraft(prompt=prompt, notes=draft[1]))
        model = self.models.setdefault(task, Model())
        assert created == (draft not in model.versions)
        if created:
            model.versions.append(draft)
        assert version.version == model.versions.index(draft) + 1
        assert version.prompt_digest == (prompt.digest if prompt else None)

    @rule(
        instance=instances, task=tasks, alias=aliases, version=st.integers(0, 5), expected=st.integers(-1, 6)
    )
    def move(self, instance: int, task: str, alias: str, version: int, expected: int) -> None:
        def call() -> Any:
            expectation = None if expected < 0 else expected
            return self.stores[instance].move_alias(task, alias, version, expected_release=expectation)

        model = self.models.get(task)
        if model is None:
            self.refuses(NotFound, call)
        elif expected >= 0 and expected != len(model.releases):
            self.refuses(Conflict, call)
        elif not 1 <= version <= len(model.versions):
            self.refuses(NotFound, call)
        else:
            if model.aliases.get(alias) != version:
                model.release(alias, version)
                model.meanings.setdefault(alias, []).append(version)
            release = call()
            assert (release.number, release.aliases) == (len(model.releases), model.aliases)

    @rule(instance=instances, task=tasks, alias=aliases)
    def rollback(self, instance: int, task: str, alias: str) -> None:
        model = self.models.get(task, Model())
        stack = model.meanings.get(alias, [])
        if len(stack) < 2:
            self.refuses(Conflict if stack else NotFound, lambda: self.stores[instance].rollback(task, alias))
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
        if number > len(model.versions):
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
                    if alias in model.aliases:
                        assert store.resolve(f"{task}@{alias}").version == model.aliases[alias]
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


StoreMachine.TestCase.settings = settings(max_examples=40, stateful_step_count=25, deadline=None)
TestStore = StoreMachine.TestCase
