"""Every weight that is served came from the files, and the identity names all of these files."""

import json
import shutil
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, PreTrainedModel

from app.errors import UnsupportedModel
from app.models.loading import LoadedBase, load_base
from app.models.pretrained import load_pretrained, read_config
from tests import oracle
from tests.models.conftest import save
from tests.tiny_models import tiny_model

Tensors = dict[str, torch.Tensor]


def load(directory: Path, lines: list[str] | None = None) -> LoadedBase:
    progress = (lambda _: None) if lines is None else lines.append
    return load_base(str(directory), dtype="float32", device="cpu", progress=progress)


def rewrite(directory: Path, change: Callable[[Tensors], Tensors]) -> Path:
    file = directory / "model.safetensors"
    save_file(change(load_file(file)), file, metadata={"format": "pt"})
    return directory


def without(part: str) -> Callable[[Tensors], Tensors]:
    return lambda tensors: {name: tensor for name, tensor in tensors.items() if part not in name}


def test_names_with_a_wrapper_in_front_are_refused_with_the_reason(saved_llama: Path) -> None:
    rewrite(saved_llama, lambda tensors: {f"_orig_mod.{name}": each for name, each in tensors.items()})
    with pytest.raises(
        UnsupportedModel, match=r"not complete: .* more are not there; there is '_orig_mod\."
    ) as e:
        load(saved_llama)
    assert "without its wrapper" in e.value.message
    assert "\n" not in e.value.message


def test_weights_that_a_gpu_does_not_hold_are_refused_with_their_size(
    saved_llama: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def full(model: PreTrainedModel, device: torch.device) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB")

    monkeypatch.setattr(PreTrainedModel, "to", full)
    with pytest.raises(UnsupportedModel, match=r"GiB in torch.float32, don't fit on cpu: .* smaller dtype"):
        load_pretrained(
            str(saved_llama),
            read_config(str(saved_llama)),
            dtype=torch.float32,
            device=torch.device("cpu"),
            progress=lambda _: None,
        )


MISSING = {
    "a product of one layer": (
        "llama",
        {},
        "layers.1.mlp.down_proj",
        r"model\.layers\.1\.mlp\.down_proj\.weight",
    ),
    "an untied head": ("llama", {"tie_word_embeddings": False}, "lm_head", r"lm_head\.weight"),
    "the embedding": ("llama", {}, "embed_tokens", r"model\.embed_tokens\.weight"),
    "a bias": ("qwen2", {}, "layers.0.self_attn.k_proj.bias", r"layers\.0\.self_attn\.k_proj\.bias"),
    "an expert's part": ("mixtral", {}, "experts.2.w1", r"experts"),
    "all parts of an expert": ("mixtral", {}, "layers.1.block_sparse_moe.experts.3.", r"experts"),
    "a norm": ("gpt2", {}, "ln_f.weight", r"transformer\.ln_f\.weight"),
}


@pytest.mark.parametrize("case", MISSING)
def test_a_weight_that_is_not_there_is_named(case: str, tmp_path: Path) -> None:
    architecture, shape, part, named = MISSING[case]
    directory = rewrite(save(tiny_model(architecture, **shape), tmp_path / architecture), without(part))
    with pytest.raises(UnsupportedModel, match=named) as refusal:
        load(directory)
    assert "\n" not in refusal.value.message


def test_a_weight_of_another_shape_is_named_with_both(saved_llama: Path) -> None:
    rewrite(saved_llama, lambda all_: all_ | {"model.norm.weight": torch.ones(47)})
    with pytest.raises(UnsupportedModel, match=r"model\.norm\.weight \(47,\) instead of \(48,\)"):
        load(saved_llama)


@pytest.mark.parametrize(("kind", "named"), [(torch.float8_e4m3fn, "F8_E4M3"), (torch.int8, "I8")])
def test_quantized_weights_without_a_word_in_the_config_are_refused(
    saved_llama: Path, kind: torch.dtype, named: str
) -> None:
    """As tools leave them that write how they quantized to a file of their own, with scales beside."""
    name = "model.layers.0.mlp.down_proj"
    scale = {f"{name}.weight_scale": torch.tensor(0.01)}
    rewrite(saved_llama, lambda all_: all_ | scale | {f"{name}.weight": all_[f"{name}.weight"].to(kind)})
    with pytest.raises(UnsupportedModel, match=rf"quantized: {name}\.weight \({named}\), but its config"):
        load(saved_llama)


def test_a_tied_head_need_not_be_there(tmp_path: Path) -> None:
    directory = save(tiny_model("llama", tie_word_embeddings=True), tmp_path / "tied")
    assert "lm_head.weight" not in load_file(directory / "model.safetensors")
    assert load(directory).report.weights_error < 1e-4


def test_old_checkpoints_with_buffers_and_without_a_prefix_load(tmp_path: Path) -> None:
    """As gpt2 lies on the hub: no `transformer.` in front, causal masks among the weights."""
    directory = save(tiny_model("gpt2"), tmp_path / "gpt2")
    buffers = {
        f"h.{i}.attn.{name}": torch.ones(1, 1, 8, 8) for i in range(3) for name in ("bias", "masked_bias")
    }
    rewrite(
        directory,
        lambda tensors: {n.removeprefix("transformer."): each for n, each in tensors.items()} | buffers,
    )
    assert load(directory).report.weights_error < 1e-4


def test_old_rotary_tables_are_no_reason_to_refuse(saved_llama: Path) -> None:
    tables = {f"model.layers.{i}.self_attn.rotary_emb.inv_freq": torch.ones(6) for i in range(3)}
    rewrite(saved_llama, lambda tensors: tensors | tables)
    assert load(saved_llama).report.weights_error < 1e-4


def test_what_belongs_to_nothing_is_told(saved_llama: Path) -> None:
    rewrite(saved_llama, lambda tensors: tensors | {"value_head.weight": torch.ones(1, 48)})
    lines: list[str] = []
    load(saved_llama, lines)
    assert any("left out" in line and "value_head.weight" in line for line in lines)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        (
            "model.safetensors.index.json",
            '{"metadata": {}, "weight_map": {"lm_head.weight": "gone.safetensors"}}',
        ),
        ("model.safetensors.index.json", "{"),
        ("config.json", '{"model_type": "llama", "hidden_size": "wide"}'),
        ("config.json", '{"model_type": "llama", "transformers_weights": "adapter_model.bin"}'),
    ],
)
def test_whatever_is_wrong_is_said_in_one_line(saved_llama: Path, name: str, text: str) -> None:
    if name != "config.json":
        (saved_llama / "model.safetensors").unlink()
    (saved_llama / name).write_text(text)
    with pytest.raises(UnsupportedModel, match=r"cannot|safetensors") as refusal:
        load(saved_llama)
    assert "\n" not in refusal.value.message


