"""The kernels as compilers for other processors make them, each compiled once for all tests."""

import ctypes
import functools
import os
from collections.abc import Callable

import pytest

from app.models.cpu import building

Compiled = Callable[..., ctypes.CDLL]


@pytest.fixture(scope="session")
def compiled(tmp_path_factory: pytest.TempPathFactory) -> Compiled:
    """Return the library of some sources, as the compiler makes it with a flag. Raise NotBuilt: it can't."""
    folder = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        folder = folder.parent  # which all workers share

    @functools.cache
    def compiled(flag: str, *sources: str) -> ctypes.CDLL:
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(building, "_FLAGS", (*building._FLAGS, flag))
            patch.setattr(building, "SOURCES", [each for each in building.SOURCES if each.stem in sources])
            patch.setenv("XDG_CACHE_HOME", str(folder / "kernels"))
            return ctypes.CDLL(str(building.build()))

    return compiled
