"""PEFT directories: tensor for tensor what PEFT itself feeds the model, and nothing ambiguous."""

import hashlib
import json
from typing import Any

import numpy as np
import pytest
import safetensors.torch
import torch

from app.errors import PromptRejected
from app.prompt import Prompt, PromptKind
from app.store.importers.peft import parse_config
from app.store.source_files import SourceFile
from app.store.validation import validate_prompt
from tests.store.builders import HIDDEN, geometry, imported_from, peft_files, soft
from tests.store.conftest import Adapter

_DTYPES = {"F32": torch.float32, "BF16": torch.bfloat16, "F16": torch.float16}


def as_torch(prompt: Prompt, name: str) -> torch.Tensor:
    info = prompt.tensors[name]
    return torch.frombuffer(bytearray(prompt.tensor_bytes(name)), dtype=_DTYPES[info.dtype]).view(info.shape)


def import_peft(config: bytes, weights: bytes) -> Prompt:
    return imported_from(weights, config).prompt


def check_equals_peft(adapter: Adapter) -> Prompt:
    prompt = import_peft(adapter.config, adapter.weights)
    assert prompt.tensors.keys() == adapter.expected.keys()
    for name, expected in adapter.expected.items():
        found = as_torch(prompt, name)
        assert found.dtype == expected.dtype
        assert torch.equal(found, expected), name
    config = json.loads(adapter.config)
    assert prompt.num_virtual_tokens == prompt.position_offset == config["num_virtual_tokens"]
    validate_prompt(prompt, adapter.geometry)
    return prompt


def test_every_kind_equals_peft(adapter: Adapter) -> None:
    prompt = check_equals_peft(adapter)
    is_soft = "dec.embeds" in adapter.expected
    assert prompt.kind is (PromptKind.SOFT if is_soft else PromptKind.PREFIX)
    # The library reads the canonical file to the same numbers.
    for name, tensor in safetensors.torch.load(prompt.data).items():
        assert torch.equal(tensor, adapter.expected[name])


def test_half_precision_is_moved_bit_by_bit(half_adapter: Adapter) -> None:
    prompt = check_equals_peft(half_adapter)
    assert {info.dtype for info in prompt.tensors.values()} <= {"BF16", "F16"}


def test_provenance(adapter: Adapter) -> None:
    imported = imported_from(adapter.weights, adapter.config)
    assert imported.provenance["source_format"] == "peft"
    assert imported.provenance["source_kind"] == json.loads(adapter.config)["peft_type"]
    assert imported.provenance["source_sha256"] == hashlib.sha256(adapter.weights).hexdigest()
    again = imported_from(imported.prompt.data, None)
    assert again.prompt == imported.prompt
    assert again.provenance == {"source_format": "promptplex", "source_sha256": imported.prompt.digest}


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"peft_type": "LORA"}, "not a prompt-learning kind"),
        ({"peft_type": "MULTITASK_PROMPT_TUNING"}, "not supported yet"),
        ({"peft_type": "ADAPTION_PROMPT"}, "gated attention"),
        ({"peft_type": "x" * 500}, "PROMPT_TUNING, P_TUNING, PREFIX_TUNING or CARTRIDGE"),
        ({"peft_type": None}, "peft_type is wrong"),
        ({"peft_type": ["PROMPT_TUNING"]}, "peft_type is wrong"),
        ({"task_type": "SEQ_CLS"}, "expected: CAUSAL_LM"),
        ({"task_type": None}, "expected: CAUSAL_LM"),
        ({"num_virtual_tokens": 4}, "[4, 16]; found: [3, 16]"),
        ({"num_virtual_tokens": None}, "num_virtual_tokens is wrong"),
        ({"num_virtual_tokens": "3"}, "num_virtual_tokens is wrong"),
        ({"num_virtual_tokens": 3.0}, "num_virtual_tokens is wrong"),
        ({"num_virtual_tokens": True}, "num_virtual_tokens is wrong"),
        ({"num_virtual_tokens": 0}, "num_virtual_tokens is wrong"),
        ({"num_virtual_tokens": 10**9}, "num_virtual_tokens is wrong"),
        ({"token_dim": 32}, "[3, 32]; found: [3, 16]"),
        ({"token_dim": -16}, "token_dim is wrong"),
        ({"num_transformer_submodules": 2}, "num_transformer_submodules is wrong"),
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"base_model_name_or_path": 3}, "base_model_name_or_path"),
        ({"base_model_name_or_path": "x" * 2000}, "at most 1024"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": None}, "num_layers is wrong"),
        ({"peft_type": "PREFIX_TUNING", "num_layers": 10**6}, "num_layers is wrong"),
        ({"peft_type": "PREFIX_TUNING", "num_attention_heads": 0}, "num_attention_heads is wrong"),
        ({"peft_type": "PREFIX_TUNING", "num_attention_heads": 3}, "multiple of num_attention_heads (3)"),
        ({"peft_type": "PREFIX_TUNING"}, "2 * num_layers * token_dim] = [3, 64]"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": 4}, "num_frozen_tokens is wrong"),
        ({"peft_type": "CARTRIDGE", "num_frozen_tokens": True}, "num_frozen_tokens is wrong"),
    ],
)
def test_refuses_config(changes: dict[str, Any], reason: str) -> None:
    weights, config = peft_files(**changes)
    with pytest.raises(PromptRejected) as caught:
        import_peft(config, weights)
    assert reason in caught.value.message
    assert len(caught.value.message) < 400


