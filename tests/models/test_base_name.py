"""A base is called as the directory that a path leads to, or as its repository."""

from pathlib import Path

import pytest

from app.models.base_name import base_name
from app.settings import Settings
from app.store.references import is_task_id


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    folder = tmp_path / "hub" / "tiny-llama"
    (folder / "inner").mkdir(parents=True)
    (tmp_path / "latest").symlink_to(folder)
    monkeypatch.chdir(folder)
    return folder


@pytest.mark.parametrize(
    "reference",
    [".", "./", "inner/..", "../tiny-llama", "../tiny-llama/", "../../latest"],
)
def test_every_way_to_write_a_directory_gives_its_name(here: Path, reference: str) -> None:
    assert base_name(reference) == base_name(str(here)) == base_name(f"{here}//") == "tiny-llama"
    assert Settings(model=reference).base_name == "tiny-llama"


def test_a_parent_and_the_root_have_names(here: Path) -> None:
    assert base_name("..") == "hub"
    assert base_name("/") == "base"


@pytest.mark.parametrize("repository", ["models--Qwen--Qwen3-0.6B", "models--Qwen3-0.6B"])
def test_a_snapshot_of_the_hub_is_called_as_its_repository(
    repository: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    snapshot = tmp_path / repository / "snapshots" / ("4f" * 20)
    snapshot.mkdir(parents=True)
    monkeypatch.chdir(snapshot)
    for reference in (".", str(snapshot), f"{snapshot}/"):
        assert base_name(reference) == "Qwen3-0.6B"


@pytest.mark.parametrize("name", ["my model (v2)", "modèle", "-x-", "a/\tb", "..."])
def test_a_name_is_one_that_a_task_could_have_but_for_capitals(name: str, tmp_path: Path) -> None:
    (tmp_path / name).mkdir(parents=True)
    assert is_task_id(base_name(str(tmp_path / name)).lower())


@pytest.mark.parametrize("reference", ["org/Some-Model", "Some-Model"])
def test_a_hub_id_is_called_by_its_last_part(reference: str) -> None:
    assert base_name(reference) == "Some-Model"
