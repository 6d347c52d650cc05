"""Tiny models saved as their users have them: a directory with weights, config and tokenizer."""

import contextlib
from pathlib import Path

import pytest
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from app.models.cpu import building
from app.models.cpu.building import NotBuilt
from app.models.user_cache import cache_directory
from tests.tiny_models import VOCABULARY, tiny_model


def tiny_tokenizer() -> PreTrainedTokenizerFast:
    vocabulary = {f"t{i}": i for i in range(VOCABULARY - 1)} | {"</s>": VOCABULARY - 1}
    backend = Tokenizer(models.WordLevel(vocabulary, unk_token="t0"))
    backend.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="</s>")


def save(model: PreTrainedModel, directory: Path, **settings: object) -> Path:
    model.save_pretrained(directory, **settings)
    tiny_tokenizer().save_pretrained(directory)
    return directory


@pytest.fixture
def own_cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A user's cache that holds the compiled kernels, which take 10 s of CPU, and no digests of weights."""
    with contextlib.suppress(NotBuilt):
        library = building.build()
        monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
        (cache_directory() / library.name).symlink_to(library)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))


@pytest.fixture
def saved_llama(tmp_path: Path, own_cache: None) -> Path:
    return save(tiny_model("llama"), tmp_path / "llama")
