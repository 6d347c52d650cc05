"""Tensors of foreign files, read without running anything in them, and as canonical files hold them."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from app.store.safetensors_file import RawTensor

_DTYPES = {torch.float32: "F32", torch.float16: "F16", torch.bfloat16: "BF16"}


def read_pickled(path: Path) -> Any:
    """Read tensors, and containers of them, from a file of `torch.save`. Raise ValueError, OSError."""
    try:
        return torch.load(path, map_location="cpu", weights_only=True)
    except OSError:
        raise
    except Exception as error:  # PyTorch raises many kinds
        raise ValueError(
            f"{path} can't be read as tensors alone, and what else it holds could run code: save the state "
            f"dict or the tensor again with torch.save ({type(error).__name__})"
        ) from None


def read_array(path: Path) -> Tensor:
    """Read the array of a NumPy file. Raise ValueError, OSError."""
    try:
        with path.open("rb") as file:
            array = np.lib.format.read_array(file, allow_pickle=False)
        return torch.from_numpy(np.ascontiguousarray(array))
    except (ValueError, EOFError, TypeError, AttributeError) as error:
        raise ValueError(f"{path} is no NumPy file with one array of numbers: {error}") from None


def read_state_dict(path: Path) -> Mapping[str, Tensor]:
    """Read named tensors from safetensors or a file of `torch.save`. Raise ValueError, OSError."""
    if path.suffix == ".safetensors":
        from safetensors.torch import load_file

        return load_file(path)
    found = read_pickled(path)
    if not isinstance(found, Mapping) or not all(isinstance(each, Tensor) for each in found.values()):
        raise ValueError(f"{path} holds no state dict, which is tensors by name")
    return found


def raw_tensor(tensor: Tensor, what: str) -> RawTensor:
    """Return the bytes of a tensor as they are. Raise ValueError where no prompt has its dtype."""
    dtype = _DTYPES.get(tensor.dtype)
    if dtype is None:
        found = str(tensor.dtype).removeprefix("torch.")
        raise ValueError(f"{what} holds {found}; expected float32, float16 or bfloat16: cast it first")
    flat = tensor.detach().contiguous().flatten()
    return RawTensor(dtype, tuple(tensor.shape), flat.view(torch.uint8).numpy().tobytes())
