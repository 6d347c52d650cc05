import asyncio
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from app.errors import InvalidRequest, NotFound, PromptRejected, RequestTooLong, StoreFull, Unavailable
from app.serving.generation_request import GenerationRequest
from app.serving.publishing.publisher import UploadResult
from app.sites import Site
from tests.oracle import greedy, prefix_config, soft_config
from tests.serving.stack import BASE_NAME, POSITIONS, Stack, run, running_stack, upload_of
from tests.store.builders import file_bytes


def publish(stack: Stack, task_id: str, **parts: Any) -> UploadResult:
    return run(stack.publishing.upload(task_id, upload_of(**parts)))


def test_a_version_is_stored_tried_and_released(stack: Stack, tmp_path: Path) -> None:
    model, weights, config = stack.adapter(soft_config(3), tmp_path)
    expected = greedy(model, stack.tokenizer("the film")["input_ids"], 4).tokens
    text = stack.tokenizer.decode(expected, skip_special_tokens=True)
    task = {
        "defaults": {"max_new_tokens": 4},
        "examples": [{"inputs": "the film", "expected": text}, {"inputs": "the film", "expected": "no"}],
        "notes": "hello",
        "base": {"name": "tiny", "revision": "1"},
        "choices": ["a", {"value": "b", "text": " b"}],
    }
    result = publish(stack, "whole", prompt=weights, config=config, task=task, who="me")
    assert result.created
    assert result.release is not None
    assert result.release.aliases == {"live": 1}
    assert result.release.who == "me"
    assert [report.matches for report in result.examples] == [True, False]
    assert result.examples[1].generated == text
    assert result.version.provenance["source_format"] == "peft"
    assert result.version.provenance["base_fingerprint"] == stack.engine.geometry.fingerprint
    assert stack.store.resolve("whole") == result.version


def test_the_same_again_is_the_same_version(stack: Stack) -> None:
    one = publish(stack, "again", task={"template": "1 {x}"})
    two = publish(stack, "again", task={"template": "2 {x}"})
    assert (one.version.version, two.version.version) == (1, 2)
    same = publish(stack, "again", task={"template": "1 {x}"})
    assert (same.version, same.created, same.release) == (one.version, False, None)
    assert stack.store.resolve("again").version == 2
    asked = publish(stack, "again", task={"template": "1 {x}"}, alias="live")
    assert asked.release is not None
    assert stack.store.resolve("again").version == 1


def test_no_alias_or_another(stack: Stack) -> None:
    hidden = publish(stack, "hidden", task={"template": "{x}"}, alias="none")
    assert (hidden.created, hidden.release) == (True, None)
    with pytest.raises(NotFound):
        stack.store.resolve("hidden")
    still = publish(stack, "hidden", task={"template": "{x}"}, alias="none")
    assert (still.created, still.release) == (False, None)
    canary = publish(stack, "hidden", task={"template": "{x}"}, alias="canary")
    assert canary.release is not None
    assert canary.release.aliases == {"canary": 1}


def test_what_a_crash_left_unreleased_is_released_by_the_retry(
    stack: Stack, monkeypatch: pytest.MonkeyPatch
) -> None:
    publish(stack, "crash", task={"template": "1 {x}"})

    def full(*_: object, **__: object) -> None:
        raise StoreFull("the disk is full")

    with monkeypatch.context() as patch:
        patch.setattr(stack.store, "move_alias", full)
        with pytest.raises(StoreFull):
            publish(stack, "crash", task={"template": "2 {x}"})
    assert stack.store.resolve("crash").version == 1
    retried = publish(stack, "crash", task={"template": "2 {x}"})
    assert not retried.created
    assert retried.release is not None
    assert stack.store.resolve("crash").version == 2


