"""From a directory to a probed encoder-decoder: where its decoder begins, its identity, and refusals."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from app.errors import UnsupportedModel
from app.models.loading import LoadedBase, load_base
from tests.models.conftest import save
from tests.tiny_models import VOCABULARY, tiny_seq2seq


@pytest.fixture
def saved(tmp_path: Path, own_cache: None) -> Callable[..., Path]:
    return lambda name: save(tiny_seq2seq(name), tmp_path / name)


def load(directory: Path, dtype: str = "float32", **settings: Any) -> LoadedBase:
    return load_base(str(directory), dtype=dtype, device="cpu", progress=lambda _: None, **settings)


def edit(file: Path, **changes: Any) -> None:
    values = json.loads(file.read_text()) | changes
    file.write_text(json.dumps({name: value for name, value in values.items() if value is not None}))


@pytest.mark.parametrize("name", ["t5-gated", "bart"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_saved_encoder_decoder_loads(saved: Callable[..., Path], name: str, dtype: str) -> None:
    base = load(saved(name), dtype, max_context=100)
    geometry = base.backbone.geometry
    assert (geometry.has_encoder, geometry.max_source_positions, geometry.max_positions) == (True, 100, 100)
    assert (base.decoder_start_id, base.eos_ids, geometry.dtype) == (2, {VOCABULARY - 1}, dtype)
    assert base.report.twin_error < 1e-4
    assert base.report.weights_error < (1e-4 if dtype == "float32" else 0.08)


def test_causal_bases_have_no_decoder_start(saved_llama: Path) -> None:
    assert load(saved_llama).decoder_start_id is None


def test_float16_is_refused_for_encoder_decoders(saved: Callable[..., Path]) -> None:
    with pytest.raises(UnsupportedModel, match=r"'bart' is an encoder-decoder.*bfloat16 or float32"):
        load(saved("bart"), "float16")


def test_how_a_decoder_begins_is_part_of_its_identity(saved: Callable[..., Path], tmp_path: Path) -> None:
    first = saved("bart")
    names = [load(first).backbone.geometry.fingerprint]
    for field, value in (("decoder_start_token_id", 3), ("forced_bos_token_id", 4)):
        other = shutil.copytree(first, tmp_path / field)
        edit(other / "generation_config.json", **{field: value})
        base = load(other)
        names.append(base.backbone.geometry.fingerprint)
        assert base.generation[field] == value
    assert base.decoder_start_id == 2
    assert len(set(names)) == 3


def test_a_decoder_without_a_beginning_is_refused(saved: Callable[..., Path]) -> None:
    directory = saved("t5")
    for file in ("config.json", "generation_config.json"):
        edit(directory / file, decoder_start_token_id=None, bos_token_id=None)
    with pytest.raises(UnsupportedModel, match="decoder_start_token_id into its generation_config"):
        load(directory)


def test_a_slow_tokenizer_gives_way_to_the_file_of_a_fast_one(saved: Callable[..., Path]) -> None:
    """transformers knows only a slow tokenizer for Marian."""
    directory = saved("marian")
    edit(directory / "tokenizer_config.json", tokenizer_class="MarianTokenizer")
    assert load(directory).tokenizer.is_fast
    (directory / "tokenizer.json").unlink()
    with pytest.raises(UnsupportedModel, match=r"tokenizer\.json"):
        load(directory)


def test_incomplete_weights_are_named(saved: Callable[..., Path], tmp_path: Path) -> None:
    directory = saved("bart")
    edit(directory / "config.json", decoder_layers=3)
    with pytest.raises(UnsupportedModel, match=r"not complete: model\.decoder\.layers\.2"):
        load(directory)
