"""Records of programs: a format of their own, so that all others stay what they were, byte for byte."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from app.errors import Conflict, CorruptData, InvalidRequest, NotFound
from app.prompt import VersionDraft
from app.store.manifests import encode_version, seal, version_of
from app.store.prompt_store import PromptStore, open_store
from app.store.references import DEFAULT_ALIAS
from app.store.releases import encode_release
from app.store.traffic_split import EnsembleTarget, SpreadTarget, choose_paraphrase

SHIPPED = Path(__file__).parents[2] / "prompts_store"
PROGRAM = {"reasoning": {"answer_after": "answer:"}, "paraphrases": ["A {x}", "B {x}"]}
BOTH = EnsembleTarget({1: 1, 2: 3})


def publish(store: PromptStore, *drafts: dict[str, Any]) -> None:
    for draft in drafts:
        store.publish("t", VersionDraft(prompt=None, **draft))


@pytest.fixture
def two(store: PromptStore) -> PromptStore:
    """A store with a plain version and one with a program."""
    publish(store, {"template": "1 {x}"}, {"template": "2 {x}", "program": PROGRAM})
    return store


def record(root: Path, kind: str, number: int) -> dict[str, Any]:
    fields: dict[str, Any] = json.loads((root / "tasks" / "t" / kind / f"{number}.json").read_bytes())
    return fields


def rewrite(root: Path, kind: str, number: int, change: Callable[[dict[str, Any]], object]) -> None:
    """Write a well-formed record with other content over one of the store's."""
    fields = record(root, kind, number)
    del fields["checksum"]
    change(fields)
    path = root / "tasks" / "t" / kind / f"{number}.json"
    path.chmod(0o644)
    path.write_bytes(seal(fields))


def test_versions_with_and_without_a_program_stand_side_by_side(two: PromptStore, root: Path) -> None:
    plain, program = open_store(root).history("t").versions
    assert (plain.program, program.program) == ({}, PROGRAM)
    assert record(root, "versions", 1)["format"] == "promptplex.version/2"
    assert "program" not in record(root, "versions", 1)
    assert record(root, "versions", 2)["format"] == "promptplex.version/3"
    assert two.publish("t", VersionDraft(prompt=None, template="2 {x}", program=PROGRAM)) == (program, False)
    other, created = two.publish("t", VersionDraft(prompt=None, template="2 {x}"))
    assert (created, other.version) == (True, 3)


@pytest.mark.parametrize(
    ("number", "change"),
    [
        (1, lambda fields: fields.update(program=PROGRAM)),
        (1, lambda fields: fields.update(format="promptplex.version/3")),
        (2, lambda fields: fields.update(format="promptplex.version/2")),
        (2, lambda fields: fields.update(format="promptplex.version/4")),
        (2, lambda fields: fields.pop("program")),
        (2, lambda fields: fields.update(program=7)),
        (2, lambda fields: fields.update(program={})),
    ],
)
@pytest.mark.usefixtures("two")
def test_versions_of_another_form_are_damaged(
    number: int, change: Callable[[dict[str, Any]], object], root: Path
) -> None:
    rewrite(root, "versions", number, change)
    with pytest.raises(CorruptData):
        open_store(root).history("t")


def test_an_ensemble_has_a_record_of_its_own_format_until_it_is_left(two: PromptStore, root: Path) -> None:
    two.move_alias("t", "live", 1)
    assert two.move_alias("t", "all", EnsembleTarget({2: 3, 1: 1})).aliases["all"] == BOTH
    two.move_alias("t", "live", {1: 1, 2: 1})
    two.move_alias("t", "all", 2)
    assert [record(root, "releases", number)["format"][-2:] for number in range(1, 5)] == [
        *("/2", "/3", "/3", "/2")
    ]
    assert record(root, "releases", 2)["aliases"] == {
        "all": {"ensemble": True, "weights": {"1": 1, "2": 3}},
        "live": 1,
    }
    assert [release.aliases.get("all") for release in open_store(root).history("t").releases] == [
        *(None, BOTH, BOTH, 2)
    ]