def test_what_was_not_to_be_released_stays_so(stack: Stack) -> None:
    publish(stack, "quiet", task={"template": "1 {x}"})
    publish(stack, "quiet", task={"template": "2 {x}"}, alias="none")
    again = publish(stack, "quiet", task={"template": "2 {x}"})
    assert (again.created, again.release) == (False, None)
    assert stack.store.resolve("quiet").version == 1


def test_rollback(stack: Stack) -> None:
    for number in (1, 2, 3):
        publish(stack, "back", task={"template": f"{number} {{x}}"})
    back = stack.publishing.change
    releases = [run(back(lambda store: store.rollback("back", who="me", why="bad"))) for _ in range(2)]
    assert [release.aliases["live"] for release in releases] == [2, 1]
    assert stack.store.history("back").releases[-1].why == "bad"


@pytest.mark.parametrize(
    ("task", "param"),
    [
        ({"templte": "{x}"}, "task.templte"),
        ({"template": 3}, "task.template"),
        ({"template": "{x.y}"}, "task.template"),
        ({"template": "{x}", "defaults": {"top_p": 2}}, "task.defaults.top_p"),
        ({"template": "{x}", "defaults": {"details": True}}, "task.defaults.details"),
        ({"template": "{x}", "defaults": []}, "task.defaults"),
        ({"template": "{x}", "choices": "ab"}, "task.choices"),
        ({"template": "{x}", "choices": [""]}, "task.choices[0]"),
        ({"template": "{x}", "choices": ["a", {"value": "b"}]}, "task.choices[1]"),
        ({"template": "{x}", "choices": ["a"] * 257}, "task.choices"),
        ({"template": "{x}", "examples": [{"inputs": "a"}]}, "task.examples[0]"),
        (
            {"template": "{x}", "examples": [{"inputs": {"y": "a"}, "expected": ""}]},
            "task.examples[0].inputs",
        ),
        ({"template": "{x}", "examples": [{"inputs": 1, "expected": ""}]}, "task.examples[0].inputs"),
        ({"template": "{x}", "examples": [{"inputs": "a", "expected": 1}]}, "task.examples[0].expected"),
        ({"template": "{x}", "examples": [{"inputs": "film " * 300, "expected": ""}]}, "task.examples[0]"),
        (
            {"template": "{x}", "examples": [{"inputs": "a" * 20_000, "expected": ""}]},
            "task.examples[0].inputs",
        ),
        ({"template": "film " * 300 + "{x}"}, "task.template"),
        ({"template": "{x}", "notes": ["a"]}, "task.notes"),
        ({"template": "{x}", "base": {"revision": "1"}}, "task.base"),
        ({"template": "{x}", "base": "tiny"}, "task.base"),
        ({"template": "{x}", "base": {"name": "a" * 513}}, "task.base.name"),
        ({}, "prompt"),
        (None, "prompt"),
    ],
)
def test_bad_settings_leave_nothing_behind(stack: Stack, task: Any, param: str) -> None:
    before = stack.files()
    with pytest.raises(InvalidRequest) as refused:
        publish(stack, "bad", task=task)
    assert refused.value.param == param
    assert stack.files() == before


def test_names_that_no_task_may_have(stack: Stack) -> None:
    before = stack.files()
    for task_id in (BASE_NAME, "../up", "A", "a b", ""):
        with pytest.raises(InvalidRequest):
            publish(stack, task_id, task={"template": "{x}"})
    for alias in ("3", "A", "../x"):
        with pytest.raises(InvalidRequest):
            publish(stack, "named", task={"template": "{x}"}, alias=alias)
    assert stack.files() == before


def test_a_prompt_and_its_template_must_leave_room_together(stack: Stack, tmp_path: Path) -> None:
    _, weights, config = stack.adapter(prefix_config(150), tmp_path)
    words = "film " * 110
    assert len(stack.tokenizer(words)["input_ids"]) < POSITIONS
    before = stack.files()
    with pytest.raises(RequestTooLong, match="150 virtual"):
        publish(stack, "tight", prompt=weights, config=config, task={"template": words + "{x}"})
    assert stack.files() == before


