"""A flipped bit anywhere is noticed, never served, told; and mended where good bytes are left."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest

from app.errors import CorruptData, StoreFull
from app.prompt import VersionDraft
from app.store.prompt_store import PromptStore, open_store
from app.store.scrub import scrub
from tests.store.builders import prefix, soft

SOFT, OTHER = soft(seed=1), prefix(seed=2)
BLOB = Path("blobs") / f"{SOFT.digest}.safetensors"
RECORDS = ["versions/1.json", "versions/2.json", "releases/1.json", "releases/2.json", "releases/3.json"]


@pytest.fixture
def filled(root: Path) -> PromptStore:
    """Version 2 is named by no release: only its own checksum vouches for it."""
    store = open_store(root)
    store.publish("t", VersionDraft(prompt=SOFT, template="{x}", notes="one"))
    store.publish(
        "t", VersionDraft(prompt=OTHER, notes="two", provenance={"uploader": "me", "metrics": {"a": 1}})
    )
    store.move_alias("t", "live", 1, who="me", why="first")
    store.move_alias("t", "canary", 1, why="second")
    store.retire("t", why="third")
    store.history("t")
    return store


def flipped(data: bytes, step: int) -> Iterator[bytes]:
    for bit in range(0, 8 * len(data), step):
        changed = bytearray(data)
        changed[bit // 8] ^= 1 << bit % 8
        yield bytes(changed)


@pytest.mark.parametrize("record", RECORDS)
def test_every_bit_of_a_record_counts(record: str, root: Path, filled: PromptStore) -> None:
    path = root / "tasks" / "t" / record
    good = path.read_bytes()
    for data in flipped(good, step=5):  # 5 and 8 are coprime: every bit of a byte has its turn
        path.write_bytes(data)
        with pytest.raises(CorruptData):
            open_store(root).history("t")
        with pytest.raises(CorruptData):
            open_store(root).resolve("t@1")
    path.write_bytes(good)
    assert open_store(root).history("t") == filled.history("t")


def test_every_bit_of_a_blob_counts(root: Path, filled: PromptStore) -> None:
    for data in flipped(SOFT.data, step=29):
        (root / BLOB).write_bytes(data)
        with pytest.raises(CorruptData, match="do not hash"):
            filled.read_blob(SOFT.digest)
        assert not (root / BLOB).exists()
        aside = list((root / "quarantine").iterdir())
        assert [path.read_bytes() for path in aside] == [data], "kept for whoever looks into it"
        aside[0].unlink()


def test_a_damaged_blob_is_mended_by_the_same_upload(root: Path, filled: PromptStore) -> None:
    (root / BLOB).write_bytes(SOFT.data[:-1])
    _, created = filled.publish("u", VersionDraft(prompt=SOFT))
    assert created
    assert filled.read_blob(SOFT.digest) == SOFT.data


def test_healing_needs_the_right_bytes(root: Path, filled: PromptStore) -> None:
    assert not filled.heal_blob(SOFT.digest, SOFT.data), "nothing is wrong with it"
    (root / BLOB).write_bytes(b"rot")
    with pytest.raises(CorruptData):
        filled.heal_blob(SOFT.digest, OTHER.data)
    assert filled.heal_blob(SOFT.digest, SOFT.data)
    assert filled.read_blob(SOFT.digest) == SOFT.data


@pytest.mark.parametrize("record", RECORDS)
@pytest.mark.parametrize("harm", ["flip", "remove", "empty"])
def test_a_replica_mends_records_that_it_knows(
    record: str, harm: str, root: Path, filled: PromptStore
) -> None:
    path = root / "tasks" / "t" / record
    good = path.read_bytes()
    if harm == "remove":
        path.unlink()
    else:
        path.write_bytes(b"" if harm == "empty" else next(flipped(good, step=1)))
    assert [finding.healed for finding in scrub(open_store(root))] == [False]
    assert [finding.healed for finding in scrub(filled)] == [True]
    assert path.read_bytes() == good
    assert list(scrub(filled)) == []
    assert filled.history("t").retired


def test_a_missing_blob_is_told(root: Path, filled: PromptStore) -> None:
    (root / BLOB).unlink()
    findings = list(scrub(open_store(root)))
    assert len(findings) == 1
    assert SOFT.digest in findings[0].message
    assert "upload" in findings[0].message


def test_a_damaged_blob_is_mended_from_elsewhere(root: Path, filled: PromptStore) -> None:
    (root / BLOB).write_bytes(SOFT.data[::-1])
    fetched: list[str] = []

    def fetch(digest: str) -> bytes:
        fetched.append(digest)
        return SOFT.data

    assert [finding.healed for finding in scrub(filled, fetch)] == [True]
    assert fetched == [SOFT.digest]
    assert filled.read_blob(SOFT.digest) == SOFT.data


def test_wrong_bytes_from_elsewhere_mend_nothing(root: Path, filled: PromptStore) -> None:
    (root / BLOB).write_bytes(SOFT.data[::-1])
    assert [finding.healed for finding in scrub(filled, lambda digest: OTHER.data)] == [False]


def test_one_damaged_task_leaves_the_others_alone(root: Path, filled: PromptStore) -> None:
    filled.publish("u", VersionDraft(prompt=OTHER))
    (root / "tasks" / "t" / "versions" / "1.json").write_bytes(b"{}")
    store = open_store(root)
    assert store.list_tasks() == ["t", "u"]
    assert store.resolve("u@1").prompt_digest == OTHER.digest


def test_a_quarantine_that_was_taken_away_is_made_again(root: Path, filled: PromptStore) -> None:
    for _ in range(2):
        (root / BLOB).write_bytes(b"rot")
        filled.publish("u", VersionDraft(prompt=SOFT))
        assert filled.read_blob(SOFT.digest) == SOFT.data
        shutil.rmtree(root / "quarantine")


def test_damage_that_cannot_be_set_aside_is_no_acknowledgement(root: Path, filled: PromptStore) -> None:
    (root / "elsewhere").mkdir()
    (root / "quarantine").symlink_to(root / "elsewhere")
    (root / BLOB).write_bytes(b"rot")
    with pytest.raises(StoreFull):
        filled.publish("u", VersionDraft(prompt=SOFT))
    assert "u" not in filled.list_tasks()


def test_a_number_that_was_claimed_anew_is_told_and_stays(root: Path, filled: PromptStore) -> None:
    """The last release was lost; another replica, which never saw it, released something else."""
    other = open_store(root)
    filled.restore("t", why="fourth")
    other.history("t")
    filled.retire("t", why="fifth")
    heads, lost = root / "tasks" / "t" / "heads", root / "tasks" / "t" / "releases" / "5.json"
    lost.unlink()
    release = other.move_alias("t", "live", 2, why="unaware")
    before = lost.read_bytes()
    findings = list(scrub(filled))
    assert [finding.healed for finding in findings] == [False]
    assert "claimed anew" in findings[0].message
    assert lost.read_bytes() == before, "what another replica was acknowledged stays"
    for stranger in (filled, open_store(root)):
        assert ["claimed anew" in finding.message for finding in scrub(stranger)] == [True]
    (lost_mark,) = [mark for mark in heads.glob("release-5-*") if not mark.name.endswith(release.digest)]
    lost_mark.unlink()  # what docs/store.md says: the loss is accepted
    assert filled.resolve("t").version == 2 == release.aliases["live"]
    assert list(scrub(filled)) == []


def test_a_task_that_is_gone_is_put_back(root: Path, filled: PromptStore) -> None:
    before = filled.history("t")
    shutil.rmtree(root / "tasks" / "t")
    assert [finding.healed for finding in scrub(filled)] == [True]
    assert open_store(root).history("t") == before


@pytest.mark.parametrize("harm", ["link", "file"])
def test_a_task_that_cannot_be_looked_into_hides_no_other(harm: str, root: Path, store: PromptStore) -> None:
    store.publish("u", VersionDraft(prompt=SOFT))
    store.move_alias("u", "live", 1)
    if harm == "link":
        (root / "tasks" / "loop").symlink_to(root / "tasks" / "loop")
    else:
        (root / "tasks" / "readme").write_text("a note")
    assert "u" in store.list_tasks()
    assert store.resolve("u").version == 1
    list(scrub(store))
