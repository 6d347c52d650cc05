"""From a directory to a probed base: dtype, identity, end-of-sequence ids, and refusals."""

import json
import shutil
from pathlib import Path

import pytest
import torch

from app.errors import UnsupportedModel
from app.models.loading import load_base
from app.models.placement import choose_dtype
from tests.models.conftest import save
from tests.tiny_models import VOCABULARY, tiny_model


def load(directory: Path, **settings: str) -> object:
    return load_base(str(directory), device="cpu", progress=lambda _: None, **settings)


def test_a_saved_model_loads_with_visible_progress(saved_llama: Path) -> None:
    lines: list[str] = []
    base = load_base(str(saved_llama), dtype="float32", device="cpu", progress=lines.append)
    assert base.name == "llama"
    assert base.eos_ids == {VOCABULARY - 1}
    assert base.backbone.dtype == torch.float32
    assert base.report.twin_error < 1e-4
    assert base.report.weights_error < 1e-4
    assert any("probing" in line for line in lines)
    assert any("loading" in line for line in lines)


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_other_dtypes_pass_the_check_of_the_real_weights(saved_llama: Path, dtype: str) -> None:
    base = load_base(str(saved_llama), dtype=dtype, device="cpu", progress=lambda _: None)
    assert base.backbone.geometry.dtype == dtype
    assert 0 < base.report.weights_error < 0.08


def test_the_fingerprint_names_weights_config_and_tokenizer(saved_llama: Path, tmp_path: Path) -> None:
    def fingerprint(directory: Path, dtype: str = "float32") -> str:
        base = load_base(str(directory), dtype=dtype, device="cpu", progress=lambda _: None)
        return base.backbone.geometry.fingerprint

    first = fingerprint(saved_llama)
    moved = shutil.copytree(saved_llama, tmp_path / "elsewhere" / "renamed")
    sharded = save(tiny_model("llama"), tmp_path / "sharded", max_shard_size="40KB")
    assert len(list(sharded.glob("*.safetensors"))) > 1
    assert fingerprint(saved_llama) == fingerprint(moved) == fingerprint(sharded) == first
    assert fingerprint(saved_llama, "bfloat16") == first, "it names the stored base, not the load dtype"
    other_weights = save(tiny_model("llama", seed=1), tmp_path / "other")
    other_config = save(tiny_model("llama", rms_norm_eps=1e-3), tmp_path / "config")
    (moved / "tokenizer.json").write_text((moved / "tokenizer.json").read_text().replace('"t5"', '"changed"'))
    names = {first, *map(fingerprint, (other_weights, other_config, moved))}
    assert len(names) == 4


def test_the_context_can_be_capped(saved_llama: Path) -> None:
    base = load_base(
        str(saved_llama), dtype="float32", device="cpu", max_context=100, progress=lambda _: None
    )
    assert base.backbone.geometry.max_positions == 100


def test_refusals_say_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="configuration"):
        load(tmp_path)
    no_weights = save(tiny_model("llama"), tmp_path / "no-weights")
    (no_weights / "model.safetensors").unlink()
    with pytest.raises(UnsupportedModel, match="weights"):
        load(no_weights)
    with pytest.raises(ValueError, match="unknown dtype 'int4'"):
        choose_dtype("int4", torch.device("cpu"))


def test_what_an_operator_mistypes_is_explained(saved_llama: Path, tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match=r"there is no directory '/nope'"):
        load(Path("/nope"))
    with pytest.raises(ValueError, match="--device cpu"):
        load_base(str(saved_llama), device="cuda:7", progress=lambda _: None)
    (saved_llama / "tokenizer.json").unlink()
    (saved_llama / "tokenizer_config.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json beside the weights"):
        load(saved_llama)
    weights = saved_llama / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])
    with pytest.raises(UnsupportedModel, match="cannot load the weights"):
        load(saved_llama)


def test_damaged_weights_are_named_as_such(tmp_path: Path) -> None:
    model = tiny_model("llama")
    model.get_input_embeddings().weight.fill_(float("nan"))
    with pytest.raises(UnsupportedModel, match="NaN or infinite logits"):
        load(save(model, tmp_path / "nan"), dtype="float32")


def test_remote_code_is_never_run(saved_llama: Path) -> None:
    file = saved_llama / "config.json"
    config = json.loads(file.read_text())
    code = {"AutoConfig": "evil.Evil", "AutoModelForCausalLM": "evil.Evil"}
    file.write_text(json.dumps(config | {"model_type": "custom", "auto_map": code}))
    witness = saved_llama / "was_here"
    (saved_llama / "evil.py").write_text(f"open({str(witness)!r}, 'w').close()\n")
    with pytest.raises(UnsupportedModel):
        load(saved_llama)
    assert not witness.exists()


@pytest.mark.parametrize("file", ["generation_config.json", "config.json"])
def test_the_generation_config_comes_with_the_base(saved_llama: Path, tmp_path: Path, file: str) -> None:
    """Old models hold its values in config.json, where they count if there is no other file."""
    directory = shutil.copytree(saved_llama, tmp_path / "base")
    (directory / "generation_config.json").unlink(missing_ok=True)
    path = directory / file
    values = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(values | {"repetition_penalty": 1.1, "suppress_tokens": [3]}))
    base = load_base(str(directory), dtype="float32", device="cpu", progress=lambda _: None)
    assert base.generation["repetition_penalty"] == 1.1
    assert base.generation["suppress_tokens"] == [3]
    assert base.eos_ids == {VOCABULARY - 1}
