"""A training base is the base that serves: same identity, shapes and ids, but as transformers runs it."""

from pathlib import Path

import pytest
import torch
from transformers import PreTrainedModel

from app.errors import UnsupportedModel
from app.models.attention.packed import IMPLEMENTATION
from app.models.attention.prefixed import PREFIXED
from app.models.loading import load_base
from app.training.base import TrainingBase, load_training_base
from tests import seq2seq
from tests.bases import save_tiny_llama


def loaded(directory: Path, **more: int) -> TrainingBase:
    return load_training_base(str(directory), dtype="float32", device="cpu", progress=print, **more)


def save_bart(directory: Path) -> PreTrainedModel:
    model = seq2seq.tiny_seq2seq("bart")
    model.save_pretrained(directory)
    seq2seq.source_tokenizer("bart").save_pretrained(directory)
    return model


def attention(base: TrainingBase) -> str | None:
    return base.model.config._attn_implementation


def test_a_causal_base(tmp_path: Path) -> None:
    base = loaded(save_tiny_llama(tmp_path / "llama"))
    served = load_base(str(tmp_path / "llama"), dtype="float32", device="cpu")
    assert base.geometry == served.backbone.geometry
    assert (base.name, base.eos_ids, base.decoder_start_id) == (served.name, served.eos_ids, None)
    assert base.eos_id in base.eos_ids
    assert attention(base) not in (IMPLEMENTATION, PREFIXED), "it runs by transformers' own choice"
    assert not any(each.requires_grad for each in base.model.parameters())
    assert not base.model.training
    logits = base.model(input_ids=torch.tensor([[5, 6, 7]])).logits
    assert logits.shape == (1, 3, base.geometry.vocab_size)


def test_an_encoder_decoder(tmp_path: Path) -> None:
    own = save_bart(tmp_path)
    base = loaded(tmp_path)
    ids = {"input_ids": torch.tensor([[5, 6, 7]]), "decoder_input_ids": torch.tensor([[1, 8]])}
    assert attention(base) == PREFIXED
    torch.testing.assert_close(base.model(**ids).logits, own(**ids).logits)
    assert (base.decoder_start_id, base.forced_bos_id) == (seq2seq.EOS, seq2seq.BOS)
    assert base.is_encoder_decoder


def test_the_context_is_bounded(tmp_path: Path) -> None:
    base = loaded(save_tiny_llama(tmp_path), max_context=64)
    assert base.geometry.max_positions == 64


def test_what_is_no_base_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UnsupportedModel, match="no directory"):
        loaded(tmp_path / "nowhere")
