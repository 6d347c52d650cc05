"""Adapters that bring the base's embeddings along, as PEFT saves them where tokens were added."""

import hashlib
import json
from collections.abc import Callable
from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest
import safetensors.torch
import torch
from transformers import (
    BloomConfig,
    BloomForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GPTNeoXConfig,
    GPTNeoXForCausalLM,
    PhiConfig,
    PhiForCausalLM,
)

from app.errors import PromptRejected
from app.models.own_tensors import digest_of_rows, own_tensor
from app.serving.publishing.publisher import UploadResult
from app.store.safetensors_file import parse_safetensors
from app.store.saved_tensors import LEFT_OUT, holds_others, without_others
from tests.oracle import greedy, prefix_config, soft_config, tuned
from tests.serving.stack import Stack, run, running_stack, upload_of

Files = tuple[bytes, bytes]


def adapter(
    stack: Stack, directory: Path, change: Callable[[Any], object], config: Any = None, **saving: Any
) -> tuple[Any, Files]:
    """An adapter over a changed copy of the base, in the two files that PEFT writes."""
    base = deepcopy(stack.base)
    change(base)
    model = tuned(base, config or soft_config(3), seed=5)
    model.save_pretrained(directory, **saving)
    names = ("adapter_model.safetensors", "adapter_config.json")
    weights, settings = ((directory / name).read_bytes() for name in names)
    return model, (weights, settings)


def publish(stack: Stack, task_id: str, files: Files, *, pushed: bool = False) -> UploadResult:
    """`pushed`: the embeddings' digests are sent in their place, as `promptplex push` does."""
    prompt, config = files
    if pushed:
        file = parse_safetensors(prompt)
        assert holds_others(file, "prompt_embeddings")
        geometry = stack.engine.geometry
        smaller = without_others(
            file, "prompt_embeddings", rows=geometry.vocab_size, base_dtype=geometry.dtype
        )
        assert len(smaller) < len(prompt) / 10
        prompt = smaller
    return run(stack.publishing.upload(task_id, upload_of(prompt=prompt, config=config)))


def rows_of(stack: Stack) -> int:
    return stack.engine.geometry.vocab_size


def poison(model: Any) -> None:
    with torch.no_grad():
        model.get_output_embeddings().weight[3, 5] += 1e-3


@pytest.mark.parametrize("pushed", [False, True])
@pytest.mark.parametrize("make", [soft_config, prefix_config])
def test_the_bases_own_rows_are_dropped(stack: Stack, tmp_path: Path, make: Any, *, pushed: bool) -> None:
    model, files = adapter(stack, tmp_path, lambda base: None, make(3), save_embedding_layers=True)
    result = publish(stack, "own", files, pushed=pushed)
    assert (result.warnings, result.version.num_virtual_tokens) == ((), 3)
    plain = adapter(stack, tmp_path, lambda base: None, make(3))[1]
    assert result.version.prompt_digest == publish(stack, "plain", plain).version.prompt_digest
    assert greedy(model, stack.tokenizer("the film")["input_ids"], 4).tokens


@pytest.mark.parametrize("pushed", [False, True])
def test_added_tokens_are_left_out_and_said(stack: Stack, tmp_path: Path, *, pushed: bool) -> None:
    more = rows_of(stack) + 5
    _, files = adapter(
        stack, tmp_path, lambda base: base.resize_token_embeddings(more), save_embedding_layers=True
    )
    result = publish(stack, "more", files, pushed=pushed)
    assert len(result.warnings) == 2
    assert all("5 rows more than the base model" in warning for warning in result.warnings)


@pytest.mark.parametrize("pushed", [False, True])
def test_fewer_rows_may_be_the_bases_own(stack: Stack, tmp_path: Path, *, pushed: bool) -> None:
    fewer = rows_of(stack) - 7
    _, files = adapter(
        stack, tmp_path, lambda base: base.resize_token_embeddings(fewer), save_embedding_layers=True
    )
    assert publish(stack, "fewer", files, pushed=pushed).warnings == ()


@pytest.mark.parametrize("pushed", [False, True])
def test_trained_rows_are_refused_with_the_way_out(stack: Stack, tmp_path: Path, *, pushed: bool) -> None:
    before = stack.files()
    _, files = adapter(stack, tmp_path, poison, save_embedding_layers=True)
    with pytest.raises(PromptRejected, match=r"save_embedding_layers=False.*tensor: 'base_model\.lm_head"):
        publish(stack, "trained", files, pushed=pushed)
    assert stack.files() == before