@pytest.mark.parametrize(
    ("settings", "package"),
    [
        ({"quant_method": "bitsandbytes", "load_in_4bit": True}, "bitsandbytes"),
        ({"quant_method": "bitsandbytes", "load_in_8bit": True}, "bitsandbytes"),
        ({"quant_method": "gptq", "bits": 4}, "optimum"),
        ({"quant_method": "awq", "bits": 4}, "gptqmodel"),
        ({"quant_method": "compressed-tensors", "format": "pack-quantized"}, "compressed-tensors"),
        (
            {"quant_method": "torchao", "quant_type": {"default": {"_type": "Int8WeightOnlyConfig"}}},
            "torchao",
        ),
        ({"quant_method": "quanto", "weights": "int8"}, "optimum-quanto"),
        ({"quant_method": "one-of-tomorrow"}, None),
        ({"bits": 4}, None),
    ],
    ids=lambda value: str(value.get("quant_method")) if isinstance(value, dict) else "",
)
def test_a_quantized_base_says_which_package_it_needs(
    saved_llama: Path, settings: dict[str, Any], package: str | None
) -> None:
    if package is not None and find_spec(package.replace("-", "_")):
        pytest.skip(f"{package} is installed")
    file = saved_llama / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"quantization_config": settings}))
    with pytest.raises(
        UnsupportedModel, match=f"pip install.*{package}" if package else "quant_method"
    ) as refusal:
        load(saved_llama)
    assert "\n" not in refusal.value.message


