"""alias, rollback, retire, restore, store: over HTTP and on a store's files."""

import json
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., tuple[int, str, str]]


@pytest.fixture(params=["server", "store"])
def target(request: pytest.FixtureRequest, tmp_path: Path) -> tuple[str, str]:
    if request.param == "store":
        return ("--store", str(tmp_path / "store"))
    return ("--server", request.getfixturevalue("server_url"))


def push(promptplex: Run, task: str, target: tuple[str, str], count: int) -> None:
    for number in range(1, count + 1):
        template = f"{number}: {{x}}"
        status, _, err = promptplex("push", "--task", task, "--template", template, *target)
        assert (status, err) == (0, "")


def test_an_alias_is_moved_split_and_rolled_back(promptplex: Run, target: tuple[str, str]) -> None:
    push(promptplex, "aliased", target, 3)
    ok, out, _ = promptplex("alias", "aliased", "canary", "1", "--why", "slow", *target)
    assert (ok, out) == (0, "aliased@canary is version 1 since release 4\n")
    ok, out, _ = promptplex("alias", "aliased", "live", "2=90", "3=10", *target)
    assert (ok, out) == (0, "aliased@live is version 2 (90), 3 (10) since release 5\n")
    _, out, _ = promptplex("show", "aliased", *target)
    assert "alias    live -> 2 (90), 3 (10)" in out
    assert "release  4: move" in out
    assert "(slow)" in out
    ok, out, _ = promptplex("rollback", "aliased", *target)
    assert (ok, out) == (0, "aliased@live is version 3 since release 6\n")
    status, _, err = promptplex("alias", "aliased", "live", "1", "--expected-release", "2", *target)
    assert status == 1
    assert "last release is 6" in err


def test_a_task_is_retired_and_restored(promptplex: Run, target: tuple[str, str]) -> None:
    push(promptplex, "old-one", target, 1)
    assert promptplex("retire", "old-one", *target)[1] == "old-one is retired since release 2\n"
    _, out, _ = promptplex("list", *target)
    row = next(line for line in out.splitlines() if line.startswith("old-one"))
    assert "retired" in row
    assert "task     old-one (retired)" in promptplex("show", "old-one", *target)[1]
    status, _, err = promptplex("push", "--task", "old-one", "--template", "new {x}", *target)
    assert (status, "retired; restore it first" in err) == (1, True)
    assert promptplex("restore", "old-one", *target)[1] == "old-one is served again since release 3\n"


@pytest.mark.parametrize("versions", [("x",), ("1", "2"), ("1=",), ("1=2", "1=3"), ("-1",), ("1=90", "2")])
def test_what_is_no_version_is_refused(promptplex: Run, tmp_path: Path, versions: tuple[str, ...]) -> None:
    status, _, err = promptplex("alias", "t", "live", *versions, "--store", str(tmp_path))
    assert status in (1, 2)
    assert "rror" in err


def test_a_store_is_checked_and_swept(
    promptplex: Run, tmp_path: Path, save_peft: Callable[..., Path]
) -> None:
    root = tmp_path / "store"
    status, _, err = promptplex("store", "check", str(root))
    assert (status, "no store" in err) == (1, True)
    promptplex("push", str(save_peft(tmp_path / "mood")), "--store", str(root))
    status, out, _ = promptplex("store", "check", str(root))
    assert (status, out) == (0, "1 tasks and 1 prompts checked: no damage found\n")
    assert promptplex("store", "sweep", str(root), "--days", "0")[1] == (
        "removed 0 unfinished files and 0 unreferenced prompts\n"
    )
    manifest = root / "tasks" / "mood" / "versions" / "1.json"
    fields = json.loads(manifest.read_bytes())
    manifest.write_text(json.dumps(fields | {"notes": "forged"}))
    status, out, _ = promptplex("store", "check", str(root))
    assert status == 1
    assert "does not match its own checksum" in out
