"""Every attack on an upload is refused with a helpful message and leaves nothing in the store."""

import json
import pickle
from pathlib import Path

import numpy as np
import pytest

from app.errors import InvalidRequest, PromptplexError, PromptRejected, UnsafeFile
from app.prompt import ModelGeometry
from app.store.prompt_store import open_store
from tests.store.builders import HIDDEN, entry, file_bytes, geometry, many_tensors, peft_files, tree, upload

WEIGHTS, CONFIG = peft_files()
BF16 = geometry(dtype="bfloat16")


def values(bad: float | None = None, width: int = HIDDEN) -> np.ndarray:
    result = np.ones((3, width), dtype="<f4")
    if bad is not None:
        result[1, 1] = bad
    return result


def prefix_files(layers: int) -> tuple[bytes, bytes]:
    return peft_files(
        np.ones((3, 2 * layers * 8), dtype="<f4"),
        peft_type="PREFIX_TUNING",
        token_dim=8,
        num_attention_heads=2,
        num_layers=layers,
    )


def with_header(**tensors: object) -> bytes:
    return file_bytes(tensors, values().tobytes())


DUPLICATE = b'{"prompt_embeddings":%s,"prompt_embeddings":%s}' % (
    (json.dumps(entry([3, HIDDEN], 0, 3 * HIDDEN * 4)).encode(),) * 2
)

ATTACKS: dict[str, tuple[bytes | None, bytes | None, ModelGeometry, type[PromptplexError], str]] = {
    "wrong width": (*peft_files(values(width=8), token_dim=8), geometry(), PromptRejected, "[p, 16]"),
    "wrong layer count": (*prefix_files(5), geometry(), PromptRejected, "layers 0 to 1; found: 5 layers"),
    "NaN": (*peft_files(values(np.nan)), geometry(), PromptRejected, "found: nan at [1, 1]"),
    "infinity": (*peft_files(values(-np.inf)), geometry(), PromptRejected, "found: -inf at [1, 1]"),
    "overflow on cast": (*peft_files(values(3.4e38)), BF16, PromptRejected, "overflows in the base"),
    "truncated": (WEIGHTS[:-1], CONFIG, geometry(), UnsafeFile, "truncated"),
    "trailing bytes": (WEIGHTS + b"\0", CONFIG, geometry(), UnsafeFile, "trailing bytes"),
    "duplicate key": (
        file_bytes(DUPLICATE, values().tobytes()),
        CONFIG,
        geometry(),
        UnsafeFile,
        "appears twice",
    ),
    "300k tensors": (many_tensors(), CONFIG, geometry(), UnsafeFile, "at most 65536 bytes"),
    "pickle": (pickle.dumps(values(), protocol=2), CONFIG, geometry(), UnsafeFile, "safe_serialization=True"),
    "zip": (b"PK\x03\x04" + WEIGHTS, CONFIG, geometry(), UnsafeFile, "adapter_model.safetensors"),
    "file without config": (WEIGHTS, None, geometry(), PromptRejected, "send its adapter_config.json"),
    "config without file": (None, CONFIG, geometry(), PromptRejected, "send adapter_model.safetensors"),
    "unknown kind": (*peft_files(peft_type="MAGIC"), geometry(), PromptRejected, "PROMPT_TUNING, P_TUNING"),
    "2 GB declared": (
        with_header(prompt_embeddings=entry([1 << 20, 512], 0, 1 << 31)),
        CONFIG,
        geometry(),
        UnsafeFile,
        "truncated",
    ),
    "2 GB shape, few bytes": (
        with_header(prompt_embeddings=entry([1 << 20, 512], 0, 192)),
        CONFIG,
        geometry(),
        UnsafeFile,
        "disagree",
    ),
    "no room": (
        *peft_files(np.ones((63, HIDDEN), dtype="<f4"), num_virtual_tokens=63),
        geometry(),
        PromptRejected,
        "at most 62 virtual tokens",
    ),
}


@pytest.mark.parametrize("name", ATTACKS)
@pytest.mark.parametrize("has_tasks", [False, True], ids=["empty", "in use"])
def test_refused_with_nothing_left_behind(name: str, has_tasks: bool, root: Path) -> None:
    weights, config, base, error, reason = ATTACKS[name]
    store = open_store(root)
    if has_tasks:
        upload(store, "task", WEIGHTS, CONFIG)
    before = tree(root)
    with pytest.raises(error) as caught:
        upload(store, "task", weights, config, base)
    assert reason in caught.value.message
    assert str(root) not in caught.value.message
    assert tree(root) == before
    assert root.exists() == has_tasks


@pytest.mark.parametrize(
    "task_id",
    [
        "../evil",
        "..",
        ".",
        "",
        "a/b",
        "a\\b",
        "/etc/passwd",
        "A",
        "a..b",
        "a-",
        "-a",
        ".a",
        "a b",
        "a\n",
        "a\0",
        "a@live",
        "é",
        "x" * 129,
        "a/../b",
        "%2e%2e",
    ],
)
def test_task_ids_are_no_paths(task_id: str, root: Path) -> None:
    store = open_store(root)
    with pytest.raises(InvalidRequest, match="A task id is") as caught:
        upload(store, task_id, WEIGHTS, CONFIG)
    assert caught.value.param == "task_id"
    assert not root.exists()
    for call in (store.history, store.resolve, store.rollback):
        if "@" not in task_id:
            with pytest.raises(InvalidRequest):
                call(task_id)
    assert not root.exists()


def test_a_correct_upload_is_served(root: Path) -> None:
    store = open_store(root)
    version = upload(store, "a.b_c-1", WEIGHTS, CONFIG)
    assert version.prompt_digest is not None
    assert len(store.read_blob(version.prompt_digest)) > 192