def test_modules_to_save_may_be_the_bases_own(stack: Stack, tmp_path: Path) -> None:
    config = soft_config(3)
    config.modules_to_save = ["lm_head"]
    _, files = adapter(stack, tmp_path, lambda base: None, config)
    assert publish(stack, "module", files).release is not None
    changed, settings = adapter(stack, tmp_path, poison, config)[1]
    with pytest.raises(PromptRejected, match="not the base model's"):
        publish(stack, "module", (changed, settings))
    tensors = safetensors.torch.load(changed)
    alone = safetensors.torch.save({"prompt_embeddings": tensors["prompt_embeddings"]})
    with pytest.raises(PromptRejected, match=r"modules_to_save.*'lm_head'"):
        publish(stack, "module", (alone, settings))


def test_anything_else_is_refused(stack: Stack, tmp_path: Path) -> None:
    weights, settings = adapter(stack, tmp_path, lambda base: None)[1]
    tensors = safetensors.torch.load(weights)
    for name, tensor in {
        "base_model.model.norm.weight": torch.ones(48),
        "prefix_task_cols": torch.ones(2, 3, 1),
        "lm_head.weight": torch.ones(rows_of(stack), 7),
        "lm_head.bias": torch.ones(rows_of(stack)),
        "embed_tokens.weight": torch.ones(()),
        "x.embed_tokens.weight": torch.ones(0, 48),
    }.items():
        with pytest.raises(PromptRejected, match=name.replace(".", r"\.")):
            publish(stack, "other", (safetensors.torch.save(tensors | {name: tensor}), settings))


@pytest.mark.parametrize("shape", [[], [0, 48], [-1, 48], [1e9, 48], [True, 48], [1 << 40, 48], "5", None])
def test_what_was_left_out_had_a_shape(stack: Stack, tmp_path: Path, shape: object) -> None:
    weights, settings = adapter(stack, tmp_path, lambda base: None)[1]
    told = {"name": "lm_head.weight", "dtype": "F32", "compared_in": "F32", "rows": -1}
    described = [told | {"shape": shape, "sha256": hashlib.sha256().hexdigest()}]
    tensors = safetensors.torch.load(weights)
    claimed = safetensors.torch.save(tensors, metadata={LEFT_OUT: json.dumps(described)})
    with pytest.raises(PromptRejected, match="is malformed: push the adapter again"):
        publish(stack, "claimed", (claimed, settings))


def test_a_bf16_base_compares_what_it_would_see(tmp_path: Path) -> None:
    """Trained in float32 or bf16, served in bf16; on some machines its head is packed."""
    with running_stack(tmp_path / "store", dtype=torch.bfloat16) as stack:
        for dtype in (torch.float32, torch.bfloat16):
            _, files = adapter(
                stack, tmp_path / "a", lambda base, dtype=dtype: base.to(dtype), save_embedding_layers=True
            )
            for pushed in (False, True):
                assert publish(stack, f"half-{pushed}".lower(), files, pushed=pushed).warnings == ()
        _, files = adapter(stack, tmp_path / "a", lambda base: poison_much(base), save_embedding_layers=True)
        with pytest.raises(PromptRejected, match="not the base model's"):
            publish(stack, "half-trained", files)


def poison_much(model: Any) -> None:
    with torch.no_grad():
        model.get_input_embeddings().weight[3, 5] += 1


@pytest.mark.parametrize(
    "model",
    [
        GPT2LMHeadModel(GPT2Config(n_embd=24, n_layer=1, n_head=3, vocab_size=64)),
        BloomForCausalLM(BloomConfig(hidden_size=32, n_layer=1, n_head=4, vocab_size=64)),
        GPTNeoXForCausalLM(
            GPTNeoXConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=32,
                vocab_size=64,
            )
        ),
        PhiForCausalLM(
            PhiConfig(
                hidden_size=32,
                num_hidden_layers=1,
                num_attention_heads=4,
                intermediate_size=32,
                vocab_size=64,
            )
        ),
    ],
    ids=lambda model: model.config.model_type,
)
def test_every_name_that_peft_gives_them_is_found(model: Any, tmp_path: Path) -> None:
    tuned(deepcopy(model), soft_config(3), seed=1).save_pretrained(tmp_path, save_embedding_layers=True)
    tensors = safetensors.torch.load_file(tmp_path / "adapter_model.safetensors")
    del tensors["prompt_embeddings"]
    assert len(tensors) >= 2
    for name, tensor in tensors.items():
        found = own_tensor(model, name)
        assert found is not None, name
        assert torch.equal(found, tensor), name
        assert digest_of_rows(found, 10, "F32") == digest_of_rows(tensor[:10], 10, "F32")
