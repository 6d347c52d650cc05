"""Bare embeddings `[p, d]`: TGIS' `encoder.pt` and `decoder.pt`, google-research's `.npy` for T5.

TGIS puts `encoder.pt` before the source's tokens and `decoder.pt` before the decoder's start token; a
causal model has `decoder.pt` alone. google-research's prompts are for T5's encoder. None is scaled.
"""

from pathlib import Path

from torch import Tensor

from app.cli.converters.tensors import raw_tensor, read_array, read_pickled
from app.prompt import Prompt, PromptKind, TaskType
from app.sites import Embedding
from app.store.prompt_file import make_prompt

DESCRIPTION = (
    "encoder.pt or decoder.pt of TGIS, or a directory with them; a .npy file [virtual tokens, width]"
)
_NAMES = {"encoder.pt": Embedding.ENCODER, "decoder.pt": Embedding.DECODER}


def recognises(source: Path) -> bool:
    """Return whether these are files of TGIS, or one of NumPy."""
    return source.suffix == ".npy" or bool(_files(source))


def read(source: Path, task_type: TaskType | None) -> Prompt:
    """Read the rows of each place. Raise ValueError, PromptRejected, OSError."""
    rows = (
        {Embedding.ENCODER: read_array(source)}
        if source.suffix == ".npy"
        else {place: _tensor(path) for place, path in _files(source).items()}
    )
    usual = TaskType.SEQ_2_SEQ_LM if Embedding.ENCODER in rows else TaskType.CAUSAL_LM
    if task_type is TaskType.CAUSAL_LM and source.suffix == ".npy":
        rows = {Embedding.DECODER: rows[Embedding.ENCODER]}  # the same rows, before a causal model's tokens
    tensors = {str(place): raw_tensor(tensor, str(source)) for place, tensor in rows.items()}
    return make_prompt(PromptKind.SOFT, tensors, task_type=task_type or usual)


def _files(source: Path) -> dict[Embedding, Path]:
    found = {name: source / name for name in _NAMES} if source.is_dir() else {source.name: source}
    return {_NAMES[name]: path for name, path in found.items() if name in _NAMES and path.is_file()}


def _tensor(path: Path) -> Tensor:
    found = read_pickled(path)
    if not isinstance(found, Tensor):
        raise ValueError(f"{path} holds no bare tensor [virtual tokens, width], as TGIS' prompts do")
    return found
