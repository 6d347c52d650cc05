"""What `push` finds on disk."""

import json
from pathlib import Path

import pytest

from app.serving.publishing.bundle import read_bundle
from app.store.source_files import CONFIG, PROMPT


def _peft(directory: Path) -> Path:
    directory.mkdir()
    (directory / "adapter_model.safetensors").write_bytes(b"weights")
    (directory / "adapter_config.json").write_bytes(b"{}")
    return directory


def test_a_peft_directory(tmp_path: Path) -> None:
    bundle = read_bundle(_peft(tmp_path / "My Task"))
    assert (bundle.name, bundle.files, bundle.task) == ("my-task", {PROMPT: b"weights", CONFIG: b"{}"}, None)


def test_its_weights_alone_bring_their_configuration(tmp_path: Path) -> None:
    bundle = read_bundle(_peft(tmp_path / "mine") / "adapter_model.safetensors")
    assert (bundle.name, bundle.files[CONFIG]) == ("mine", b"{}")


def test_another_file_speaks_for_itself(tmp_path: Path) -> None:
    directory = _peft(tmp_path / "mine")
    (directory / "other.safetensors").write_bytes(b"canonical")
    bundle = read_bundle(directory / "other.safetensors")
    assert (bundle.name, bundle.files) == ("other", {PROMPT: b"canonical"})


def test_a_task_file_beside_the_prompt_and_a_template_that_wins(tmp_path: Path) -> None:
    directory = _peft(tmp_path / "mine")
    (directory / "task.json").write_text(json.dumps({"template": "old {x}", "notes": "n"}))
    assert read_bundle(directory).task == {"template": "old {x}", "notes": "n"}
    assert read_bundle(directory, template="new {x}").task == {"template": "new {x}", "notes": "n"}


def test_a_task_file_alone_is_a_text_only_task(tmp_path: Path) -> None:
    (tmp_path / "task.json").write_text('{"template": "Hello {name}"}')
    bundle = read_bundle(tmp_path)
    assert (bundle.files, bundle.task) == ({}, {"template": "Hello {name}"})


def test_pickles_are_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "adapter_model.bin").write_bytes(b"")
    with pytest.raises(ValueError, match=r"adapter_model\.bin: a pickle can run code.*save_pretrained"):
        read_bundle(tmp_path)
    with pytest.raises(ValueError, match=r"adapter_model\.bin: a pickle can run code.*save_pretrained"):
        read_bundle(tmp_path / "adapter_model.bin")


def test_a_trainers_output_names_its_checkpoints(tmp_path: Path) -> None:
    output = tmp_path / "my run"
    for name in ("checkpoint-500", "checkpoint-1000", "checkpoint-90", "runs"):
        (output / name).mkdir(parents=True)
    for number in (500, 1000, 90):
        (output / f"checkpoint-{number}" / "adapter_config.json").write_text("{}")
        (output / f"checkpoint-{number}" / "adapter_model.safetensors").write_bytes(b"weights")
    inside = "checkpoint-90, checkpoint-500, checkpoint-1000; push one of them, such as "
    with pytest.raises(ValueError, match=inside) as refused:
        read_bundle(output)
    assert str(refused.value).endswith(str(output / "checkpoint-1000"))
    assert read_bundle(output / "checkpoint-500").name == "my-run"
    assert read_bundle(output / "checkpoint-500" / "adapter_model.safetensors").name == "my-run"


@pytest.mark.parametrize("inside", ["adapter", "my_adapter", "final/default"])
def test_an_adapter_further_in_is_named(tmp_path: Path, inside: str) -> None:
    (tmp_path / inside).parent.mkdir(parents=True, exist_ok=True)
    _peft(tmp_path / inside)
    with pytest.raises(ValueError, match=f"no prompt itself but in {inside}; push one"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("name", ["model.safetensors", "model-00001-of-00002.safetensors"])
def test_a_whole_model_is_no_prompt(tmp_path: Path, name: str) -> None:
    (tmp_path / "config.json").write_text("{}")
    (tmp_path / name).write_bytes(b"weights")
    with pytest.raises(ValueError, match="whole model, not a prompt"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("there", ["checkpoint-5/adapter_config.json", "adapter_config.json", "a.bin"])
def test_a_template_makes_no_text_only_task_of_a_prompt_that_is_missing(tmp_path: Path, there: str) -> None:
    (tmp_path / there).parent.mkdir(exist_ok=True)
    (tmp_path / there).write_text("{}")
    with pytest.raises(ValueError, match=r"no prompt|a pickle"):
        read_bundle(tmp_path, template="Review: {text}")
    (tmp_path / "task.json").write_text('{"template": "Hello {name}"}')
    with pytest.raises(ValueError, match=r"no prompt|a pickle"):
        read_bundle(tmp_path)


def test_a_template_alone_does_not_stand_for_an_empty_directory(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="holds no prompt"):
        read_bundle(tmp_path, template="Review: {text}")


def test_an_empty_directory_says_what_was_expected(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"adapter_model\.safetensors with adapter_config\.json"):
        read_bundle(tmp_path)


def test_several_files_must_be_told_apart(tmp_path: Path) -> None:
    for name in ("a", "b"):
        (tmp_path / f"{name}.safetensors").write_bytes(b"")
    with pytest.raises(ValueError, match=r"several .*a\.safetensors, b\.safetensors"):
        read_bundle(tmp_path)


@pytest.mark.parametrize("text", ["[1]", "{"])
def test_a_task_file_must_be_an_object(tmp_path: Path, text: str) -> None:
    (tmp_path / "task.json").write_text(text)
    with pytest.raises(ValueError, match=r"task\.json"):
        read_bundle(tmp_path)


def test_no_such_path(tmp_path: Path) -> None:
    with pytest.raises(FileNotFoundError):
        read_bundle(tmp_path / "nowhere")
