"""Numbers of safetensors dtypes as NumPy has them, and back; NumPy itself has no bfloat16."""

import numpy as np
from numpy.typing import NDArray

DTYPES = {"float32": "F32", "bfloat16": "BF16", "float16": "F16"}  # safetensors' name by torch's


def as_float32(data: memoryview, dtype: str) -> NDArray[np.float32]:
    """Return numbers of a safetensors dtype exactly: float32 holds every float16 and bfloat16."""
    if dtype == "BF16":
        return (np.frombuffer(data, dtype="<u2").astype(np.uint32) << 16).view(np.float32)
    if dtype == "F32":
        return np.frombuffer(data, dtype="<f4").astype(np.float32, copy=False)
    with np.errstate(invalid="ignore"):  # a signalling NaN stays one to its finder
        return np.frombuffer(data, dtype="<f2").astype(np.float32)


def as_bytes(values: NDArray[np.float32], dtype: str) -> bytes:
    """Return finite numbers rounded to `dtype` (to nearest, ties to even), little-endian."""
    if dtype == "F32":
        return values.astype("<f4").tobytes()
    if dtype == "F16":
        with np.errstate(over="ignore"):
            return values.astype("<f2").tobytes()
    bits = values.view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype("<u2").tobytes()
