"""Imports of torch and transformers, which take seconds."""

import contextlib
import gc
from collections.abc import Iterator


@contextlib.contextmanager
def large_imports() -> Iterator[None]:
    """Import in the block without garbage collections: each looks through all that has come so far.

    That saves a quarter of the time. What came stays, so later collections leave it out too.
    """
    gc.disable()
    try:
        yield
    finally:
        gc.freeze()
        gc.enable()
