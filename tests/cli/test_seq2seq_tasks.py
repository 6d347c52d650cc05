"""`promptplex validate` and `push --store` of an encoder-decoder's prompts."""

import warnings
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PrefixTuningConfig, PromptTuningConfig, get_peft_model
from transformers import AutoModelForSeq2SeqLM, BartConfig

from app.sites import Embedding, Site
from app.store.prompt_store import open_store
from tests.bases import train_tokenizer

Run = Callable[..., tuple[int, str, str]]
EOS = 0


@pytest.fixture(scope="module")
def bart(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three layers in the encoder, two in the decoder."""
    directory = tmp_path_factory.mktemp("bases") / "tiny-bart"
    tokenizer = train_tokenizer()
    config = BartConfig(
        vocab_size=len(tokenizer),
        d_model=32,
        encoder_layers=3,
        decoder_layers=2,
        encoder_attention_heads=4,
        decoder_attention_heads=4,
        encoder_ffn_dim=64,
        decoder_ffn_dim=64,
        max_position_embeddings=128,
        bos_token_id=None,
        pad_token_id=1,
        eos_token_id=EOS,
        decoder_start_token_id=EOS,
        forced_eos_token_id=EOS,
    )
    torch.manual_seed(0)
    AutoModelForSeq2SeqLM.from_config(config).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture
def save(bart: Path, tmp_path: Path) -> Callable[..., Path]:
    def saved(config: PeftConfig, **options: bool) -> Path:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = get_peft_model(AutoModelForSeq2SeqLM.from_pretrained(bart), config)
            torch.nn.init.normal_(model.prompt_encoder.default.embedding.weight)
            model.save_pretrained(tmp_path / "adapter", **options)
        return tmp_path / "adapter"

    return saved


def test_validate_says_p_at_each_place(promptplex: Run, bart: Path, save: Callable[..., Path]) -> None:
    """PEFT also saves the embeddings of both stacks where tokens were added: they are the base's."""
    config = PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5)
    adapter = save(config, save_embedding_layers=True)
    status, out, _ = promptplex("validate", str(adapter))
    assert status == 0
    assert out.startswith("soft of enc.embeds 5 virtual tokens, sha256:")
    assert "beside it: base_model.lm_head.weight, base_model.model.shared.weight" in out
    status, out, err = promptplex("validate", str(adapter), "--model", str(bart))
    assert (status, out.splitlines()[-1]) == (0, "fits tiny-bart"), err


def test_a_prefix_has_the_layers_of_the_bases_decoder(
    promptplex: Run, bart: Path, save: Callable[..., Path], tmp_path: Path
) -> None:
    adapter = save(PrefixTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=4))
    status, alone, _ = promptplex("validate", str(adapter))
    assert (status, alone.startswith("prefix of dec.self 4 virtual tokens")) == (0, True)
    status, out, err = promptplex("validate", str(adapter), "--model", str(bart))
    assert (status, out.splitlines()[-1]) == (0, "fits tiny-bart"), err
    assert out.splitlines()[0] != alone.splitlines()[0], "of two layers, not of the encoder's three"


def test_push_to_a_stores_files(promptplex: Run, save: Callable[..., Path], tmp_path: Path) -> None:
    adapter = save(PromptTuningConfig(task_type="SEQ_2_SEQ_LM", num_virtual_tokens=5))
    status, out, _ = promptplex("push", str(adapter), "--task", "t", "--store", str(tmp_path / "store"))
    assert status == 0
    assert out.startswith("t@1 (soft, 5 virtual tokens)")
    version = open_store(tmp_path / "store").resolve("t")
    assert (version.length(Embedding.ENCODER), version.length(Site.DECODER_SELF)) == (5, 0)
