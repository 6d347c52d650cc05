"""Whatever lies where the store, the keys or an import are read from: it is told, and costs no memory."""

import os
import tracemalloc
from collections.abc import Callable
from pathlib import Path

import pytest

from app.errors import CorruptData
from app.keys.entries import KeyFileError
from app.keys.key_file import read_keys
from app.prompt import VersionDraft
from app.serving.publishing.bundle import read_bundle
from app.store.bounded import read_bounded
from app.store.gc import collect_garbage
from app.store.prompt_store import PromptStore, open_store
from app.store.scrub import scrub
from tests.store.builders import soft

PROMPT = soft()
REFUSALS = (CorruptData, KeyFileError, ValueError, OSError)


@pytest.fixture
def filled(root: Path) -> PromptStore:
    store = open_store(root)
    store.publish("t", VersionDraft(prompt=PROMPT, notes="one"))
    store.move_alias("t", "live", 1)
    store.history("t")
    return store


def sparse(path: Path) -> None:
    with path.open("wb") as file:
        file.truncate(64 << 30)


def endless(path: Path) -> None:
    path.symlink_to("/dev/zero")


HARMS: dict[str, Callable[[Path], None]] = {
    "a sparse file of 64 GiB": sparse,
    "a fifo": os.mkfifo,
    "a link to an endless device": endless,
    "a directory": Path.mkdir,
}
RECORDS = ("versions/1.json", "releases/1.json")


def put(harm: str, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.unlink(missing_ok=True)
    HARMS[harm](path)


def peak_of(work: Callable[[], object]) -> int:
    """Bytes that Python's objects took at most while this ran."""
    tracemalloc.start()
    try:
        work()
        return tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def refuses(work: Callable[[], object]) -> None:
    def refused() -> None:
        with pytest.raises(REFUSALS):
            work()

    assert peak_of(refused) < 20 << 20


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("record", RECORDS)
def test_records(record: str, harm: str, root: Path, filled: PromptStore) -> None:
    put(harm, root / "tasks" / "t" / record)
    refuses(lambda: open_store(root).resolve("t"))
    assert peak_of(lambda: list(scrub(open_store(root)))) < 20 << 20
    assert open_store(root).list_tasks() == ["t"]
    filled.publish("u", VersionDraft(prompt=PROMPT))
    assert open_store(root).resolve("u@1").prompt_digest == PROMPT.digest


@pytest.mark.parametrize("harm", [harm for harm in HARMS if harm != "a directory"])
@pytest.mark.parametrize("record", RECORDS)
def test_a_replica_puts_a_record_back(record: str, harm: str, root: Path, filled: PromptStore) -> None:
    put(harm, root / "tasks" / "t" / record)
    assert [finding.healed for finding in scrub(filled)] == [True]
    assert open_store(root).history("t") == filled.history("t")


@pytest.mark.parametrize("harm", HARMS)
def test_blobs(harm: str, root: Path, filled: PromptStore) -> None:
    put(harm, root / "blobs" / f"{PROMPT.digest}.safetensors")
    refuses(lambda: filled.read_blob(PROMPT.digest))
    assert len(list(scrub(open_store(root)))) == 1
    filled.publish("u", VersionDraft(prompt=PROMPT))
    assert filled.read_blob(PROMPT.digest) == PROMPT.data


@pytest.mark.parametrize("harm", HARMS)
def test_the_quarantine(harm: str, root: Path, filled: PromptStore) -> None:
    put(harm, root / "quarantine" / f"blobs-{PROMPT.digest}.safetensors.00000000")
    assert peak_of(lambda: collect_garbage(open_store(root), older_than=-1.0)) < 20 << 20
    (root / "blobs" / f"{PROMPT.digest}.safetensors").unlink()
    assert peak_of(lambda: collect_garbage(open_store(root), older_than=-1.0)) < 20 << 20


@pytest.mark.parametrize("harm", HARMS)
def test_a_key_file(harm: str, tmp_path: Path) -> None:
    put(harm, tmp_path / "keys.json")
    refuses(lambda: read_keys(tmp_path / "keys.json"))


@pytest.mark.parametrize("harm", HARMS)
@pytest.mark.parametrize("name", ["adapter_model.safetensors", "adapter_config.json", "task.json"])
def test_a_directory_to_import(name: str, harm: str, tmp_path: Path) -> None:
    """What is no plain file isn't there; what is too large is refused."""
    (tmp_path / "adapter_model.safetensors").write_bytes(b"weights")
    put(harm, tmp_path / name)
    if harm == "a sparse file of 64 GiB":
        refuses(lambda: read_bundle(tmp_path))
    elif name == "adapter_model.safetensors":
        with pytest.raises(ValueError, match=r"holds no prompt|can't be read"):
            read_bundle(tmp_path)
    else:
        assert read_bundle(tmp_path).files["prompt"] == b"weights"


def test_exactly_the_bound_is_read(tmp_path: Path) -> None:
    path = tmp_path / "file"
    path.write_bytes(b"12345")
    assert read_bounded(path, 5) == b"12345"
    with pytest.raises(OSError, match="larger than 4 bytes"):
        read_bounded(path, 4)


def test_a_file_without_a_size_is_read_within_the_bound() -> None:
    assert read_bounded("/proc/self/status", 1 << 20).startswith(b"Name:")
    with pytest.raises(OSError, match="larger than 10 bytes"):
        read_bounded("/proc/self/status", 10)