def test_the_identity_is_of_the_files_that_are_loaded(saved_llama: Path, tmp_path: Path) -> None:
    """One file wins over shards beside it; config.json may name another."""
    first = load(saved_llama).backbone.geometry.fingerprint
    other = save(tiny_model("llama", seed=1), tmp_path / "other", max_shard_size="40KB")
    for shard in other.glob("model*"):
        shutil.copy(shard, saved_llama)
    assert load(saved_llama).backbone.geometry.fingerprint == first
    single = save(tiny_model("llama", seed=2), tmp_path / "third") / "model.safetensors"
    shutil.copy(single, saved_llama / "ema.safetensors")
    config = json.loads((saved_llama / "config.json").read_text())
    (saved_llama / "config.json").write_text(json.dumps(config | {"transformers_weights": "ema.safetensors"}))
    named = load(saved_llama)
    assert named.backbone.geometry.fingerprint != first
    assert torch.equal(
        named.backbone.model.get_input_embeddings().weight,
        tiny_model("llama", seed=2).get_input_embeddings().weight,
    )


def with_lora(directory: Path, *, seed: int = 0) -> Path:
    base = tiny_model("llama")
    tuned = peft.get_peft_model(
        base, peft.LoraConfig(task_type="CAUSAL_LM", r=4, target_modules="all-linear")
    )
    torch.manual_seed(seed)
    for name, parameter in tuned.named_parameters():
        if "lora_" in name:
            parameter.data.normal_(std=0.3)
    tuned.save_pretrained(directory)
    return directory


def test_a_lora_beside_the_weights_is_told_and_part_of_the_identity(saved_llama: Path) -> None:
    plain = load(saved_llama)
    ids = torch.tensor([[5, 6, 7, 8]])
    lines: list[str] = []
    names = {plain.backbone.geometry.fingerprint}
    for seed in (1, 2):
        with_lora(saved_llama, seed=seed)
        adapted = load(saved_llama, lines)
        names.add(adapted.backbone.geometry.fingerprint)
    config = saved_llama / "adapter_config.json"
    config.write_text(json.dumps(json.loads(config.read_text()) | {"lora_alpha": 3}))
    weaker = load(saved_llama)
    assert len(names | {weaker.backbone.geometry.fingerprint}) == 4
    assert any("adapter (LORA)" in line for line in lines)
    served: Any = weaker.backbone.model
    served.set_attn_implementation("eager")
    expected = AutoModelForCausalLM.from_pretrained(saved_llama, attn_implementation="eager")
    with torch.inference_mode():
        found, want = served(input_ids=ids).logits, expected(input_ids=ids).logits
    assert (found - want).abs().max() < 1e-4
    assert (want - tiny_model("llama")(input_ids=ids).logits).abs().max() > 1e-2, "the adapter does something"


@pytest.mark.parametrize("make", [oracle.soft_config, oracle.prefix_config, oracle.p_tuning_config])
def test_a_prompt_beside_the_weights_is_no_part_of_the_base(
    saved_llama: Path, make: Callable[[int], peft.PeftConfig]
) -> None:
    plain = load(saved_llama).backbone.geometry.fingerprint
    oracle.saved(oracle.tuned(tiny_model("llama"), make(4), seed=0), saved_llama)
    lines: list[str] = []
    assert load(saved_llama, lines).backbone.geometry.fingerprint == plain
    assert any("prompt lies beside the weights" in line for line in lines)


def test_an_adapter_never_hides_what_the_base_lacks(saved_llama: Path) -> None:
    with_lora(saved_llama)
    rewrite(saved_llama, without("layers.0.mlp.up_proj"))
    with pytest.raises(UnsupportedModel, match=r"layers\.0\.mlp\.up_proj"):
        load(saved_llama)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda folder: (folder / "adapter_model.safetensors").unlink(), r"no adapter_model\.safetensors"),
        (lambda folder: (folder / "adapter_config.json").write_text("{"), "move it away"),
        (
            lambda folder: (folder / "adapter_config.json").write_text('{"peft_type": "NEW"}'),
            "can't be applied",
        ),
        (
            lambda folder: save_file({"other": torch.ones(1)}, folder / "adapter_model.safetensors"),
            "is not complete",
        ),
    ],
)
def test_an_adapter_that_cannot_be_applied_is_refused(
    saved_llama: Path, change: Callable[[Path], object], reason: str
) -> None:
    change(with_lora(saved_llama))
    with pytest.raises(UnsupportedModel, match=reason) as refusal:
        load(saved_llama)
    assert "\n" not in refusal.value.message
