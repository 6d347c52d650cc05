"""The random models on disk, made once, for peers that load a directory and insist on a tokenizer."""

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
        _tokenizer(shape.vocabulary, eos).save_pretrained(half_made)
        half_made.rename(folder)
    return folder


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