@pytest.mark.parametrize(
    ("config", "reason"),
    [
        (b"", "not JSON"),
        (b"[]", "must be a JSON object"),
        (b"{", "not JSON"),
        (b"\xff{}", "UTF-8"),
        (b'{"peft_type":"LORA","peft_type":"PROMPT_TUNING"}', "appears twice"),
        (b'{"a":{"b":1,"b":1}}', "appears twice"),
        (b'{"a":NaN}', "NaN"),
        (b'{"a":1e999}', "out of range"),
        (b'{"a":' + b"[" * 30000 + b"]" * 30000, "nests"),
        (b'{"a":' + b"9" * 5000 + b"}", "too long"),
        (b'{"a":"' + b"x" * 65536 + b'"}', "at most 64 KiB"),
    ],
)
def test_config_is_parsed_strictly(config: bytes, reason: str) -> None:
    with pytest.raises(PromptRejected) as caught:
        import_peft(config, peft_files()[0])
    assert reason in caught.value.message


def test_fields_of_later_versions_are_ignored() -> None:
    weights, config = peft_files(brand_new_field={"a": [1.5]})
    assert import_peft(config, weights).num_virtual_tokens == 3
    assert parse_config(SourceFile(config)).base_name is None


@pytest.mark.parametrize(
    "config",
    [
        {"num_virtual_tokens": 3, "peft_type": "PROMPT_TUNING"},  # as TGIS converts its prompts
        {"peft_type": "PROMPT_TUNING"},
        {"peft_type": "P_TUNING", "base_model_name_or_path": "bigscience/bloomz-560m"},
        {"peft_type": "PROMPT_TUNING", "token_dim": None, "num_transformer_submodules": None},
        {
            "peft_type": "PROMPT_TUNING",
            "task_type": "CAUSAL_LM",
            "token_dim": HIDDEN,
            "modules_to_save": None,
        },
    ],
)
def test_what_a_config_leaves_out_is_taken_from_the_tensor(config: dict[str, Any]) -> None:
    weights, whole = peft_files()
    prompt = import_peft(json.dumps(config).encode(), weights)
    assert prompt.digest == import_peft(whole, weights).digest
    with pytest.raises(PromptRejected, match=r"found: \[48\]"):
        import_peft(json.dumps(config).encode(), peft_files(np.ones(48, dtype="<f4"))[0])


def test_a_prefix_needs_its_layers_and_heads(half_adapter: Adapter) -> None:
    for name in ("num_layers", "num_attention_heads", "token_dim"):
        config = json.loads(half_adapter.config)
        del config[name]
        with pytest.raises(PromptRejected, match=f"{name} is wrong.*found: nothing"):
            import_peft(json.dumps(config).encode(), half_adapter.weights)


@pytest.mark.parametrize(
    "name",
    [
        "prompt_encoder.default.embedding.weight",
        "prompt_encoder.embedding.weight",
        "base_model.prompt_encoder.my_adapter.embedding.weight",
    ],
)
def test_a_state_dicts_name_for_the_prompt(name: str) -> None:
    weights, config = peft_files(name=name)
    assert import_peft(config, weights).digest == import_peft(config, peft_files()[0]).digest
    with pytest.raises(PromptRejected, match="p-tuning makes its prompt from"):
        import_peft(peft_files(peft_type="P_TUNING")[1], weights)
    with pytest.raises(PromptRejected, match=r"send its adapter_config\.json"):
        imported_from(weights, None)


def test_refuses_other_tensors() -> None:
    _, config = peft_files()
    with pytest.raises(PromptRejected, match=r"tensor: 'base_model\.lora_A'"):
        import_peft(config, peft_files(name="base_model.lora_A")[0])
    with pytest.raises(PromptRejected, match=r"tensor: '\.\./\.\./x'"):
        import_peft(config, peft_files(name="../../x")[0])
    with pytest.raises(PromptRejected, match="no tensors"):
        import_peft(config, b"\x02\0\0\0\0\0\0\0{}")
    with pytest.raises(PromptRejected, match=r"found: \[48\]"):
        import_peft(config, peft_files(np.ones(48, dtype="<f4"))[0])


def test_a_file_alone_and_a_config_alone() -> None:
    weights, config = peft_files()
    with pytest.raises(PromptRejected, match=r"send its adapter_config\.json"):
        imported_from(weights, None)
    with pytest.raises(PromptRejected, match=r"send adapter_model\.safetensors"):
        imported_from(None, config)
    with pytest.raises(PromptRejected, match=r"send adapter_model\.safetensors"):
        imported_from(b"", None)
    with pytest.raises(PromptRejected, match="neither a PEFT adapter"):
        imported_from(peft_files(name="x")[0], None)
    with pytest.raises(PromptRejected, match="Unexpected tensor"):
        imported_from(soft().data, config)
    assert imported_from(weights, config).prompt.num_virtual_tokens == 3


def test_equal_prompts_from_different_files_have_one_digest() -> None:
    weights, config = peft_files()
    other = peft_files(base_model_name_or_path="somewhere/else", peft_type="P_TUNING")[1]
    assert import_peft(config, weights).digest == import_peft(other, weights).digest
    validate_prompt(import_peft(config, weights), geometry())
