"""The random models on disk, made once, for peers that load a directory and insist on a tokenizer."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import torch
import transformers
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from transformers import PreTrainedModel, PreTrainedTokenizerFast

from benchmarks.work import Shape
from benchmarks.works import shape_name

_FOLDER = Path("build/bench/models")


def saved_model(shape: Shape, make: Callable[[], PreTrainedModel], eos: str = "t2") -> Path:
    """Return the directory of a shape's random weights; `make` makes them where they aren't there yet."""
    versions = f"torch-{torch.__version__}-transformers-{transformers.__version__}"
    folder = (_FOLDER / f"{shape_name(shape)}-{versions}").absolute()
    if not folder.is_dir():
        half_made = folder.with_suffix(".new")
        shutil.rmtree(half_made, ignore_errors=True)
        make().save_pretrained(half_made)
        _save_tokenizer(_tokenizer(shape.vocabulary, eos), half_made)
        half_made.rename(folder)
    return folder


def _save_tokenizer(tokenizer: PreTrainedTokenizerFast, folder: Path) -> None:
    """Under the class that transformers 4 knows it by too, which peers may have."""
    tokenizer.save_pretrained(folder)
    file = folder / "tokenizer_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"tokenizer_class": "PreTrainedTokenizerFast"}))


def _tokenizer(size: int, eos: str) -> PreTrainedTokenizerFast:
    """One in which the token of id n is `tn`."""
    vocabulary = {f"t{number}": number for number in range(size)}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(WordLevel(vocabulary, unk_token="t2")),
        pad_token="t0",
        eos_token=eos,
        bos_token="t0",
        unk_token="t2",
    )