def test_an_ensemble_means_all_its_versions(two: PromptStore, root: Path) -> None:
    first = two.move_alias("t", "all", BOTH)
    for store in (two, open_store(root)):
        meaning = store.meaning("t@all", "me")
        assert [(version.version, weight) for version, weight in meaning.members] == [(2, 3), (1, 1)]
        assert meaning.version.version == store.resolve("t@all").version == 2
        assert [version.version for version in store.alias_versions("t", "all")] == [2, 1]
        assert not store.meaning("t@1").members
    assert two.move_alias("t", "all", BOTH) == first, "as it is already"
    with pytest.raises(Conflict):
        two.move_alias("t", "all", {1: 1, 2: 3}, expected_release=0)
    two.move_alias("t", "all", {1: 1, 2: 3}, expected_release=1)
    assert two.rollback("t", "all").aliases["all"] == BOTH
    with pytest.raises(NotFound):
        two.move_alias("t", "all", EnsembleTarget({1: 1, 3: 1}))
    with pytest.raises(InvalidRequest):
        two.move_alias("t", "all", EnsembleTarget({1: 1, 2: 0}))


def test_paraphrases_are_spread_over_users(two: PromptStore, root: Path) -> None:
    two.move_alias("t", DEFAULT_ALIAS, SpreadTarget(2))
    assert record(root, "releases", 1)["aliases"] == {"live": {"spread_paraphrases": True, "version": 2}}
    for user in ("a", "b", "c", "d"):
        meaning = open_store(root).meaning("t", user)
        assert (meaning.version.version, meaning.members) == (2, ())
        assert meaning.paraphrase == choose_paraphrase(2, "t", 2, user)
    assert two.meaning("t@2", "a").paraphrase is None
    with pytest.raises(InvalidRequest, match="no paraphrases") as caught:
        two.move_alias("t", "canary", SpreadTarget(1))
    assert caught.value.param == "spread_paraphrases"


@pytest.mark.parametrize(
    "change",
    [
        lambda fields: fields.update(format="promptplex.release/2"),
        lambda fields: fields.update(aliases={"all": 1}, manifests={"1": fields["manifests"]["1"]}),
        lambda fields: fields["aliases"]["all"].update(ensemble=1),
        lambda fields: fields["aliases"]["all"].update(weights={"1": 1}),
        lambda fields: fields["aliases"]["all"].update(weights={"1": 1, "2": -1}),
        lambda fields: fields.update(
            aliases={"all": {"version": 1, "spread_paraphrases": True}},
            manifests={"1": fields["manifests"]["1"]},
        ),
    ],
)
def test_releases_of_another_form_are_damaged(
    change: Callable[[dict[str, Any]], object], two: PromptStore, root: Path
) -> None:
    two.move_alias("t", "all", BOTH)
    rewrite(root, "releases", 1, change)
    with pytest.raises(CorruptData):
        open_store(root).history("t")


def test_records_without_programs_are_written_as_ever() -> None:
    """The shipped store has records that the first servers wrote; and this one's bytes are on record."""
    store = open_store(SHIPPED)
    for task_id in store.list_tasks():
        history = store.history(task_id)
        for version in history.versions:
            assert encode_version(version) == bytes_of(task_id, "versions", version.version)
        for release in history.releases:
            assert encode_release(release) == bytes_of(task_id, "releases", release.number)
    version = version_of("t", 1, VersionDraft(prompt=None, template="{x}", defaults={"seed": 1}, notes="é"))
    data = encode_version(replace(version, provenance={}))
    assert hashlib.sha256(data).hexdigest() == RECORDED


def bytes_of(task_id: str, kind: str, number: int) -> bytes:
    return (SHIPPED / "tasks" / task_id / kind / f"{number}.json").read_bytes()


RECORDED = "ff33f7df287b5d46b45425f3cc9edda6aa23a605070ad9923c667a3706d9637f"