def test_a_prompt_without_effect_is_stored_but_not_released(
    stack: Stack, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As when an engine ignores the prompt: both runs of the comparison are the same."""
    monkeypatch.setattr(
        "app.serving.publishing.trial_run._bare", lambda request: replace(request, id=request.id + "-twin")
    )
    _, weights, config = stack.adapter(soft_config(3), tmp_path, seed=7)
    with pytest.raises(PromptRejected, match=r"stored but not released.*has no effect"):
        publish(stack, "useless", prompt=weights, config=config)
    assert stack.store.history("useless").releases == ()


@pytest.mark.parametrize("room", [3, 4, 7, 12])
def test_the_trial_takes_as_much_text_as_fits(stack: Stack, tmp_path: Path, room: int) -> None:
    _, weights, config = stack.adapter(prefix_config(POSITIONS - room), tmp_path)
    result = publish(stack, f"tight-{room}", prompt=weights, config=config)
    assert result.release is not None


def prefix_files(stack: Stack, rows: np.ndarray) -> tuple[bytes, bytes]:
    """A PREFIX_TUNING adapter of the given `[p, 2L, Hk, D]`."""
    flat = rows.reshape(rows.shape[0], -1).astype("<f4")
    header = {
        "prompt_embeddings": {"dtype": "F32", "shape": list(flat.shape), "data_offsets": [0, flat.nbytes]}
    }
    layers = stack.engine.geometry.layers[Site.DECODER_SELF]
    layer = layers[0]
    config = {
        "peft_type": "PREFIX_TUNING",
        "task_type": "CAUSAL_LM",
        "num_virtual_tokens": rows.shape[0],
        "num_transformer_submodules": 1,
        "num_layers": len(layers),
        "num_attention_heads": layer.num_kv_heads,
        "token_dim": layer.num_kv_heads * layer.key_dim,
        "inference_mode": True,
        "base_model_name_or_path": None,
    }
    return file_bytes(header, flat.tobytes()), json.dumps(config).encode()


def test_a_failed_trial_says_that_the_version_is_stored(tmp_path: Path) -> None:
    with running_stack(tmp_path / "store") as stack:
        stack.engine.drain(5)
        with pytest.raises(Unavailable, match="Version 1 of late is stored but not released"):
            publish(stack, "late", task={"template": "{x}"})
        assert len(stack.store.history("late").versions) == 1
        with pytest.raises(NotFound):
            stack.store.resolve("late")


def test_a_prompt_that_makes_nan_is_not_released(stack: Stack) -> None:
    """Finite, but so large that attention overflows."""
    layers = len(stack.engine.geometry.layers[Site.DECODER_SELF])
    layer = stack.engine.geometry.layers[Site.DECODER_SELF][0]
    rows = np.full((2, 2 * layers, layer.num_kv_heads, layer.key_dim), 3e38)
    weights, config = prefix_files(stack, rows)
    with pytest.raises(PromptRejected, match="stored but not released"):
        publish(stack, "overflow", prompt=weights, config=config)
    with pytest.raises(NotFound):
        stack.store.resolve("overflow")
    with pytest.raises(PromptRejected, match="stored but not released"):  # nor by trying again
        publish(stack, "overflow", prompt=weights, config=config)


def test_uploads_while_others_generate(stack: Stack, tmp_path: Path) -> None:
    _, weights, config = stack.adapter(soft_config(4), tmp_path)

    async def both() -> list[Any]:
        asks = [stack.generation.generate(GenerationRequest(inputs=f"the film {n}")) for n in range(8)]
        uploads = [
            stack.publishing.upload(f"busy-{n}", upload_of(prompt=weights, config=config)) for n in range(4)
        ]
        return await asyncio.gather(*asks, *uploads)

    assert len(run(both())) == 12
    assert stack.store.resolve("busy-0").prompt_digest == stack.store.resolve("busy-3").prompt_digest
