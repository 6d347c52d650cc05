"""The identity of a base: sha256 over its tensors, its configuration and its tokenizer.

Hashing reads every weight once, so the result is kept in a sidecar under the user's cache
directory, named by the files' paths, sizes and times.
"""

import hashlib
import json
import os
from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from safetensors import safe_open
from transformers import PreTrainedTokenizerBase
from transformers.configuration_utils import PreTrainedConfig

# Which library wrote the file and where it was found say nothing of what the model computes.
_CONFIG_NOISE = ("transformers_version", "_name_or_path", "dtype", "torch_dtype", "use_cache")


def fingerprint(
    files: Iterable[Path],
    config: PreTrainedConfig,
    tokenizer: PreTrainedTokenizerBase,
    progress: Callable[[str], None],
) -> str:
    """Hex sha256 that names the base; equal for equal weights however they are sharded."""
    digest = hashlib.sha256()
    digest.update(_weights_digest(sorted(files), progress).encode())
    settings = {key: value for key, value in config.to_diff_dict().items() if key not in _CONFIG_NOISE}
    digest.update(json.dumps(settings, sort_keys=True, default=str).encode())
    digest.update(_tokenizer_state(tokenizer).encode())
    return digest.hexdigest()


def _tokenizer_state(tokenizer: PreTrainedTokenizerBase) -> str:
    backend = getattr(tokenizer, "backend_tokenizer", None)
    return str(backend.to_str()) if backend is not None else json.dumps(tokenizer.get_vocab(), sort_keys=True)


def _weights_digest(files: list[Path], progress: Callable[[str], None]) -> str:
    sidecar = _sidecar(files)
    if sidecar.is_file():
        return sidecar.read_text()
    progress("hashing the weights once, to name this base model")
    entries = sorted(entry for file in files for entry in _tensor_entries(file))
    digest = hashlib.sha256("\n".join(entries).encode()).hexdigest()
    _write_sidecar(sidecar, digest)
    return digest


def _tensor_entries(file: Path) -> Iterable[str]:
    with safe_open(file, framework="pt") as tensors:
        for name in tensors.keys():  # noqa: SIM118  # not a mapping
            tensor = tensors.get_tensor(name)
            raw = tensor.contiguous().flatten().view(torch.uint8).numpy()
            yield f"{name} {tensor.dtype} {tuple(tensor.shape)} {hashlib.sha256(raw).hexdigest()}"


def _sidecar(files: list[Path]) -> Path:
    stats = [(str(file.resolve()), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    root = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return root / "promptplex" / "fingerprints" / hashlib.sha256(repr(stats).encode()).hexdigest()


def _write_sidecar(sidecar: Path, digest: str) -> None:
    """Best effort: a read-only home costs a hash at each start, nothing else."""
    try:
        sidecar.parent.mkdir(parents=True, exist_ok=True)
        temporary = sidecar.with_suffix(f".{os.getpid()}")
        temporary.write_text(digest)
        temporary.replace(sidecar)
    except OSError:
        return
