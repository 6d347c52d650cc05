"""The identity of a base: sha256 over its tensors, its configuration and its tokenizer.

Hashing reads every weight once, so the result is kept in a sidecar under the user's cache
directory, named by the files' paths, sizes and times.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

from app.models.user_cache import cache_directory

# The library that wrote the file and the path that it came from change nothing that the model computes.
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")
_NOT_KEPT = "the digest of the weights can't be kept, so they are hashed at every start"


def fingerprint(
    files: Iterable[Path],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[str], None],
    *,
    adapter: dict[str, Any] | None = None,
    beginning: dict[str, Any] | None = None,
) -> str:
    """Return the hex sha256 that names the base; equal for equal weights however they are sharded.

    `files` are all that weights were read from; `adapter` is the configuration of an adapter that was
    applied to them; `beginning` are ids that an encoder-decoder's decoder begins and ends with.
    """
    digest = hashlib.sha256()
    digest.update(_weights_digest(sorted(files), progress).encode())
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _CONFIG_NOISE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(_tokenizer_state(tokenizer).encode())
    if adapter is not None:
        digest.update(json.dumps(adapter, sort_keys=True).encode())
    if beginning is not None:
        digest.update(json.dumps(beginning, sort_keys=True).encode())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _weights_digest(files: list[Path], progress: Callable[[str], None]) -> str:
    try:
        sidecar = _sidecar(files)
    except OSError as error:
        progress(f"{_NOT_KEPT}: {error}")
        return _hashed(files)
    if sidecar.is_file():
        return sidecar.read_text()
    progress("hashing the weights once, to name this base model")
    digest = _hashed(files)
    _write_sidecar(sidecar, digest, progress)
    return digest


def _hashed(files: list[Path]) -> str:
    entries = sorted(entry for file in files for entry in _tensor_entries(file))
    return hashlib.sha256("\n".join(entries).encode()).hexdigest()


def _tensor_entries(file: Path) -> Iterable[str]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            tensor = tensors.get_tensor(name)
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def _sidecar(files: list[Path]) -> Path:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    folder = cache_directory() / "fingerprints"
    folder.mkdir(mode=0o700, exist_ok=True)
    return folder / hashlib.sha256(repr(stats).encode()).hexdigest()


def _write_sidecar(sidecar: Path, digest: str, progress: Callable[[str], None]) -> None:
    """Keep the digest if possible; without it the weights are hashed at each start."""
    try:
        temporary = sidecar.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(sidecar)
    except OSError as error:
        progress(f"{_NOT_KEPT}: {error}")
