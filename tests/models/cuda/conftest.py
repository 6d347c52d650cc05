"""Triton's interpreter multiplies bfloat16 as if its bits were integers: here it doesn't."""

import os
from typing import Any

import numpy as np
import pytest

triton = pytest.importorskip("triton")
import triton.language as tl  # noqa: E402
from triton.runtime.interpreter import InterpreterBuilder, TensorHandle  # noqa: E402


def widened(handle: Any) -> Any:
    """Return bfloat16, which the interpreter keeps as uint16, as float32."""
    if handle.dtype.scalar != tl.bfloat16:
        return handle
    return TensorHandle((handle.data.astype(np.uint32) << 16).view(np.float32), tl.float32)


@pytest.fixture(autouse=True)
def exact_bfloat16(monkeypatch: pytest.MonkeyPatch) -> None:
    if os.environ.get("TRITON_INTERPRET") == "1":
        create_dot = InterpreterBuilder.create_dot
        monkeypatch.setattr(
            InterpreterBuilder,
            "create_dot",
            lambda self, a, b, *given: create_dot(self, widened(a), widened(b), *given),
        )
